"""The charts of a report as plotly.js traces and layouts. page.js sets the colors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spinlm.report.run_data import RunData
from spinlm.rundir.stage_graph import STAGES, START, START_STAGES, player_name

MAX_POINTS = 1500
"""Longer curves are thinned to at most this many points."""

MAX_MARKERS = 30
"""Curves with at most this many points show a marker at each."""

Trace = dict[str, Any]

METRIC_CHARTS = (
    (
        "task_score",
        "Task score",
        "Higher is better. Bars: 95% intervals over held-out prompts. Different seeds vary more.",
        {"task_score": "greedy", "sampled_task_score": "sampled"},
    ),
    (
        "heldout_nll",
        "Held-out NLL",
        "NLL of the real held-out responses, nats per token. Lower is better. A rise is an early sign of collapse.",
        {"heldout_nll": "NLL"},
    ),
    (
        "real_vs_generated",
        "Real vs generated",
        "Probe AUC: a linear probe separates real responses from the player's own samples (0.5 = "
        "indistinguishable). Pair accuracy: share of held-out pairs with a positive margin (0.5 = no preference).",
        {"probe_auc": "probe AUC", "pair_accuracy": "pair accuracy"},
    ),
    (
        "kl_from_start",
        "KL from start",
        "Estimated KL divergence from the start, nats per token of the player's own samples.",
        {"kl_from_start": "KL"},
    ),
    (
        "collapse",
        "Greedy responses",
        "Shares of responses that equal the real one, of truncated responses and of repeated 4-grams. A jump of the "
        "last two is a sign of collapse.",
        {"identical_rate": "identical", "truncated_rate": "truncated", "repeated_4grams": "repeated 4-grams"},
    ),
)
"""Charts of the players' metrics: name, title, caption, and a label for each metric."""


@dataclass(frozen=True)
class Chart:
    """One chart with its caption."""

    name: str
    title: str
    caption: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)


def charts(run: RunData) -> dict[str, list[Chart]]:
    """Return the charts that have data, by section of the page."""
    sections = {"players": _player_charts(run), "training": _training_charts(run), "time": [_time_chart(run)]}
    return {section: [chart for chart in charts if chart.traces] for section, charts in sections.items()}


def _player_charts(run: RunData) -> list[Chart]:
    metric_charts = [
        Chart(name, title, caption, [trace for key, label in labels.items() for trace in _metric(run, key, label)])
        for name, title, caption, labels in METRIC_CHARTS
    ]
    lengths = _metric(run, "mean_tokens", "player, greedy")
    opponents = [(player_name(iteration), recorded["mean_tokens"]) for iteration, recorded in run.opponents]
    if opponents:
        lengths.append(_line("opponent, sampled", *zip(*opponents, strict=True)))
    return [
        *metric_charts,
        Chart(
            "margins",
            "Margins on held-out pairs",
            "Log-probability gained by the real response minus that gained by the opponent's response, in nats. One "
            "point per pair.",
            _distributions(run),
            {"shapes": [_level(0.0)], "showlegend": False},
        ),
        Chart(
            "lengths",
            "Response length",
            "Mean number of tokens. Dotted line: real held-out responses.",
            lengths,
            {"shapes": [_level(run.real_tokens)]} if run.real_tokens else {},
        ),
    ]


def _training_charts(run: RunData) -> list[Chart]:
    measures = (
        ("loss", "Loss", f"The training objective.{_first_loss(run.recipe)}"),
        ("margin", "Margin", "Mean over the pairs of a step whose responses differ, in nats."),
        ("accuracy", "Accuracy", "Share of these pairs with a positive margin."),
        ("real_nll", "NLL of the real responses", "On training prompts, nats per token."),
        ("grad_norm", "Gradient norm", "Before clipping to train.max_grad_norm."),
    )
    return [
        Chart(f"step_{key}", title, f"{caption} By optimizer step.", _curves(run, key))
        for key, title, caption in measures
    ]


def _first_loss(recipe: dict[str, Any]) -> str:
    """State SPIN's loss at the first step, where player and opponent are equal."""
    objective = recipe["objective"]
    if objective["name"] != "spin" or objective["link"] != "logistic":
        return ""
    term = ""
    if objective["nll_weight"]:
        term = f" × the share of rows with a contrast, plus {objective['nll_weight']:g} × the NLL of the real responses"
    first = "Iteration 0" if objective["reference_mix"] < 1 else "An iteration"
    return f" {first} begins at ln 2 = 0.693{term}."


def _time_chart(run: RunData) -> Chart:
    traces = []
    for stage in dict.fromkeys((*START_STAGES, *STAGES)):
        minutes = {name: (stages[stage].seconds or 0.0) / 60 for name, stages in run.times if stage in stages}
        if minutes:
            traces.append({"type": "bar", "name": stage, "x": list(minutes), "y": list(minutes.values())})
    layout = {"barmode": "stack", "yaxis": {"title": {"text": "minutes"}}}
    return Chart("time", "Time per stage", "Wall-clock time.", traces, layout)


def _metric(run: RunData, key: str, name: str) -> list[Trace]:
    """Return a metric of every player that has it, with its interval."""
    players = [player for player in run.players if key in player.metrics]
    if not players:
        return []
    values = [player.metrics[key] for player in players]
    trace = _line(name, [player.name for player in players], values)
    intervals = [player.metrics["intervals"].get(key) for player in players]
    if all(intervals):
        above = [high - value for value, (_, high) in zip(values, intervals, strict=True)]
        below = [value - low for value, (low, _) in zip(values, intervals, strict=True)]
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return [trace]


def _distributions(run: RunData) -> list[Trace]:
    """Return the margins of each player as a violin."""
    traces = []
    for player in run.players:
        responses = run.responses[player.iteration].values()
        margins = [margin for response in responses for margin in response.get("margins", ())]
        if player.iteration != START and margins:
            style = {"type": "violin", "points": "all", "pointpos": 0, "jitter": 0.4, "meanline": {"visible": True}}
            traces.append({**style, "name": player.name, "color": _color(player.iteration), "y": _thin(margins)})
    return traces


def _curves(run: RunData, key: str) -> list[Trace]:
    """Return a measure of the optimizer steps, one curve per training stage."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for line in run.steps:
        if key in line:
            curves.setdefault(line["iteration"], []).append((line["step"], line[key]))
    traces = []
    for iteration, points in curves.items():
        steps, values = zip(*_thin(points), strict=True)
        name = "sft" if iteration == START else player_name(iteration)
        traces.append(_line(name, steps, values) | {"color": _color(iteration)})
    return traces


def _color(iteration: int) -> int:
    """Return the number, from 1, of an iteration's color in the page's palette."""
    return iteration - START + 1


def _line(name: str, x: Sequence[Any], y: Sequence[float]) -> Trace:
    mode = "lines+markers" if len(x) <= MAX_MARKERS else "lines"
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y)}


def _level(value: float) -> dict[str, Any]:
    """Return a dotted horizontal line."""
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": {"dash": "dot"}}


def _thin(points: list[Any]) -> list[Any]:
    return points[:: -(-len(points) // MAX_POINTS)]
