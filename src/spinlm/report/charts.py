"""The charts of a report, as plotly.js takes them: traces and a layout. Colours are the page's, see page.js."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spinlm.report.run_data import RunData
from spinlm.rundir.stage_graph import STAGES, START, START_STAGES, player_name

POINTS = 1500
"""Most points of a curve: of longer ones every so many are shown."""

FEW = 30
"""Points of a curve that are still shown as such."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One chart: what it shows, and how to read it."""

    name: str
    section: str  # players, training or time
    title: str
    note: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)

    def traces_and_layout(self) -> dict[str, Any]:
        return {"traces": self.traces, "layout": self.layout}


def charts(facts: RunData) -> list[Chart]:
    """Those that a run has something for."""
    return [chart for chart in (*_players(facts), *_training(facts), _time(facts)) if chart.traces]


def _players(facts: RunData) -> list[Chart]:
    lengths = _measured(facts, "mean_tokens", "its answers, greedy")
    opponents = [(player_name(iteration), noted["mean_tokens"]) for iteration, noted in facts.opponents]
    if opponents:
        lengths.append(_line("its opponent's, sampled", *zip(*opponents, strict=True)))
    return [
        Chart(
            "task_score",
            "players",
            "Task score",
            "Higher is better. Bars: 95% intervals over held-out prompts; seeds differ by more.",
            _measured(facts, "task_score", "greedy") + _measured(facts, "sampled_task_score", "sampled"),
        ),
        Chart(
            "heldout_nll",
            "players",
            "Held-out NLL",
            "Nats per token of the real held-out responses. Lower is likelier; a collapse begins with a rise.",
            _measured(facts, "heldout_nll", "NLL"),
        ),
        Chart(
            "apart",
            "players",
            "Told apart",
            "How well real responses can be told from synthetic ones: 1 is always, 0.5 is guessing. By a linear probe, "
            "from the player's own samples (AUC); by the player itself, from its opponent's (share of pairs).",
            _measured(facts, "probe_auc", "real from its own (AUC)")
            + _measured(facts, "pair_accuracy", "real from the opponent's"),
            {"shapes": [_level(0.5)]},
        ),
        Chart(
            "margins",
            "players",
            "Margins on held-out pairs",
            "How much further the player has moved towards the real response than towards its opponent's, in nats. "
            "One point for each pair.",
            _distributions(facts),
            {"shapes": [_level(0.0)], "showlegend": False},
        ),
        Chart(
            "lengths",
            "players",
            "Length of responses",
            "Mean number of tokens. The dotted line is that of the real held-out responses.",
            lengths,
            {"shapes": [_level(facts.real_tokens)]} if facts.real_tokens else {},
        ),
        Chart(
            "kl_from_start",
            "players",
            "Drift from the start",
            "Estimated KL divergence from the starting player, nats per token of its own samples.",
            _measured(facts, "kl_from_start", "kl_from_start"),
        ),
        Chart(
            "signs",
            "players",
            "Signs of trouble",
            "Shares of its greedy answers that are the real one word for word, do not end, or repeat themselves.",
            [
                *_measured(facts, "identical_rate", "identical"),
                *_measured(facts, "truncated_rate", "unfinished"),
                *_measured(facts, "repeated_4grams", "repeated"),
            ],
        ),
    ]


def _training(facts: RunData) -> list[Chart]:
    what = (
        ("loss", "Loss", f"What is minimised.{_first_loss(facts.recipe)}"),
        ("margin", "Margin", "Mean over a step's pairs, in nats."),
        ("accuracy", "Accuracy", "Share of a step's pairs with a positive margin."),
        ("real_nll", "NLL of the real responses", "Nats per token, on the prompts that are trained on."),
        ("grad_norm", "Norm of the gradient", "Before it is scaled down to train.max_grad_norm."),
    )
    return [
        Chart(f"step_{key}", "training", title, f"{note} By optimiser step.", _curves(facts, key))
        for key, title, note in what
    ]


def _first_loss(recipe: dict[str, Any]) -> str:
    """Where the loss of SPIN begins, as long as both players are the same."""
    objective = recipe["objective"]
    if objective["name"] != "spin" or objective["link"] != "logistic":
        return ""
    term = f", and {objective['nll_weight']:g} × the NLL of the real responses" if objective["nll_weight"] else ""
    return f" At the first step of an iteration it is ln 2 = 0.693{term}."


def _time(facts: RunData) -> Chart:
    traces = []
    for stage in dict.fromkeys((*START_STAGES, *STAGES)):
        taken = {name: stages[stage] for name, stages in facts.times if stage in stages}
        own = {name: one.seconds for name, one in taken.items() if not one.elsewhere}
        spent = {name: seconds / 60 for name, seconds in own.items() if seconds is not None}
        if spent:
            traces.append({"type": "bar", "name": stage, "x": list(spent), "y": list(spent.values())})
    layout = {"barmode": "stack", "yaxis": {"title": {"text": "minutes"}}}
    return Chart("time", "time", "Time of each stage", "Wall-clock time.", traces, layout)


def _measured(facts: RunData, key: str, name: str) -> list[Trace]:
    """A measure of every player that has it, with its interval."""
    rows = [row for row in facts.players if key in row.metrics]
    if not rows:
        return []
    values = [row.metrics[key] for row in rows]
    trace = _line(name, [row.name for row in rows], values)
    ends = [row.metrics["intervals"].get(key) for row in rows]
    if all(ends):
        above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
        below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return [trace]


def _distributions(facts: RunData) -> list[Trace]:
    traces = []
    for row in facts.players:
        answers = facts.answers[row.iteration].values()
        margins = [margin for answer in answers for margin in answer.get("margins", ())]
        if row.iteration != START and margins:
            style = {"type": "violin", "points": "all", "pointpos": 0, "jitter": 0.4, "meanline": {"visible": True}}
            traces.append({**style, "name": row.name, "colour": _colour(row.iteration), "y": _thinned(margins)})
    return traces


def _curves(facts: RunData, key: str) -> list[Trace]:
    """A measure of the steps, a curve for each stage that trains."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for line in facts.steps:
        if key in line:
            curves.setdefault(line["iteration"], []).append((line["step"], line[key]))
    found = []
    for iteration, points in curves.items():
        steps, values = zip(*_thinned(points), strict=True)
        name = "warm-up" if iteration == START else player_name(iteration)
        found.append(_line(name, steps, values) | {"colour": _colour(iteration)})
    return found


def _colour(iteration: int) -> int:
    """The number of the page's colour, from 1, for whatever is of one iteration."""
    return iteration - START + 1


def _line(name: str, x: Sequence[Any], y: Sequence[float]) -> Trace:
    mode = "lines+markers" if len(x) <= FEW else "lines"
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y)}


def _level(value: float) -> dict[str, Any]:
    """A line across."""
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": {"dash": "dot"}}


def _thinned(points: list[Any]) -> list[Any]:
    return points[:: -(-len(points) // POINTS)]
