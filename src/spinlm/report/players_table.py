"""Compare players of several runs that share a start, in one table. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.errors import RunError
from spinlm.recipe.fields import get_path, iterate_fields, subsections
from spinlm.recipe.fingerprint import with_defaults
from spinlm.recipe.objective import OBJECTIVES
from spinlm.recipe.schema import MUTABLE_FIELDS, Recipe
from spinlm.report.compare import (
    Difference,
    check_same_scoring,
    collapsed_iterations,
    last_player,
    paired_difference,
    player_values,
    run_names,
    select_metric,
)
from spinlm.report.summary import METRIC_NAMES, numeric_metrics, player_rows
from spinlm.rundir.layout import RunDir
from spinlm.rundir.player_names import parse_player
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    ("task_score", "task score", "{:.3f}"),
    ("heldout_nll", "held-out NLL", "{:.3f}"),
    ("kl_from_start", "KL from start", "{:+z.4f}"),
)
"""Metrics in the table: name, title, number format."""


@dataclass(frozen=True)
class ComparedPlayer:
    """A player of a run beside players of other runs."""

    run: str
    settings: str  # the objective, and what else differs from the first run's recipe
    iteration: int
    collapsed: bool
    steps: int  # optimizer steps since the start
    metrics: dict[str, float]
    differences: dict[str, Difference]  # by metric, to the baseline; positive where this player is better


@dataclass(frozen=True)
class PlayersTable:
    """Players of several runs with one start. `str()` says what the differences mean."""

    metric: str  # that the table shows the difference of
    baseline: str
    prompts: int
    players: list[ComparedPlayer]  # the start first

    def __str__(self) -> str:
        direction = "" if self.metric == "task_score" else " Positive is better: a lower NLL."
        return (
            f"Difference: {METRIC_NAMES[self.metric]} compared with {self.baseline}, mean over {self.prompts} held-out "
            f"prompts, paired, with its 95% interval.{direction} The interval covers the choice of prompts, not the "
            "seed: another seed may differ by more."
        )

    def as_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        values = asdict(self)
        for player, row in zip(self.players, values["players"], strict=True):
            row["differences"] = {
                metric: asdict(difference) | {"interval": list(difference.interval)}
                for metric, difference in player.differences.items()
            }
        return values | {"summary": str(self)}

    def table(self) -> "Table":
        """Return a rich table with one row per player."""
        from rich.box import SIMPLE
        from rich.table import Table

        from spinlm.utils.console import printable

        columns = [column for column in COLUMNS if any(column[0] in player.metrics for player in self.players)]
        grid = Table(box=SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
        for title in ("run", "settings", "player"):
            grid.add_column(title, overflow="fold")
        for title in ("steps", *(title for _, title, _ in columns), "difference [95%]"):
            grid.add_column(title, justify="right", no_wrap=title == "difference [95%]")
        for player in self.players:
            difference = player.differences.get(self.metric)
            cells = [form.format(player.metrics[key]) if key in player.metrics else "–" for key, _, form in columns]
            name = player_name(player.iteration) + (" (collapsed)" if player.collapsed else "")
            text = (printable(cell) for cell in (player.run, player.settings, name))
            grid.add_row(*text, str(player.steps), *cells, "–" if difference is None else str(difference))
        return grid


def compare(players: Sequence[str | Path], baseline: str | Path | None = None) -> PlayersTable:
    """Compare players of several runs that share a start, prompt by prompt.

    Args:
        players: for each player a run folder, or RUN:ITERATION, where ITERATION is a number, `start` or `best`. A run
            folder alone means its last player that has not collapsed.
        baseline: the player to compare with, in the same form; None means the start.

    Raises:
        RunError: a folder holds no run or has no such player; the runs have other starts, other held-out prompts or
            another scorer; or a file is damaged.
    """
    opened: dict[Path, RunDir] = {}
    chosen = [_parse(str(name), opened) for name in players]
    base = _parse(str(baseline), opened) if baseline is not None else (chosen[0][0], START)
    folders = list(opened.values())
    for folder in folders[1:]:
        check_same_scoring(folder, folders[0])
        _check_same_start(folder, folders[0])
    rows = [(folders[0], START), *(player for player in chosen if player[1] != START)]
    names = dict(zip(folders, run_names(folders), strict=True))
    recipe = with_defaults(read_recipe(folders[0]))
    base_values = _values(*base)
    compared = []
    for folder, t in rows:
        values = {} if (folder, t) == base or t == base[1] == START else _values(folder, t)
        compared.append(
            ComparedPlayer(
                run="start" if t == START else names[folder],
                settings="" if t == START else _settings(with_defaults(read_recipe(folder)), recipe),
                iteration=t,
                collapsed=t in collapsed_iterations(folder),
                steps=sum(folder.metadata("train", number)["steps"] for number in range(t + 1)),
                metrics=numeric_metrics(read_json(folder.eval_metrics(t))),
                differences={
                    metric: paired_difference(metric, values[metric], base_values[metric])
                    for metric in base_values
                    if metric in values
                },
            )
        )
    return PlayersTable(
        metric=select_metric(recipe["selfplay"]["select"]["metric"], recipe["evaluate"]["scorer"]),
        baseline="the start" if base[1] == START else f"{names[base[0]]} after {player_name(base[1])}",
        prompts=len(base_values["heldout_nll"]),
        players=compared,
    )


def _parse(name: str, opened: dict[Path, RunDir]) -> tuple[RunDir, int]:
    """Return the run and the iteration that RUN or RUN:ITERATION names. Each run is opened once."""
    path, _, player = name.rpartition(":")
    if not path or RunDir(Path(name)).is_run():
        path, player = name, ""
    folder = opened.setdefault(Path(path).resolve(), RunDir(Path(path)))
    read_recipe(folder)  # raises if there is no run
    evaluated = [row.iteration for row in player_rows(folder)]
    iteration = parse_player(folder, player) if player else last_player(folder)
    if iteration is None or iteration not in evaluated:
        raise RunError(f"{name}: has no evaluated player to compare yet. `spinlm status {path}` shows the progress")
    return folder, iteration


def _check_same_start(folder: RunDir, first: RunDir) -> None:
    """Compare the starts by their greedy responses, whose file has the held-out prompts, NLLs and scores as well."""
    digests = []
    for run in (folder, first):
        run.require("evaluate", START)
        path = run.heldout_greedy(START).relative_to(run.root)
        digests.append(run.metadata("evaluate", START)["outputs"][str(path)])
    if digests[0] != digests[1]:
        raise RunError(
            f"{folder.root} and {first.root} cannot be compared: their starts give other responses to the held-out "
            "prompts. Start one of them with --start-from the other"
        )


def _values(folder: RunDir, t: int) -> dict[str, dict[str, float]]:
    """Return a player's values on each held-out example by metric: the NLL, and task scores at each temperature."""
    folder.require("evaluate", t)
    metrics = numeric_metrics(read_json(folder.eval_metrics(t)))
    names = [name for name in metrics if name in ("heldout_nll", "task_score", "sampled_task_score")]
    names += [name for name in metrics if name.startswith("task_score_at_")]
    return {name: player_values(folder, t, name) for name in names}


def _settings(recipe: dict[str, Any], first: dict[str, Any]) -> str:
    """Return the name of a recipe's objective, and the settings that differ from the first recipe's."""
    objective = recipe["objective"]["name"]
    reference = first
    if objective != first["objective"]["name"]:  # its own settings, compared with their defaults
        fields = OBJECTIVES[objective].model_fields
        defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
        reference = first | {"objective": defaults}
    if objective == "extrapolate":  # the name of the other run is enough
        recipe = recipe | {"objective": recipe["objective"] | {"run": Path(recipe["objective"]["run"]).name}}
    names = (name for name, field in iterate_fields(Recipe) if not subsections(field.annotation))
    skipped = (*MUTABLE_FIELDS, "objective.name", "selfplay.iterations")
    changed = (
        _null_section(recipe, name)
        for name in names
        if name not in skipped and get_path(recipe, name) != get_path(reference, name)
    )
    return ", ".join([objective, *(f"{name}={json.dumps(get_path(recipe, name))}" for name in dict.fromkeys(changed))])


def _null_section(recipe: dict[str, Any], name: str) -> str:
    """Return the outermost section of a field that is null, such as `selfplay.guard`; the field if none is."""
    keys = name.split(".")
    sections = (".".join(keys[:depth]) for depth in range(1, len(keys)))
    return next((section for section in sections if get_path(recipe, section) is None), name)
