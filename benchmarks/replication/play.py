"""Play every arm of a replication on every data set and seed, then write a report.

    python benchmarks/replication/play.py small.yaml [--output runs/replication] [--jobs 2] [--data gsm8k=FILE.jsonl]

A plan (small.yaml, full.yaml) lists data sets, seeds, arms and questions. An arm is a list of changes to the recipe.
All arms of a data set and seed use the same start, unless an arm sets `start: own`. Run the command again to continue:
complete runs are skipped. A data set without its file is skipped with a message.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from results import write_report

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Arm:
    """A variant of the runs: changes to the recipe."""

    name: str
    settings: tuple[str, ...] = ()
    start: str = "shared"  # or "own", where the changes affect the start

    @classmethod
    def of(cls, name: str, settings: dict[str, Any]) -> "Arm":
        if settings.get("start", "shared") not in ("shared", "own"):
            raise SystemExit(f"{name}: start is {settings['start']!r}; write shared or own")
        return cls(name, tuple(settings["settings"]), settings.get("start", "shared"))


@dataclass(frozen=True)
class Plan:
    """The runs of a replication: every arm on every data set and seed."""

    title: str
    seeds: tuple[int, ...]
    datasets: dict[str, tuple[str, ...]]  # changes to the recipe
    arms: tuple[Arm, ...]
    questions: tuple[tuple[str, str, str], ...]  # text, arm, baseline: another arm or `start`
    recipe: Path
    data_files: dict[str, Path] = field(default_factory=dict)  # by data set

    @classmethod
    def read(cls, path: Path, data_files: dict[str, Path]) -> "Plan":
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if unknown := data_files.keys() - values["datasets"].keys():
            raise SystemExit(f"--data {min(unknown)}: {path.name} has no such data set")
        datasets = {}
        for name, part in values["datasets"].items():
            if part.get("file") == "own" or name in data_files:
                datasets[name] = tuple(part.get("settings", ()))
            else:
                print(f"{name}: skipped. Give its file with --data {name}=FILE.jsonl", flush=True)
        return cls(
            title=values["title"],
            seeds=tuple(values["seeds"]),
            datasets=datasets,
            arms=tuple(Arm.of(name, settings) for name, settings in values["arms"].items()),
            questions=tuple((item["question"], item["arm"], item["baseline"]) for item in values["questions"]),
            recipe=HERE.parent.parent / values["recipe"],
            data_files=data_files,
        )

    def command(self, output: Path, dataset: str, seed: int, arm: Arm) -> list[str]:
        """Return the command of one run."""
        settings = [*self.datasets[dataset], f"seed={seed}", f"data.seed={seed}", *arm.settings]
        if dataset in self.data_files:
            settings.append(f"data.path={self.data_files[dataset].resolve()}")
        return [
            *(sys.executable, "-m", "spinlm", "run", str(self.recipe), *settings),
            *("--run-dir", str(output / dataset / f"seed-{seed}" / arm.name)),
            *(
                ("--start-from", str(output / dataset / f"seed-{seed}" / self.arms[0].name))
                if self.shares_start(arm)
                else ()
            ),
        ]

    def shares_start(self, arm: Arm) -> bool:
        """Return whether an arm uses the start that the first arm made."""
        return arm is not self.arms[0] and arm.start == "shared"


def play(plan: Plan, output: Path, jobs: int) -> bool:
    """Play all runs, `jobs` at a time, each with its share of the cores. A failed run does not stop the others.

    Returns:
        Whether all runs succeeded.
    """
    cores = os.cpu_count() or 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max(cores // jobs, 1))}

    def play_run(dataset: str, seed: int, arm: Arm) -> tuple[str, float, int]:
        name = f"{dataset}/seed-{seed}/{arm.name}"
        log = output / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                plan.command(output, dataset, seed, arm), env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
        return name, time.monotonic() - began, code

    # Arm by arm: partial results then cover all seeds.
    todo = [(dataset, seed, arm) for arm in plan.arms for seed in plan.seeds for dataset in plan.datasets]
    started: set[tuple[str, int]] = set()  # data sets and seeds whose shared start is made
    failed = 0
    running: dict[Future[tuple[str, float, int]], tuple[str, int, Arm]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while todo or running:
            ready = [run for run in todo if not plan.shares_start(run[2]) or run[:2] in started]
            for run in ready[: jobs - len(running)]:
                todo.remove(run)
                running[pool.submit(play_run, *run)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                dataset, seed, arm = running.pop(future)
                if arm is plan.arms[0]:
                    started.add((dataset, seed))
                name, seconds, code = future.result()
                with (output / "times.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"run": name, "seconds": round(seconds)}) + "\n")
                failed += code != 0
                note = "" if code == 0 else f" FAILED with exit code {code}: see {output / name}.log"
                print(f"{name}: {seconds:.0f} s{note}", flush=True)
    return failed == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="a file in this folder, or a path")
    parser.add_argument("--output", type=Path, default=Path("runs/replication"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--data", action="append", default=[], help="NAME=FILE.jsonl: the file of a data set")
    parser.add_argument("--report", type=Path, help="write the report here; the default is report.md in --output")
    parser.add_argument("--only-report", action="store_true", help="play nothing, report on the existing runs")
    args = parser.parse_args()
    path = HERE / args.plan if (HERE / args.plan).exists() else Path(args.plan)
    if not path.exists():
        parser.error(
            f"{args.plan}: no such plan; there are {', '.join(sorted(file.name for file in HERE.glob('*.yaml')))}"
        )
    plan = Plan.read(path, {name: Path(file) for name, _, file in (option.partition("=") for option in args.data)})
    folder = args.output / path.stem
    succeeded = args.only_report or play(plan, folder, args.jobs)
    print(write_report(plan, folder, args.report or folder / "report.md", args.jobs))
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
