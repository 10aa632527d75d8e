"""Play every arm of a plan on every seed, then write the tables.

    python benchmarks/replication/play.py small.yaml [FIELD=VALUE …] [--split dev|test] [--minutes 150] [--data FILE]

A plan lists arms, dev seeds to choose settings on, and test seeds. The dev table shows all arms. Write the chosen ones
into `tuned`, `extrapolated` and `report` of the plan; the test seeds play and report only these. Run the command again
to continue: complete runs are skipped, and an interrupted run continues.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from measurements import Run
from plan import HERE, Arm, Plan
from results import write_report

from spinlm.rundir.layout import RunDir

DATA_SCRIPT = HERE.parents[1] / "recipes" / "quickstart_data.py"


@dataclass(frozen=True)
class Player:
    """Plays the runs of a plan in a folder."""

    plan: Plan
    folder: Path
    data: Path | None = None  # the examples, if the plan has none
    settings: tuple[str, ...] = ()  # changes to the recipe of every run

    def run_folder(self, seed: int, arm: str) -> Path:
        return self.folder / f"seed-{seed}" / arm

    def data_file(self, seed: int) -> Path | None:
        """Return the file with the examples of a seed; None for the recipe's own."""
        if self.data is not None:
            return self.data.resolve()
        return None if self.plan.rows is None else (self.folder / "data" / f"seed-{seed}.jsonl").resolve()

    def write_data(self, seed: int) -> None:
        """Write the generated examples of a seed. The seed of the generator is that of the runs."""
        path = self.data_file(seed)
        if self.plan.rows is None or path is None or path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        options = [f"--{name}={value}" for name, value in self.plan.rows.items()]
        part = path.with_suffix(".part")
        subprocess.run([sys.executable, str(DATA_SCRIPT), str(part), f"--seed={seed}", *options], check=True)
        part.replace(path)

    def command(self, split: str, seed: int, arm: Arm) -> list[str]:
        """Return the command of one run."""
        target = ["--run-dir", str(self.run_folder(seed, arm.name))]
        parents = self.plan.parents(arm, self.plan.played(split))
        if arm.extrapolate:
            source = str(self.run_folder(seed, parents[0]))
            return [sys.executable, "-m", "spinlm", "extrapolate", source, "--factor", f"{arm.factor:g}", *target]
        settings = [*self.plan.settings_of(split, arm), f"seed={seed}", f"data.seed={seed}", *self.settings]
        if (data := self.data_file(seed)) is not None:
            settings.append(f"data.path={data}")
        program = [str(HERE / "sft_on_pairs.py")] if arm.only_pairs_of else ["-m", "spinlm", "run"]
        start = arm.only_pairs_of or (parents[0] if parents else None)
        source_options = ["--start-from", str(self.run_folder(seed, start))] if start else []
        return [sys.executable, *program, str(self.plan.recipe), *settings, *target, *source_options]

    def has_ended(self, split: str, seed: int, arm: Arm) -> bool:
        """Return whether a run has ended, with all iterations that the plan asks for."""
        run = Run(RunDir(self.run_folder(seed, arm.name)))
        wanted = self.plan.iterations[arm.name] if self.plan.plays_longer(split, arm) else 1
        return run.ended and (run.stopped_early or len(run.players) > wanted)

    def play_run(self, split: str, seed: int, arm: Arm, threads: int) -> int:
        """Play one run to its end, unless it has ended. Return the exit code."""
        folder = self.run_folder(seed, arm.name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])  # HERE for the scorers
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
        began = time.monotonic()
        with folder.with_name(f"{arm.name}.log").open("a", encoding="utf-8") as log:
            command = self.command(split, seed, arm)
            code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        seconds = round(time.monotonic() - began)
        with (self.folder / "times.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seed": seed, "arm": arm.name, "seconds": seconds, "exit_code": code}) + "\n")
        note = "" if code == 0 else f" FAILED with exit code {code}: see {folder}.log"
        print(f"seed {seed}, {arm.name}: {seconds} s{note}", flush=True)
        return code

    def play(self, split: str, jobs: int, minutes: float, seeds: list[int] | None = None) -> bool:
        """Play the runs of a split, `jobs` at a time, each with its share of the cores, one seed after the other.

        A failed run stops only the runs that are made from it.

        Args:
            split: dev or test.
            jobs: number of runs at a time.
            minutes: no run begins after this time.
            seeds: the seeds to play; absent means all of the split.

        Returns:
            Whether all runs have ended.
        """
        threads = max((os.cpu_count() or 1) // jobs, 1)
        arms = self.plan.played(split)
        todo = [(seed, arm) for seed in seeds or self.plan.seeds[split] for arm in arms]
        ended = {(seed, arm.name) for seed, arm in todo if self.has_ended(split, seed, arm)}
        todo = [(seed, arm) for seed, arm in todo if (seed, arm.name) not in ended]
        for seed in {seed for seed, _ in todo}:
            self.write_data(seed)
        running: dict[Future[int], tuple[int, Arm]] = {}
        deadline = time.monotonic() + 60 * minutes
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                ready = [
                    (seed, arm)
                    for seed, arm in todo
                    if all((seed, parent) in ended for parent in self.plan.parents(arm, arms))
                ]
                if time.monotonic() > deadline:
                    ready = []
                for seed, arm in ready[: jobs - len(running)]:
                    todo.remove((seed, arm))
                    running[pool.submit(self.play_run, split, seed, arm, threads)] = (seed, arm)
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    seed, arm = running.pop(future)
                    if future.result() == 0:
                        ended.add((seed, arm.name))
        if todo:
            print(f"{split}: {len(todo)} runs are left; run the same command again", flush=True)
        return all((seed, arm.name) in ended for seed in seeds or self.plan.seeds[split] for arm in arms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="a file in this folder, or a path")
    parser.add_argument("settings", nargs="*", metavar="FIELD=VALUE", help="changes to the recipe of every run")
    parser.add_argument("--split", choices=("dev", "test"), help="the default is dev, then test if `report` is filled")
    parser.add_argument("--seeds", type=int, nargs="+", help="play only these seeds of the split")
    parser.add_argument("--output", type=Path, default=Path("runs/replication"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--data", type=Path, help="file with the examples, for a plan that needs one")
    parser.add_argument("--only-report", action="store_true", help="play nothing, report on the existing runs")
    args = parser.parse_intermixed_args()
    path = HERE / args.plan if (HERE / args.plan).exists() else Path(args.plan)
    if not path.exists():
        names = ", ".join(sorted(file.name for file in HERE.glob("*.yaml")))
        parser.error(f"{args.plan}: no such plan; there are {names}")
    plan = Plan.read(path)
    if plan.needs_file and args.data is None and not args.only_report:
        parser.error(f"{path.name} needs a file of examples: add --data FILE.jsonl")
    player = Player(plan, args.output / path.stem, args.data, tuple(args.settings))
    splits = [args.split] if args.split else ["dev", "test"] if plan.report and plan.seeds["test"] else ["dev"]
    began, succeeded = time.monotonic(), True
    for split in [split for split in splits if plan.seeds[split]]:
        if args.seeds and (others := set(args.seeds) - set(plan.seeds[split])):
            parser.error(f"--seeds {min(others)}: is no {split} seed of {path.name}; add --split")
        if not args.only_report:
            left = args.minutes - (time.monotonic() - began) / 60
            succeeded = player.play(split, args.jobs, left, args.seeds) and succeeded
        print(write_report(plan, split, player.folder, player.folder / f"{split}.md", args.jobs))
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
