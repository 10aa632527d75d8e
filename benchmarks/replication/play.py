"""Play every arm of a replication on every data set and seed, then write what came out.

    python benchmarks/replication/play.py small.yaml [--to runs/replication] [--jobs 2] [--data gsm8k=FILE.jsonl]

A plan (small.yaml, full.yaml) names data sets, seeds, arms and questions. An arm is a recipe with changes; the arms of
a data set and seed begin with the same starting player, unless their `start` says otherwise. Run it again and it goes
on: runs that are complete are left alone. A data set whose file is not given is left out, and that is said.
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
    """A way to play: changes to the data set's recipe."""

    name: str
    settings: tuple[str, ...] = ()
    start: str = "shared"  # or "own": made by this run, where the changes concern the start

    @classmethod
    def of(cls, name: str, settings: dict[str, Any]) -> "Arm":
        if settings.get("start", "shared") not in ("shared", "own"):
            raise SystemExit(f"{name}: its start is {settings['start']!r}; write shared, or own")
        return cls(name, tuple(settings["settings"]), settings.get("start", "shared"))


@dataclass(frozen=True)
class Plan:
    """What is played: every arm on every data set and seed."""

    title: str
    seeds: tuple[int, ...]
    datasets: dict[str, tuple[str, ...]]  # changes to the recipe
    arms: tuple[Arm, ...]
    questions: tuple[tuple[str, str, str], ...]  # text, arm, and what it is compared with: an arm or `start`
    recipe: Path
    given: dict[str, Path] = field(default_factory=dict)  # data files

    @classmethod
    def read(cls, path: Path, given: dict[str, Path]) -> "Plan":
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if unknown := given.keys() - values["datasets"].keys():
            raise SystemExit(f"--data {min(unknown)}: {path.name} has no such data set")
        datasets = {}
        for name, part in values["datasets"].items():
            if part.get("file") == "own" or name in given:
                datasets[name] = tuple(part.get("settings", ()))
            else:
                print(f"{name} is left out: give its file with --data {name}=FILE.jsonl", flush=True)
        return cls(
            title=values["title"],
            seeds=tuple(values["seeds"]),
            datasets=datasets,
            arms=tuple(Arm.of(name, settings) for name, settings in values["arms"].items()),
            questions=tuple((one["ask"], one["arm"], one["against"]) for one in values["questions"]),
            recipe=HERE.parent.parent / values["recipe"],
            given=given,
        )

    def command(self, to: Path, dataset: str, seed: int, arm: Arm) -> list[str]:
        """The command of one run, as a user would type it."""
        settings = [*self.datasets[dataset], f"seed={seed}", f"data.seed={seed}", *arm.settings]
        if dataset in self.given:
            settings.append(f"data.path={self.given[dataset].resolve()}")
        return [
            *(sys.executable, "-m", "spinlm", "run", str(self.recipe), *settings),
            *("--run-dir", str(to / dataset / f"seed-{seed}" / arm.name)),
            *(
                ("--start-from", str(to / dataset / f"seed-{seed}" / self.arms[0].name))
                if self.takes_start(arm)
                else ()
            ),
        ]

    def takes_start(self, arm: Arm) -> bool:
        """Whether an arm begins with the start that the first one made."""
        return arm is not self.arms[0] and arm.start == "shared"


def play(plan: Plan, to: Path, jobs: int) -> bool:
    """All runs, `jobs` at a time, each with its share of the cores; one that fails does not stop the others.

    Returns:
        Whether none has failed.
    """
    cores = os.cpu_count() or 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max(cores // jobs, 1))}

    def one(dataset: str, seed: int, arm: Arm) -> tuple[str, float, int]:
        name = f"{dataset}/seed-{seed}/{arm.name}"
        log = to / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                plan.command(to, dataset, seed, arm), env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
        return name, time.monotonic() - began, code

    # Arm by arm, so that what there is after some hours is on all seeds.
    todo = [(dataset, seed, arm) for arm in plan.arms for seed in plan.seeds for dataset in plan.datasets]
    started: set[tuple[str, int]] = set()  # the data sets and seeds whose shared start is there
    failed = 0
    running: dict[Future[tuple[str, float, int]], tuple[str, int, Arm]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while todo or running:
            ready = [run for run in todo if not plan.takes_start(run[2]) or run[:2] in started]
            for run in ready[: jobs - len(running)]:
                todo.remove(run)
                running[pool.submit(one, *run)] = run
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                dataset, seed, arm = running.pop(ended)
                if arm is plan.arms[0]:
                    started.add((dataset, seed))
                name, seconds, code = ended.result()
                with (to / "times.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"run": name, "seconds": round(seconds)}) + "\n")
                failed += code != 0
                said = "" if code == 0 else f" FAILED with exit code {code}: see {to / name}.log"
                print(f"{name}: {seconds:.0f} s{said}", flush=True)
    return failed == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="a file in this folder, or a path")
    parser.add_argument("--to", type=Path, default=Path("runs/replication"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--data", action="append", default=[], help="NAME=FILE.jsonl, for a data set that needs one")
    parser.add_argument("--report", type=Path, help="write the report here; the default is report.md in --to")
    parser.add_argument("--only-report", action="store_true", help="play nothing: report on the runs that are there")
    args = parser.parse_args()
    path = HERE / args.plan if (HERE / args.plan).exists() else Path(args.plan)
    if not path.exists():
        parser.error(
            f"{args.plan}: no such plan; there are {', '.join(sorted(one.name for one in HERE.glob('*.yaml')))}"
        )
    plan = Plan.read(path, {name: Path(file) for name, _, file in (given.partition("=") for given in args.data)})
    folder = args.to / path.stem
    sound = args.only_report or play(plan, folder, args.jobs)
    print(write_report(plan, folder, args.report or folder / "report.md", args.jobs))
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
