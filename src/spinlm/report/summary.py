"""The players of a run as a table, and the verdict in sentences. Reads the run folder only; imports no torch."""

import contextlib
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from spinlm.errors import RunError
from spinlm.report.regimes import regime_verdict
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    ("task_score", "task score", "{:.3f}"),
    ("heldout_nll", "held-out NLL", "{:.3f}"),
    ("pair_accuracy", "pair accuracy", "{:.2f}"),
    ("margin", "margin", "{:+z.2f}"),
    ("identical_rate", "identical", "{:.1%}"),
    ("truncated_rate", "truncated", "{:.1%}"),
    ("repeated_4grams", "repeated 4-grams", "{:.1%}"),
)
"""Columns of the table of players: metric, title, number format."""

METRIC_NAMES = {"task_score": "task score", "heldout_nll": "held-out NLL"}

NLL_CAVEAT = (
    "Held-out NLL measures how likely the real responses are, not how good the player's own responses are. Read those, "
    "or set evaluate.scorer."
)


@dataclass(frozen=True)
class PlayerRow:
    """One evaluated player and its metrics."""

    iteration: int
    metrics: dict[str, Any]
    best: bool  # whether it is the best player so far

    @property
    def name(self) -> str:
        return player_name(self.iteration)


def player_rows(folder: RunDir) -> list[PlayerRow]:
    """Return the players evaluated so far, the start first."""
    best = folder.best()
    rows: list[PlayerRow] = []
    for iteration in count(START):
        if not folder.marker("evaluate", iteration).exists():
            return rows
        path = folder.eval_metrics(iteration)
        folder.check_outputs("evaluate", iteration, path)
        rows.append(PlayerRow(iteration, read_json(path), iteration == best))
    return rows


def results(folder: RunDir) -> list[dict[str, Any]]:
    """Return a dict for each player evaluated so far, the start first: `player`, `best`, and the metrics by name.

    Example: `pandas.DataFrame(results(folder))`.

    Raises:
        RunError: the file of a player's metrics has changed.
    """
    return [
        {"player": player.name, "best": player.best} | numeric_metrics(player.metrics) for player in player_rows(folder)
    ]


def numeric_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers by name; the task score at temperature 0.3 is `task_score_at_0.3`."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    by_temperature = metrics.get("task_score_by_temperature", {})
    return numbers | {f"task_score_at_{temperature}": score for temperature, score in by_temperature.items()}


def compared_player(players: list[PlayerRow]) -> PlayerRow | None:
    """Return the player to compare with the start: the best one, or the last one where the start is the best."""
    later = players[1:]
    return next((player for player in later if player.best), later[-1] if later else None)


def table(folder: RunDir) -> "Table":
    """Return a rich table with one row per player, about 75 characters wide."""
    from rich.box import SIMPLE
    from rich.table import Table

    players = player_rows(folder)
    titles, body = table_cells(players)
    grid = Table(box=SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    for number, title in enumerate(titles):
        header = title.replace(" ", "\n", 1) if " " in title else f"\n{title}"  # all headers take two lines
        grid.add_column(header, justify="right" if number else "left", no_wrap=True)
    for player, values in zip(players, body, strict=True):
        grid.add_row(*values, style="bold" if player.best else "")
    return grid


def table_cells(players: list[PlayerRow]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the table of players, as text. A metric that no player has is left out."""
    columns = [column for column in COLUMNS if any(column[0] in player.metrics for player in players)]
    body = [
        [
            player.name + (" (best)" if player.best else ""),
            *(form.format(player.metrics[key]) if key in player.metrics else "–" for key, _, form in columns),
        ]
        for player in players
    ]
    return ["player", *(title for _, title, _ in columns)], body


def verdict(folder: RunDir) -> str:
    """Say whether training helped, and by how much."""
    judged = promotions(folder)
    if not judged:
        return "No iteration has been evaluated yet."
    recipe, last = read_recipe(folder), judged[-1]
    method = "Self-play"
    if (objective := recipe["objective"])["name"] == "extrapolate":
        method = f"Extrapolation by {objective['factor']:g}"
    elif is_control(folder):
        method = "More supervised fine-tuning"
    elif recipe["data"]["columns"].get("rejected"):
        method = "Training on preferences"
    if last["best"] == START:
        sentences = _no_improvement(folder, method, judged, recipe["selfplay"]["select"]["min_standard_errors"])
    else:
        sentences = _improvement(folder, method, judged)
    if collapse := last.get("collapse"):
        sentences += [
            f"Iteration {last['iteration']} collapsed and ended the run: {collapse}.",
            collapse_remedy(objective["name"]),
        ]
    if regime := regime_verdict(folder):
        sentences.append(regime)
    return " ".join(sentences)


def collapse_remedy(objective: str) -> str:
    """Return what to do after a collapse of a run with this objective."""
    lower = "objective.factor" if objective == "extrapolate" else "train.learning_rate"
    return f"Lower {lower}, in another --run-dir."


def _improvement(folder: RunDir, method: str, judged: list[dict[str, Any]]) -> list[str]:
    """Say what the best player gained over the start and over the best player before it."""
    metric, best = judged[-1]["metric"], judged[-1]["best"]
    promotion = next(item for item in judged if item["iteration"] == best)
    start, new = (read_json(folder.eval_metrics(iteration))[metric] for iteration in (START, best))
    scored = metric == "task_score"
    effect = "helped" if scored else "made the real held-out responses more likely"
    previous = "the start" if promotion["baseline"] == START else player_name(promotion["baseline"])
    return [
        f"{method} {effect}: {METRIC_NAMES[metric]} {start:.3f} at the start, {new:.3f} after iteration {best} (best).",
        f"Paired difference to {previous}: {_mean_and_error(metric, promotion)} (mean ± standard error over the "
        "held-out prompts of this one run).",
        "Another seed may differ.",
        *([] if scored else [NLL_CAVEAT]),
    ]


def _no_improvement(folder: RunDir, method: str, judged: list[dict[str, Any]], min_standard_errors: float) -> list[str]:
    """Say why the start is still the best player."""
    metric = judged[0]["metric"]
    title = METRIC_NAMES[metric]
    if any(item.get("better") for item in judged):
        return [f"{method} did not help.", f"Every player that beat the start's {title} had collapsed."]
    conclusion = "The start stays the best player."
    if metric == "task_score" and not any(item["mean_difference"] or item["standard_error"] for item in judged):
        last = judged[-1]["iteration"]
        start, end = (read_json(folder.eval_metrics(iteration)) for iteration in (START, last))
        return [
            f"{method} did not help as far as the scorer can tell.",
            f"All players have the same score on every prompt (task score {start['task_score']:.3f}).",
            f"Held-out NLL: {start['heldout_nll']:.3f} at the start, {end['heldout_nll']:.3f} after iteration {last}.",
            "Read the responses; another evaluate.scorer may show a difference.",
            conclusion,
        ]
    threshold = f"by more than {count_standard_errors(min_standard_errors)} of the paired difference"
    closest = max(judged, key=lambda item: float(item["mean_difference"]))
    difference = _mean_and_error(metric, closest)
    if len(judged) == 1:
        reason = [f"Iteration 0 did not beat the start's {title} {threshold}.", f"Difference: {difference}."]
    else:
        reason = [
            f"None of {len(judged)} iterations beat the start's {title} {threshold}.",
            f"Closest: iteration {closest['iteration']}, {difference}.",
        ]
    return [f"{method} did not help.", *reason, conclusion]


def _mean_and_error(metric: str, promotion: dict[str, Any]) -> str:
    return f"{format_improvement(metric, promotion['mean_difference'])} ± {promotion['standard_error']:.3f}"


def format_improvement(metric: str, mean_difference: float) -> str:
    """Format an improvement: a task score with its sign, an NLL as `lower by` (better) or `higher by` (worse)."""
    if metric == "task_score":
        return f"{mean_difference:+z.3f}"
    return f"{'lower' if mean_difference >= 0 else 'higher'} by {abs(mean_difference):.3f}"


def count_standard_errors(number: float) -> str:
    return f"{number:g} standard error{'' if number == 1 else 's'}"


def outcome(folder: RunDir) -> str | None:
    """Return the verdict in a few words, for a list of runs; None before the first iteration is judged."""
    judged = promotions(folder)
    if not judged:
        return None
    if judged[-1]["best"] == START:
        return "not better than the start"
    metric = judged[-1]["metric"]
    start, new = (read_json(folder.eval_metrics(iteration))[metric] for iteration in (START, judged[-1]["best"]))
    return f"{METRIC_NAMES[metric]} {start:.3f} → {new:.3f}"


def start_from(folder: RunDir) -> str | None:
    """Return the run whose start this run uses; None where the run made the start itself."""
    provenance = None
    with contextlib.suppress(RunError):  # missing or damaged: the readers that need it raise
        provenance = read_json(folder.provenance)
    return provenance.get("start_from") if isinstance(provenance, dict) else None


def is_control(folder: RunDir) -> bool:
    """Return whether a run is a control: fine-tuning on the real responses without self-play, or extrapolation."""
    return read_recipe(folder)["objective"]["name"] in ("sft", "extrapolate")


def promotions(folder: RunDir) -> list[dict[str, Any]]:
    """Return what `promote` decided in each iteration so far."""
    judged: list[dict[str, Any]] = []
    for iteration in count(0):
        if not folder.marker("promote", iteration).exists():
            return judged
        judged.append({"iteration": iteration, **folder.metadata("promote", iteration)})
    return judged


def display_text(text: str, finished: bool, tokens: int) -> str:
    """Mark a response that was cut off; `tokens` is its length."""
    return text if finished else f"{text} … (cut off at {tokens} tokens)"
