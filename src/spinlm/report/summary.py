"""What a run has found so far, as a table and a sentence. Reads the run folder only; imports no torch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from spinlm.errors import RunError
from spinlm.recipe.schema import CONTROL
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json, read_json_lines

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    ("task_score", "task score", "{:.3f}"),
    ("heldout_nll", "held-out NLL", "{:.3f}"),
    ("pair_accuracy", "pair accuracy", "{:.2f}"),
    ("margin", "margin", "{:+z.2f}"),
    ("identical_rate", "identical", "{:.1%}"),
    ("truncated_rate", "unfinished", "{:.1%}"),
    ("repeated_4grams", "repeated", "{:.1%}"),
)


METRIC_NAMES = {"task_score": "task score", "heldout_nll": "held-out NLL"}

LIKELIHOOD_ONLY = (
    " That is the likelihood of the real answers, not the quality of the player's own: look at them, or name a scorer "
    "in evaluate.scorer."
)


@dataclass(frozen=True)
class Row:
    """One player: which, what was measured, and whether it is the best so far."""

    iteration: int
    metrics: dict[str, Any]
    best: bool

    @property
    def name(self) -> str:
        return player_name(self.iteration)


def rows(run: RunDir) -> list[Row]:
    """The players evaluated so far, the starting one first."""
    best = run.best()
    found: list[Row] = []
    for iteration in count(START):
        path = run.eval_metrics(iteration)
        if not run.marker("evaluate", iteration).exists():
            return found
        found.append(Row(iteration, read_json(path), iteration == best))
    return found


def table(run: RunDir, width: int = 100) -> "Table":
    """A rich table with a row for each player, in so many columns of text: where they are few, it stands closer, and
    the last measures are left out rather than numbers cut."""
    players = rows(run)
    titles, body = cells(players)
    tries = ((count, close) for count in range(len(titles), 1, -1) for close in (False, True))
    grids = (_grid(titles, body, players, count, close) for count, close in tries)
    return next((grid for grid in grids if _fits(grid, width)), _grid(titles, body, players, 2, True))


def _grid(titles: list[str], body: list[list[str]], players: list[Row], count: int, close: bool) -> "Table":
    """The table's first columns."""
    from rich.box import SIMPLE
    from rich.table import Table

    grid = Table(box=SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=close, show_edge=not close)
    if left_out := titles[count:]:
        grid.caption, grid.caption_justify = f"no room for: {', '.join(left_out)}", "left"
    for number, title in enumerate(titles[:count]):
        grid.add_column(_on_two_lines(title), justify="right" if number else "left", no_wrap=True)
    for player, values in zip(players, body, strict=True):
        grid.add_row(*values[:count], style="bold" if player.best else "")
    return grid


def _fits(grid: "Table", width: int) -> bool:
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=10 * width)
    return Measurement.get(console, console.options, grid).maximum <= width


def _on_two_lines(title: str) -> str:
    return title.replace(" ", "\n") if " " in title else f"\n{title}"


def cells(players: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The titles of a table of players, and its rows."""
    columns = [column for column in COLUMNS if any(column[0] in row.metrics for row in players)]
    body = [
        [
            row.name + (" (best)" if row.best else ""),
            *(form.format(row.metrics[key]) if key in row.metrics else "–" for key, _, form in columns),
        ]
        for row in players
    ]
    return ["player", *(title for _, title, _ in columns)], body


def verdict(run: RunDir) -> str:
    """One honest sentence about whether it helped."""
    last = promotions(run)
    if not last:
        return "No iteration has been judged yet."
    best = last[-1]["best"]
    metric = METRIC_NAMES[last[-1]["metric"]]
    recipe = read_json(run.recipe)
    errors = recipe["selfplay"]["select"]["min_standard_errors"]
    what = "Self-play"
    if is_control(run):
        what = "More supervised fine-tuning"
    elif recipe["data"]["columns"].get("rejected"):
        what = "Training on preferences"
    noise = f"{errors:g} standard error{'' if errors == 1 else 's'} of the paired difference"
    fallen = last[-1].get("collapse")
    ending = (
        f" Iteration {last[-1]['iteration']} collapsed and ended the run: {fallen}. Lower "
        "train.learning_rate in another --run-dir."
        if fallen
        else ""
    )
    if best == START:
        if any(item.get("better") for item in last):
            return f"{what} did not help: what was ahead of the starting player's {metric} had collapsed." + ending
        if last[0]["metric"] == "task_score" and not any(
            item["mean_difference"] or item["standard_error"] for item in last
        ):
            return _alike(run, what, last) + ending
        closest = max(last, key=lambda item: float(item["mean_difference"]))
        by = f"{format_lead(last[0]['metric'], closest['mean_difference'])} ± {closest['standard_error']:.3f}"
        one = len(last) == 1
        who = "iteration 0 did not beat" if one else f"none of {len(last)} iterations beat"
        gap = f"the difference: {by}" if one else f"the closest: iteration {closest['iteration']}, {by}"
        return (
            f"{what} did not help: {who} the starting player's {metric} by more than {noise} ({gap}). The starting "
            "player stays the best." + ending
        )
    scored = last[-1]["metric"] == "task_score"
    caveat = "" if scored else LIKELIHOOD_ONLY
    won = next(item for item in last if item["iteration"] == best)
    start, new = (read_json(run.eval_metrics(i))[last[-1]["metric"]] for i in (START, best))
    against = "the start" if won["against"] == START else f"iteration {won['against']}"
    did = "helped" if scored else "made the real held-out answers likelier"
    return (
        f"{what} {did}: {metric} {start:.3f} at the start, {new:.3f} after iteration {best}, the best player. It "
        f"is ahead of {against} by {won['mean_difference']:.3f} ± {won['standard_error']:.3f} (standard error of the paired "
        "difference on the held-out prompts of this one run; another seed may differ)." + caveat + ending
    )


def format_lead(metric: str, lead: float) -> str:
    """By how much a player is ahead: of a score with its sign, of NLL, where less is better, as what it is."""
    if metric == "task_score":
        return f"{lead:+z.3f}"
    return f"{'lower' if lead >= 0 else 'higher'} by {abs(lead):.3f}"


def _alike(run: RunDir, what: str, judged: list[dict[str, Any]]) -> str:
    """The verdict where each answer was marked as the start's answer to the same prompt was."""
    start, end = (read_json(run.eval_metrics(one)) for one in (START, judged[-1]["iteration"]))
    return (
        f"{what} did not help as far as the scorer can tell: on every prompt it marked all players alike (task score "
        f"{start['task_score']:.3f}). Held-out NLL: {start['heldout_nll']:.3f} at the start, {end['heldout_nll']:.3f} "
        f"after iteration {judged[-1]['iteration']}. Look at the answers; another evaluate.scorer may tell more. The "
        "starting player stays the best."
    )


def outcome(run: RunDir) -> str | None:
    """The verdict in a few words, for a list; None before the first iteration has been judged."""
    last = promotions(run)
    if not last:
        return None
    if last[-1]["best"] == START:
        return "not better than the start"
    metric = last[-1]["metric"]
    start, new = (read_json(run.eval_metrics(one))[metric] for one in (START, last[-1]["best"]))
    return f"{METRIC_NAMES[metric]} {start:.3f} → {new:.3f}"


def start_from(run: RunDir) -> str | None:
    """The run that this one has taken its start from, if it has."""
    made = None
    with contextlib.suppress(RunError):  # damaged, or not there yet: whoever needs it will say so
        made = read_json(run.provenance)
    return made.get("start_from") if isinstance(made, dict) else None


def is_control(run: RunDir) -> bool:
    """Whether a run fine-tunes on the real responses alone, and plays no game."""
    return bool(read_json(run.recipe)["objective"]["name"] == CONTROL)


def promotions(run: RunDir) -> list[dict[str, Any]]:
    """How the players of the iterations were judged, as far as they were."""
    found: list[dict[str, Any]] = []
    for iteration in count(0):
        if not run.marker("promote", iteration).exists():
            return found
        found.append({"iteration": iteration, **run.metadata("promote", iteration)})
    return found


def side_by_side(run: RunDir, prompts: int) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """For some held-out prompts: the prompt, the real response, and the answers of the start and of the best player.

    Where the start is the best, the last player stands beside it. Prompts on which the two differ come first.
    """
    players = rows(run)
    if not players:
        return []
    other = next((row for row in players[1:] if row.best), players[-1])
    names = {START: player_name(START), other.iteration: other.name}
    answers = {iteration: _by_id(run.heldout_greedy(iteration)) for iteration in names}
    examples = list(_heldout(run))
    same = [len({given[example["id"]]["text"] for given in answers.values()}) == 1 for example in examples]
    order = sorted(range(len(examples)), key=lambda index: (same[index], index))
    return [
        (
            examples[index]["messages"][-1]["content"],
            examples[index]["response"],
            [(names[iteration], text_of(given[examples[index]["id"]])) for iteration, given in answers.items()],
        )
        for index in order[:prompts]
    ]


def text_of(answer: dict[str, Any]) -> str:
    """What a player answered to a held-out prompt, for people."""
    return display_text(answer["text"], answer["finished"], len(answer["token_ids"]))


def display_text(text: str, finished: bool, tokens: int) -> str:
    """An answer for people, who cannot see whether it ended or was cut off."""
    return text if finished else f"{text} … (cut off at {tokens} tokens)"


def system_prompt(run: RunDir) -> str | None:
    """That of the first held-out example, if it has one, and is still there."""
    if not run.examples("heldout").exists():
        return None
    first = next(_heldout(run))["messages"][0]
    return str(first["content"]) if first["role"] == "system" else None


def _heldout(run: RunDir) -> Iterator[dict[str, Any]]:
    return read_json_lines(run.examples("heldout"))


def _by_id(path: Any) -> dict[str, dict[str, Any]]:
    return {answer["id"]: answer for answer in read_json_lines(path)}
