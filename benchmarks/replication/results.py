"""What a replication found: paired comparisons with intervals, as Markdown and pictures.

Everything is read from the run folders; a run that has not ended is left out. A run's value on a measure is that of
its last player, or of its selected one: chosen by a run's rule (ahead by so many standard errors; the guard aside) on
one half of the held-out prompts and measured on the other half, both ways round, so that the choice cannot flatter the
result.
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


@dataclass(frozen=True)
class Run:
    """A run folder, complete or not."""

    run: RunDir

    @cached_property
    def players(self) -> list[int]:
        """The players that were evaluated, the start first."""
        return list(takewhile(lambda number: self.run.marker("evaluate", number).exists(), count(START)))

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return read_recipe(self.run)

    @property
    def ended(self) -> bool:
        """Whether it was played to its end: all iterations, or until it stopped by itself."""
        if not self.players or not (marker := self.run.marker("promote", self.players[-1])).exists():
            return False
        return not read_json(marker)["go_on"] or len(self.players) == 1 + self.recipe["selfplay"]["iterations"]

    def steps(self, player: int) -> int:
        """Optimiser steps from the start to a player."""
        return sum(read_json(self.run.marker("train", number))["steps"] for number in range(player + 1))

    def metrics(self, player: int) -> dict[str, Any]:
        return dict(read_json(self.run.eval_metrics(player)))

    def values(self, player: int, measure: str) -> dict[str, float]:
        """Task score or NLL of each held-out prompt."""
        return {row["id"]: float(row[measure]) for row in read_json_lines(self.run.heldout_greedy(player))}

    @cached_property
    def selected(self) -> float:
        """Mean task score where the player is chosen on the other half of the prompts."""
        scores = {player: self.values(player, "task_score") for player in self.players}
        prompts = sorted(scores[START])
        halves = prompts[::2], prompts[1::2]
        errors = self.recipe["selfplay"]["select"]["min_standard_errors"]
        found = []
        for chosen_on, measured_on in (halves, halves[::-1]):
            best = START
            for player in self.players[1:]:
                if significantly_better(
                    [scores[player][prompt] - scores[best][prompt] for prompt in chosen_on], errors
                ):
                    best = player
            found += [scores[best][prompt] for prompt in measured_on]
        return statistics.fmean(found)


@dataclass(frozen=True)
class Difference:
    """Mean difference over seeds; the interval is Student's t over the seeds' own differences."""

    each: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    @property
    def half(self) -> float:
        """Half the width of the 95% interval; infinite for one seed."""
        count = len(self.each)
        if count < 2:
            return math.inf
        return T_95[min(count - 1, len(T_95) - 1)] * statistics.stdev(self.each) / math.sqrt(count)

    def __str__(self) -> str:
        if not self.each:
            return "–"
        interval = f" [{self.mean - self.half:+.3f}, {self.mean + self.half:+.3f}]" if len(self.each) > 1 else ""
        return f"{self.mean:+.3f}{interval}"


def find(plan: "Plan", folder: Path, dataset: str, arm: str) -> dict[int, Run]:
    """The runs of an arm by seed, as far as they have ended."""
    runs = {seed: Run(RunDir(folder / dataset / f"seed-{seed}" / arm)) for seed in plan.seeds}
    return {seed: run for seed, run in runs.items() if run.ended}


def write_report(plan: "Plan", folder: Path, target: Path, jobs: int) -> str:
    """Write the report, and return it."""
    lines = [f"# {plan.title}", "", *_made_how(plan, folder, jobs), ""]
    target.parent.mkdir(parents=True, exist_ok=True)
    for dataset in plan.datasets:
        picture = draw(plan, folder, dataset, target.with_name(f"{target.stem}-{dataset}.svg"))
        shown = [f"![{dataset}: task score and held-out NLL by iteration]({picture.name})", ""] if picture else []
        lines += [f"## {dataset}", "", *shown]
        lines += [*_players(plan, folder, dataset), "", *_answers(plan, folder, dataset), ""]
    text = "\n".join(lines)
    target.write_text(text, encoding="utf-8")
    return text


def _made_how(plan: "Plan", folder: Path, jobs: int) -> list[str]:
    ended = [
        one for dataset in plan.datasets for arm in plan.arms for one in find(plan, folder, dataset, arm.name).values()
    ]
    made = [read_json(one.run.provenance) for one in ended]
    days = sorted({one["started"][:10] for one in made})
    packages = sorted({f"{name} {one['packages'][name]}" for one in made for name in PACKAGES})
    commits, pythons, devices = (sorted({str(one[key]) for one in made}) for key in ("commit", "python", "device"))
    log = folder / "times.jsonl"
    times: dict[str, float] = {}  # of each run the longest call: others found it done
    for row in read_json_lines(log) if log.exists() else ():
        times[row["run"]] = max(row["seconds"], times.get(row["run"], 0))
    return [
        f"Played on {', '.join(days)} at commit {', '.join(commits)} of spinlm, on {processor()}, "
        f"{' and '.join(devices)} each, {jobs} runs at a time; Python {', '.join(pythons)}, {', '.join(packages)}. The "
        f"runs took {sum(times.values()) / 60:.0f} minutes, one after the other. Seeds "
        f"{', '.join(map(str, plan.seeds))} decide the data drawn, the warm-up and every random number.",
        "",
        "Differences are paired, on the same held-out prompts; in brackets the 95% interval of Student's t over the "
        "seeds. The selected player is chosen by a run's own rule (the guard aside) on one half of the prompts and "
        "measured on the other, both ways round. Steps are the optimiser's since the start: self-play has fewer than "
        "its control, as a response that equals the real one makes no pair. The task score is that of greedy answers; "
        "sampled, that of answers drawn at temperature 1.",
    ]


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = {line.split(":")[1].strip() for line in lines if "model name" in line}
    return ", ".join(names) or platform.processor() or platform.machine()


def _players(plan: "Plan", folder: Path, dataset: str) -> Iterator[str]:
    """A row for each arm and player: means over the seeds."""
    yield (
        "| arm | player | seeds | steps | task score | sampled | NLL | pair accuracy | unfinished | repeated | AUC "
        "| drift |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for number, arm in enumerate(plan.arms):
        runs = find(plan, folder, dataset, arm.name)
        for player in sorted({player for run in runs.values() for player in run.players}):
            if player == START and number > 0 and arm.start == "shared":
                continue
            those = [run for run in runs.values() if player in run.players]
            found = [run.metrics(player) for run in those]
            cells = [
                f"{statistics.fmean(run.steps(player) for run in those):.1f}",
                _mean(found, "task_score", "{:.3f}"),
                _mean(found, "sampled_task_score", "{:.3f}"),
                _mean(found, "heldout_nll", "{:.3f}"),
                _mean(found, "pair_accuracy", "{:.2f}"),
                _mean(found, "truncated_rate", "{:.1%}"),
                _mean(found, "repeated_4grams", "{:.1%}"),
                _mean(found, "probe_auc", "{:.2f}"),
                _mean(found, "kl_from_start", "{:+.3f}"),
            ]
            name = "all" if player == START and arm.start == "shared" else arm.name
            yield f"| {name} | {player_name(player)} | {len(found)} | " + " | ".join(cells) + " |"


def _mean(found: list[dict[str, Any]], key: str, form: str) -> str:
    values = [metrics[key] for metrics in found if key in metrics]
    return form.format(statistics.fmean(values)) if values else "–"


def _answers(plan: "Plan", folder: Path, dataset: str) -> Iterator[str]:
    """A row for each question: differences between two arms, from the same starts, on the same held-out prompts."""
    yield "| question | seeds | task score, last player | each seed | task score, selected player | NLL, last player |"
    yield "|---|---|---|---|---|---|"
    for ask, arm, against in plan.questions:
        ours = find(plan, folder, dataset, arm)
        theirs = ours if against == "start" else find(plan, folder, dataset, against)
        both = sorted(ours.keys() & theirs.keys())
        if not both:
            continue
        score, nll, selected = [], [], []
        for seed in both:
            mine, other = ours[seed], theirs[seed]
            last, its = mine.players[-1], START if against == "start" else other.players[-1]
            score.append(_paired(mine.values(last, "task_score"), other.values(its, "task_score")))
            nll.append(_paired(mine.values(last, "nll"), other.values(its, "nll")))
            start = statistics.fmean(other.values(START, "task_score").values())
            selected.append(mine.selected - (start if against == "start" else other.selected))
        seeds = ", ".join(f"{value:+.3f}" for value in score)
        cells = (str(Difference(score)), seeds, str(Difference(selected)), str(Difference(nll)))
        yield f"| {ask} | {len(both)} | " + " | ".join(cells) + " |"


def draw(plan: "Plan", folder: Path, dataset: str, target: Path) -> Path | None:
    """Task score and held-out NLL by iteration: a line for each arm's mean over seeds, a dot for each seed."""
    try:
        from matplotlib import colormaps, rcParams
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: they need matplotlib (pip install -e '.[bench]')", flush=True)
        return None
    rcParams["svg.hashsalt"] = "spinlm"  # the same picture for the same numbers
    figure = Figure(figsize=(12, 4), layout="constrained")
    arms = [arm for arm in plan.arms if find(plan, folder, dataset, arm.name)]
    for axes, measure, title in zip(
        figure.subplots(1, 2),
        ("task_score", "heldout_nll"),
        ("task score", "held-out NLL, nats per token"),
        strict=True,
    ):
        for number, arm in enumerate(arms):
            runs = find(plan, folder, dataset, arm.name).values()
            color = colormaps["tab20"](number)
            measured = [[run.metrics(player) for player in run.players] for run in runs]
            curves = [
                [one[measure] for one in run] for run in measured if all(one.get(measure) is not None for one in run)
            ]
            longest = max(map(len, curves), default=0)
            means = [statistics.fmean(curve[at] for curve in curves if len(curve) > at) for at in range(longest)]
            axes.plot(range(longest), means, color=color, label=arm.name)
            for curve in curves:
                axes.plot(range(len(curve)), curve, ".", color=color, markersize=4, alpha=0.6)
        axes.set(title=title, xlabel="iterations played (0: the start)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.savefig(target, metadata={"Date": None})
    return target


def _paired(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Mean difference over the held-out prompts that both have; runs with other starts may have drawn others."""
    shared = ours.keys() & theirs.keys()
    if not shared:
        return statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
    return statistics.fmean(ours[prompt] - theirs[prompt] for prompt in shared)
