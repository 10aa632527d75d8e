"""Write the results of a replication: paired comparisons with intervals, as Markdown and figures.

Reads run folders only; a run that has not ended is left out. A run is measured by its last player, and by its selected
player: one half of the held-out prompts selects the player by the run's own rule (without the guard), the other half
measures it, and the halves then change places. So the selection cannot bias the result.
"""

import math
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.report.compare import player_values
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json, read_json_lines
from spinlm.utils.statistics import significantly_better

if TYPE_CHECKING:
    from play import Plan

T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5% for 1 … 10 degrees of freedom."""

PACKAGES = ("torch", "transformers", "peft")

COLUMNS = (
    ("task_score", "task score", "{:.3f}"),
    ("sampled_task_score", "task score, sampled", "{:.3f}"),
    ("heldout_nll", "held-out NLL", "{:.3f}"),
    ("pair_accuracy", "pair accuracy", "{:.2f}"),
    ("truncated_rate", "truncated", "{:.1%}"),
    ("repeated_4grams", "repeated 4-grams", "{:.1%}"),
    ("probe_auc", "probe AUC", "{:.2f}"),
    ("kl_from_start", "KL from start", "{:+.3f}"),
)
"""Columns of the table of players: metric, title, number format."""


@dataclass(frozen=True)
class Run:
    """A run folder, complete or not."""

    folder: RunDir

    @cached_property
    def players(self) -> list[int]:
        """The evaluated players, the start first."""
        return list(takewhile(lambda number: self.folder.marker("evaluate", number).exists(), count(START)))

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return read_recipe(self.folder)

    @property
    def ended(self) -> bool:
        """Whether the run has played all iterations, or stopped early by its own rule."""
        if not self.players or not (marker := self.folder.marker("promote", self.players[-1])).exists():
            return False
        return not read_json(marker)["go_on"] or len(self.players) == 1 + self.recipe["selfplay"]["iterations"]

    def steps(self, player: int) -> int:
        """Return the optimizer steps from the start to a player."""
        return sum(read_json(self.folder.marker("train", number))["steps"] for number in range(player + 1))

    def metrics(self, player: int) -> dict[str, Any]:
        return dict(read_json(self.folder.eval_metrics(player)))

    def values(self, player: int, metric: str) -> dict[str, float]:
        """Return the task score or NLL on each held-out prompt."""
        return player_values(self.folder, player, metric)

    @cached_property
    def selected_score(self) -> float:
        """Mean task score of the selected player: one half of the prompts selects it, the other half measures it."""
        scores = {player: self.values(player, "task_score") for player in self.players}
        prompts = sorted(scores[START])
        halves = prompts[::2], prompts[1::2]
        threshold = self.recipe["selfplay"]["select"]["min_standard_errors"]
        measured = []
        for select_on, measure_on in (halves, halves[::-1]):
            best = START
            for player in self.players[1:]:
                if significantly_better(
                    [scores[player][prompt] - scores[best][prompt] for prompt in select_on], threshold
                ):
                    best = player
            measured += [scores[best][prompt] for prompt in measure_on]
        return statistics.fmean(measured)


@dataclass(frozen=True)
class Difference:
    """Mean difference over seeds. The interval is Student's t over the differences of the seeds."""

    seeds: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval; infinite for one seed."""
        number = len(self.seeds)
        if number < 2:
            return math.inf
        return T_95[min(number - 1, len(T_95) - 1)] * statistics.stdev(self.seeds) / math.sqrt(number)

    def __str__(self) -> str:
        if not self.seeds:
            return "–"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if len(self.seeds) > 1 else "")


def ended_runs(plan: "Plan", folder: Path, dataset: str, arm: str) -> dict[int, Run]:
    """Return the runs of an arm that have ended, by seed."""
    runs = {seed: Run(RunDir(folder / dataset / f"seed-{seed}" / arm)) for seed in plan.seeds}
    return {seed: run for seed, run in runs.items() if run.ended}


def write_report(plan: "Plan", folder: Path, target: Path, jobs: int) -> str:
    """Write the report and return its text."""
    lines = [f"# {plan.title}", "", *_setup(plan, folder, jobs), ""]
    target.parent.mkdir(parents=True, exist_ok=True)
    for dataset in plan.datasets:
        figure = draw(plan, folder, dataset, target.with_name(f"{target.stem}-{dataset}.svg"))
        image = [f"![{dataset}: task score and held-out NLL by iteration]({figure.name})", ""] if figure else []
        lines += [f"## {dataset}", "", *image]
        lines += [*_players(plan, folder, dataset), "", *_comparisons(plan, folder, dataset), ""]
    text = "\n".join(lines)
    target.write_text(text, encoding="utf-8")
    return text


def _setup(plan: "Plan", folder: Path, jobs: int) -> list[str]:
    """Describe when and on what the runs were made, and how to read the tables."""
    runs = [
        run
        for dataset in plan.datasets
        for arm in plan.arms
        for run in ended_runs(plan, folder, dataset, arm.name).values()
    ]
    provenance = [read_json(run.folder.provenance) for run in runs]
    days = sorted({item["started"][:10] for item in provenance})
    packages = sorted({f"{name} {item['packages'][name]}" for item in provenance for name in PACKAGES})
    commits, pythons, devices = (
        sorted({str(item[key]) for item in provenance}) for key in ("commit", "python", "device")
    )
    log = folder / "times.jsonl"
    times: dict[str, float] = {}  # the longest call of each run: later calls found it complete
    for row in read_json_lines(log) if log.exists() else ():
        times[row["run"]] = max(row["seconds"], times.get(row["run"], 0))
    return [
        f"Dates: {', '.join(days)}. spinlm commit: {', '.join(commits)}. Processor: {processor()}. Device of a run: "
        f"{' and '.join(devices)}. Parallel runs: {jobs}. Python {', '.join(pythons)}, {', '.join(packages)}. Total "
        f"time of the runs: {sum(times.values()) / 60:.0f} minutes. Seeds: {', '.join(map(str, plan.seeds))}. A seed "
        "decides the sampled data, the supervised fine-tuning and every random number.",
        "",
        "Differences are paired, on the same held-out prompts. Brackets: 95% interval of Student's t over the seeds. "
        "The selected player is selected by the run's own rule (without the guard) on one half of the prompts and "
        "measured on the other half, both ways. Steps count the optimizer steps since the start. Self-play has fewer "
        "steps than its control because a response that equals the real one makes no pair. The task score is that of "
        "greedy responses; sampled responses have temperature 1.",
    ]


def processor() -> str:
    """Return the name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = {line.split(":")[1].strip() for line in lines if "model name" in line}
    return ", ".join(names) or platform.processor() or platform.machine()


def _players(plan: "Plan", folder: Path, dataset: str) -> Iterator[str]:
    """Yield a table with a row for each arm and player: means over the seeds."""
    titles = ["arm", "player", "seeds", "steps", *(title for _, title, _ in COLUMNS)]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for number, arm in enumerate(plan.arms):
        runs = ended_runs(plan, folder, dataset, arm.name)
        for player in sorted({player for run in runs.values() for player in run.players}):
            if player == START and number > 0 and arm.start == "shared":
                continue
            with_player = [run for run in runs.values() if player in run.players]
            metrics = [run.metrics(player) for run in with_player]
            name = "all" if player == START and arm.start == "shared" else arm.name
            steps = statistics.fmean(run.steps(player) for run in with_player)
            cells = [name, player_name(player), str(len(metrics)), f"{steps:.1f}"]
            cells += [_mean(metrics, key, form) for key, _, form in COLUMNS]
            yield f"| {' | '.join(cells)} |"


def _mean(metrics: list[dict[str, Any]], key: str, form: str) -> str:
    values = [values[key] for values in metrics if key in values]
    return form.format(statistics.fmean(values)) if values else "–"


def _comparisons(plan: "Plan", folder: Path, dataset: str) -> Iterator[str]:
    """Yield a table with a row for each question: the difference between two arms from the same starts."""
    yield "| question | seeds | task score, last player | each seed | task score, selected player | NLL, last player |"
    yield "|---|---|---|---|---|---|"
    for question, arm, baseline in plan.questions:
        runs = ended_runs(plan, folder, dataset, arm)
        baseline_runs = runs if baseline == "start" else ended_runs(plan, folder, dataset, baseline)
        seeds = sorted(runs.keys() & baseline_runs.keys())
        if not seeds:
            continue
        score, nll, selected = [], [], []
        for seed in seeds:
            run, other = runs[seed], baseline_runs[seed]
            player, baseline_player = run.players[-1], START if baseline == "start" else other.players[-1]
            score.append(_paired(run.values(player, "task_score"), other.values(baseline_player, "task_score")))
            nll.append(_paired(run.values(player, "heldout_nll"), other.values(baseline_player, "heldout_nll")))
            start = statistics.fmean(other.values(START, "task_score").values())
            selected.append(run.selected_score - (start if baseline == "start" else other.selected_score))
        each = ", ".join(f"{value:+.3f}" for value in score)
        cells = (str(Difference(score)), each, str(Difference(selected)), str(Difference(nll)))
        yield f"| {question} | {len(seeds)} | " + " | ".join(cells) + " |"


def draw(plan: "Plan", folder: Path, dataset: str, target: Path) -> Path | None:
    """Draw task score and held-out NLL by iteration: a line for the mean over an arm's seeds, a dot for each seed."""
    try:
        from matplotlib import colormaps, rcParams
        from matplotlib.figure import Figure
    except ImportError:
        print("Figures need matplotlib: pip install -e '.[bench]'", flush=True)
        return None
    rcParams["svg.hashsalt"] = "spinlm"  # equal numbers give an equal file
    figure = Figure(figsize=(12, 4), layout="constrained")
    arms = [arm for arm in plan.arms if ended_runs(plan, folder, dataset, arm.name)]
    for axes, metric, title in zip(
        figure.subplots(1, 2),
        ("task_score", "heldout_nll"),
        ("task score", "held-out NLL, nats per token"),
        strict=True,
    ):
        for number, arm in enumerate(arms):
            color = colormaps["tab20"](number)
            curves = [
                [run.metrics(player)[metric] for player in run.players]
                for run in ended_runs(plan, folder, dataset, arm.name).values()
                if all(run.metrics(player).get(metric) is not None for player in run.players)
            ]
            longest = max(map(len, curves), default=0)
            means = [statistics.fmean(curve[at] for curve in curves if len(curve) > at) for at in range(longest)]
            axes.plot(range(longest), means, color=color, label=arm.name)
            for curve in curves:
                axes.plot(range(len(curve)), curve, ".", color=color, markersize=4, alpha=0.6)
        axes.set(title=title, xlabel="iterations played (0 is the start)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.savefig(target, metadata={"Date": None})
    return target


def _paired(values: dict[str, float], baseline: dict[str, float]) -> float:
    """Return the mean difference over shared held-out prompts; runs with different starts may share none."""
    shared = values.keys() & baseline.keys()
    if not shared:
        return statistics.fmean(values.values()) - statistics.fmean(baseline.values())
    return statistics.fmean(values[prompt] - baseline[prompt] for prompt in shared)
