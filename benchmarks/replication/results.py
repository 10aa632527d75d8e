"""Write the tables of a replication: means over seeds, and paired differences with intervals.

All arms of a seed have the same start and held-out prompts, so the difference of two means is the mean of the paired
differences. Reads run folders only; a run that has not ended is left out.
"""

import platform
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from measurements import Runs, baseline_values, difference, ended_runs, is_ahead, values_by_player
from plan import START as START_ARM
from plan import Plan

from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json, read_json_lines

PACKAGES = ("torch", "transformers", "peft")

COLUMNS = {
    "task_score": ("task score", "{:.3f}"),
    "heldout_nll": ("held-out NLL", "{:.3f}"),
    "identical_rate": ("equal to real", "{:.1%}"),
    "truncated_rate": ("truncated", "{:.1%}"),
    "sampled_truncated_rate": ("truncated, T 1", "{:.1%}"),
    "repeated_4grams": ("repeated 4-grams", "{:.1%}"),
    "kl_from_start": ("KL from start", "{:+.3f}"),
}
"""Columns of the table of players after the task scores: title and number format by metric."""


def write_report(plan: Plan, split: str, folder: Path, target: Path, jobs: int) -> str:
    """Write the report of a split and return its text.

    Raises:
        SystemExit: the split is test, and the plan names no arms to report.
    """
    runs = {arm: ended for arm in plan.reported(split) if (ended := ended_runs(plan, split, folder, arm))}
    lines = [f"# {plan.title}: {split} seeds", ""]
    if not runs:
        return "\n".join([*lines, "No run has ended yet."])
    tables = (_setup(plan, split, runs, folder, jobs), _players(plan, runs), _differences(plan, runs), _regimes(runs))
    lines += [line for table in tables for line in (*table, "")]
    if split == "dev":
        lines += [*_suggestions(plan, runs), ""]
    if figure := draw(plan, runs, target.with_suffix(".svg")):
        lines += [f"![Difference to tuned fine-tuning]({figure.name})", ""]
    text = "\n".join(lines)
    target.write_text(text, encoding="utf-8")
    return text


def _setup(plan: Plan, split: str, runs: Runs, folder: Path, jobs: int) -> Iterator[str]:
    """Describe when and on what the runs were made, and how to read the tables."""
    provenance = [read_json(run.folder.provenance) for of_arm in runs.values() for run in of_arm.values()]
    days = sorted({item["started"][:10] for item in provenance})
    packages = sorted({f"{name} {item['packages'][name]}" for item in provenance for name in PACKAGES})
    commits, pythons, devices = (
        sorted({str(item[key]) for item in provenance}) for key in ("commit", "python", "device")
    )
    hours = sum(_minutes(folder, plan.seeds[split]).values()) / 60
    yield (
        f"Dates: {', '.join(days)}. spinlm commit: {', '.join(commits)}. Processor: {processor()}. Device of a run: "
        f"{' and '.join(devices)}. Parallel runs: {jobs}. Python {', '.join(pythons)}, {', '.join(packages)}. Sum of "
        f"the runs' times: {hours:.1f} hours. Seeds: {', '.join(map(str, plan.seeds[split]))}. A seed decides the "
        "examples, the start and every random number."
    )
    yield ""
    yield (
        f"The metric, chosen before the runs: {plan.metric} of the last player. Differences are paired: same start, "
        "same held-out prompts. Brackets: 95% interval of Student's t over the seeds. `ahead`: above 0 against tuned "
        f"({plan.tuned or 'not chosen yet'}) and extrapolated ({plan.extrapolated or 'not chosen yet'}) fine-tuning. "
        "T: temperature; 0 is greedy. Steps: optimizer steps since the start."
    )


def _minutes(folder: Path, seeds: Iterable[int]) -> dict[tuple[int, str], float]:
    """Return the minutes that each run took, over all calls, by seed and arm."""
    log = folder / "times.jsonl"
    times: dict[tuple[int, str], float] = {}
    for row in read_json_lines(log) if log.exists() else ():
        if row["seed"] in seeds:
            key = (row["seed"], row["arm"])
            times[key] = times.get(key, 0.0) + row["seconds"] / 60
    return times


def processor() -> str:
    """Return the name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = {line.split(":")[1].strip() for line in lines if "model name" in line}
    return ", ".join(names) or platform.processor() or platform.machine()


def _players(plan: Plan, runs: Runs) -> Iterator[str]:
    """Yield a table with a row for each arm and player: means over the seeds."""
    start = {seed: run for of_arm in runs.values() for seed, run in of_arm.items()}
    players = [(START_ARM, START, start)] + [
        (arm, player, {seed: run for seed, run in of_arm.items() if player in run.players})
        for arm, of_arm in runs.items()
        for player in sorted({player for run in of_arm.values() for player in run.players if player != START})
    ]
    metrics = [[run.metrics(player) for run in of_arm.values()] for _, player, of_arm in players]
    keys = {key for of_player in metrics for values in of_player for key in values}
    temperatures = sorted((key for key in keys if "@" in key), key=lambda key: float(key.partition("@")[2]))
    columns = {key: (f"score, T {key.partition('@')[2]}", "{:.3f}") for key in temperatures}
    columns |= {name: (name.replace("_", " "), "{:.3f}") for name in (also.partition(":")[2] for also in plan.also)}
    columns |= {key: value for key, value in COLUMNS.items() if key in keys and key != "task_score"}
    yield f"| arm | player | seeds | steps | {' | '.join(title for title, _ in columns.values())} |"
    yield "|---" * (4 + len(columns)) + "|"
    for (arm, player, of_arm), of_player in zip(players, metrics, strict=True):
        steps = statistics.fmean(run.steps(player) for run in of_arm.values())
        cells = [arm, player_name(player), str(len(of_arm)), f"{steps:.0f}"]
        cells += [_mean((values.get(key) for values in of_player), form) for key, (_, form) in columns.items()]
        yield f"| {' | '.join(cells)} |"


def _mean(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if known else "–"


def _differences(plan: Plan, runs: Runs) -> Iterator[str]:
    """Yield a table with a row for each arm and player: the difference to the start and to the baselines."""
    values, tuned = values_by_player(runs, plan.metric), plan.tuned or plan.first
    further = [metric for metric in ("task_score@1", "heldout_nll") if metric != plan.metric]
    of_metric = {metric: values_by_player(runs, metric) for metric in further}
    titles = ["arm", "player", "seeds", f"{plan.metric} vs start", f"vs {tuned}", "each seed"]
    titles += [f"vs {plan.extrapolated or '–'}", *(f"{metric} vs {tuned}" for metric in further)]
    yield (
        f"Differences to the start, to {tuned} and to {plan.extrapolated or 'extrapolated fine-tuning'}. Positive is "
        "better, also for the NLL."
    )
    yield ""
    yield f"| {' | '.join([*titles, ''])} |"
    yield "|---" * (len(titles) + 1) + "|"
    for arm, player in values:
        if arm in (START_ARM, tuned):
            continue
        own = values[arm, player]
        to_tuned = difference(own, baseline_values(values, tuned, player))
        cells = [arm, player_name(player), str(len(own)), str(difference(own, values[START_ARM, START])), str(to_tuned)]
        cells += [", ".join(f"{value:+.3f}" for value in to_tuned.seeds)]
        cells += [str(difference(own, baseline_values(values, plan.extrapolated, player)))]
        for metric in further:
            others = of_metric[metric]
            cells += [str(difference(others.get((arm, player), {}), baseline_values(others, tuned, player)))]
        yield f"| {' | '.join([*cells, 'ahead' if is_ahead(plan, arm, player, values) else ''])} |"


def _regimes(runs: Runs) -> Iterator[str]:
    """Yield a table with a row for each arm and iteration that has pairs: the regime before and after training."""
    yield (
        "Regime before training: cosine with the gradient of fine-tuning after noise is removed, noise of a step "
        "relative to fine-tuning's, and share of the NLL term in the pull on the real responses. β·margin: mean over "
        "the last epoch, as forecast and as measured."
    )
    yield ""
    yield "| arm | iteration | cosine | noise | NLL share | β·margin, forecast | β·margin, measured |"
    yield "|---" * 7 + "|"
    for arm, of_arm in runs.items():
        for player in sorted({player for run in of_arm.values() for player in run.players if player != START}):
            regimes = [run.regimes[player] for run in of_arm.values() if player in run.regimes]
            if not regimes:
                continue
            values = [regime.values for regime in regimes]
            columns = [[value.get(key) for value in values] for key in ("cosine_corrected", "noise_ratio", "nll_share")]
            columns += [
                [forecast["beta_margin_by_epoch"][-1] for value in values if (forecast := value.get("forecast"))]
            ]
            columns += [[margin for regime in regimes for margin in regime.beta_margin_by_epoch[-1:]]]
            yield f"| {' | '.join([arm, str(player), *(_mean(column, '{:.2f}') for column in columns)])} |"


def _suggestions(plan: Plan, runs: Runs) -> Iterator[str]:
    """Yield the arms with the best mean on the dev seeds that have all of them, for a person to write into the plan."""
    values = {arm: by_seed for (arm, _), by_seed in values_by_player(runs, plan.metric).items() if arm != START_ARM}
    most = max(map(len, values.values()))
    means = {arm: statistics.fmean(by_seed.values()) for arm, by_seed in values.items() if len(by_seed) == most}
    kinds: dict[str, list[str]] = {"tuned": [], "extrapolated": [], "report": []}
    for arm in sorted(means, key=means.__getitem__, reverse=True):
        is_sft = next(iter(runs[arm].values())).recipe["objective"]["name"] == "sft"
        is_control = is_sft and plan.arms[arm].only_pairs_of is None
        kinds["extrapolated" if plan.arms[arm].extrapolate else "tuned" if is_control else "report"].append(arm)
    yield f"Highest mean {plan.metric} on these seeds, best first:"
    for kind, arms in kinds.items():
        yield f"- {kind}: " + (", ".join(f"{arm} {means[arm]:.3f}" for arm in arms) or "–")


def draw(plan: Plan, runs: Runs, target: Path) -> Path | None:
    """Draw each arm's difference to tuned fine-tuning: a dot for each seed, a bar for the interval of the mean."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        print("Figures need matplotlib: pip install -e '.[bench]'", flush=True)
        return None
    rcParams["svg.hashsalt"] = "spinlm"  # equal numbers give an equal file
    tuned = plan.tuned or plan.first
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(runs)), layout="constrained")
    metrics = dict.fromkeys((plan.metric, "heldout_nll", "task_score@1"))
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), metrics, strict=False):
        values = values_by_player(runs, metric)
        shown = [key for key in values if key[0] != tuned]
        for place, key in enumerate(shown):
            found = difference(values[key], baseline_values(values, tuned, max(key[1], 0)))
            axes.plot(found.seeds, [place] * len(found.seeds), ".", color="0.6")
            if len(found.seeds) > 2:
                axes.errorbar(found.mean, place, xerr=found.half_width, fmt="o", color="tab:blue", capsize=3)
        names = [arm if player < 1 else f"{arm}, {player_name(player)}" for arm, player in shown]
        axes.axvline(0, color="0.8", zorder=0)
        axes.set(title=f"{metric} minus {tuned}; right is better", yticks=range(len(shown)), yticklabels=names)
    figure.savefig(target, metadata={"Date": None})
    return target
