"""What `spinlm plan` says beside what runs did: counts, tokens, bytes, files, and seconds.

    python benchmarks/plan_check.py [--data FILE.jsonl] [--folder DIR] [--processor] [--small]

Plans are made before their runs, from recipe and data alone. Seconds: a plan assumes a typical machine, so the first
run gives a factor for each stage, and the others are predicted with these. Runs that are in DIR already are not done
again.
With --processor runs have one thread, and seconds are those of the processor: on a machine that is shared with others,
those of the clock say little.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE = RECIPES / "quickstart.yaml"
FEW = ("sft.epochs=1",)
FIRST = ("data.prompts=64", "data.heldout=32", "sft.prompts=64", *FEW)
JOINED = (
    *("data.prompts=40", "data.heldout=24", "sft.prompts=48", *FEW, "opponent.max_new_tokens=160"),
    *("train.max_length=640", "selfplay.iterations=1", "evaluate.scorer=null"),
)
GIVEN = (
    *("data.prompts=32", "data.heldout=24", "sft.prompts=32", *FEW, "opponent.max_new_tokens=200"),
    *("train.max_length=512", "train.epochs=2", "selfplay.iterations=1", "evaluate.scorer=null"),
)
SMALL = ("data.prompts=24", "data.heldout=16", "sft.prompts=24", "selfplay.iterations=1", "train.epochs=1")
TOLERANCE = 0.25
STAGES = ("sft", "generate", "reference_logprobs", "train", "evaluate")


def join_rows(path: Path, together: int = 4) -> None:
    """The quickstart's notes, several to a prompt: longer prompts and responses of the same kind."""
    rows = [json.loads(line) for line in (RECIPES / "quickstart.jsonl").read_text().splitlines()]
    with path.open("w") as file:
        for start in range(0, len(rows) - together + 1, together):
            chosen = rows[start : start + together]
            prompt = "\n".join(f"{row['system']} {row['prompt']}" for row in chosen)
            row = {
                "prompt": f"Turn each of these notes into JSON, one line each.\n{prompt}",
                "response": "\n".join(row["response"] for row in chosen),
            }
            file.write(json.dumps(row) + "\n")


def predict(overrides: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Amounts, and seconds by stage, of a run that has not begun."""
    from spinlm.plan import make_plan
    from spinlm.plan.devices import CPU
    from spinlm.plan.disk import disk
    from spinlm.recipe.load import load_recipe

    plan = make_plan(load_recipe(RECIPE, overrides))
    assert plan.shape
    rooms = disk(plan)
    amounts: dict[str, float] = {
        "prompt, tokens": plan.lengths.prompt,
        "real response, tokens": plan.lengths.real,
        "pairs": sum(work.pairs for work in plan.work),
        "optimiser steps": sum(work.steps for work in plan.work),
        "tokens generated": sum(work.generated for work in plan.work),
        "tokens generated, at most": sum(work.generated_at_most for work in plan.work),
        "tokens scored": sum(work.scored.tree for work in plan.work),
        "tokens judged in evaluation": sum(work.judged.tree for work in plan.work),
        "tokens trained on": sum(work.trained.tree for work in plan.work),
        **{f"bytes of {part}": room.total or 0 for part, room in rooms.items()},
        "bytes in all": sum(room.total or 0 for room in rooms.values()),
        "files": sum(room.files for room in rooms.values()),
    }
    hours = [plan.hours(plan.shape, CPU, work) for work in plan.work]
    seconds = {name: 3600 * sum(getattr(one, name) for one in hours[1:]) for name in ("generate", "train")}
    seconds["reference_logprobs"] = 3600 * sum(one.score for one in hours[1:])
    seconds |= {"sft": 3600 * hours[0].train, "evaluate": 3600 * sum(one.evaluate for one in hours)}
    return amounts, seconds


def measure(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The same of a finished run, from its folder."""
    from spinlm.rundir.layout import RunDir
    from spinlm.rundir.provenance import read_recipe
    from spinlm.rundir.records import Example, Generation, HeldoutGreedy, HeldoutSampled, read_lines, read_pairs
    from spinlm.rundir.stage_graph import START
    from spinlm.utils.atomic import read_json

    run = RunDir(folder)
    recipe = read_recipe(run)
    epochs, warm = recipe["train"]["epochs"], recipe["sft"]["epochs"]
    found: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    examples = {split: list(read_lines(run.examples(split), Example)) for split in ("train", "heldout", "sft")}
    held = {one.id: len(one.prompt_ids) + len(one.response_ids) - 1 for one in examples["heldout"]}
    everyone = [one for split in examples.values() for one in split]
    found["prompt, tokens"] = sum(len(one.prompt_ids) for one in everyone) / len(everyone)
    found["real response, tokens"] = sum(len(one.response_ids) for one in everyone) / len(everyone)
    found["tokens trained on"] = warm * sum(len(one.prompt_ids) + len(one.response_ids) - 1 for one in examples["sft"])
    found["optimiser steps"] = len(run.train_log.read_text().splitlines())
    iterations = [START, *(int(path.name.split("-")[1]) for path in folder.glob("iteration-*"))]
    for iteration in iterations:
        place = run.iteration(iteration)
        samples = {one.id: one.token_ids for one in read_lines(run.heldout_sampled(iteration), HeldoutSampled)}
        answers = [one.token_ids for one in read_lines(run.heldout_greedy(iteration), HeldoutGreedy)]
        replies = [one.token_ids for path in place.glob("generations/*") for one in read_lines(path, Generation)]
        found["tokens generated"] += sum(map(len, [*answers, *samples.values(), *replies]))
        # Read by the player beside the opponent's responses to the same prompts, which are added below, and by θ_0.
        found["tokens judged in evaluation"] += sum(2 * (held[id] + len(ids) - 1) for id, ids in samples.items())
        for split in ("train", "heldout"):
            paths = sorted(place.glob(f"pairs/{split}-*"))
            rows = read_pairs(paths).to_pylist()
            trees = {row["id"]: len(row["prompt_ids"]) + len(row["real_ids"]) - 1 for row in rows}
            responses = sum(len(row["synthetic_ids"]) - 1 for row in rows)
            found["tokens scored"] += sum(trees.values()) + responses
            if split == "train":
                found["pairs"] += len(rows)
                found["tokens trained on"] += epochs * (sum(trees.values()) + responses)
            else:
                found["tokens judged in evaluation"] += responses
    found["tokens generated, at most"] = found["tokens generated"]
    for path in (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        found[f"bytes of {_part(path.relative_to(folder))}"] += path.stat().st_size
        found["bytes in all"] += path.stat().st_size
        found["files"] += 1
    for marker in folder.rglob("*.done"):
        facts = read_json(marker)
        if facts.get("resumed"):
            sys.exit(f"{marker}: this stage was interrupted, so its time is not known. Delete {folder} and run again")
        seconds[marker.stem] += facts["seconds"]
    return found, seconds


def _part(path: Path) -> str:
    kinds = {"player": "players", **{name: name for name in ("generations", "pairs")}}
    if path.parts[0] == ".spinlm":
        return "measurements and markers"
    known = [kinds[part] for part in path.parts if part in kinds]
    return known[0] if known else path.parts[0] if path.parts[0] in ("base", "examples") else "measurements and markers"


def table(names: list[str], predicted: dict[str, float], measured: dict[str, float]) -> list[str]:
    lines = ["| | predicted | measured | ratio | |", "|---|---|---|---|---|"]
    for name in names:
        ratio = predicted[name] / measured[name] if measured[name] else float("nan")
        miss = "" if abs(ratio - 1) <= TOLERANCE or name.endswith("at most") else "off"
        lines.append(f"| {name} | {predicted[name]:,.0f} | {measured[name]:,.0f} | {ratio:.2f} | {miss} |")
    return lines


def play(folder: Path, overrides: list[str], processor: bool) -> None:
    """A run in this process."""
    from spinlm.recipe.load import load_recipe
    from spinlm.rundir import layout
    from spinlm.selfplay import run

    if processor:
        vars(layout)["time"] = SimpleNamespace(
            **vars(time) | {"monotonic": time.process_time}
        )  # what markers say of stages
    run(load_recipe(RECIPE, overrides), folder)


def check(folder: Path, given: argparse.Namespace) -> None:
    joined = folder / "joined.jsonl"
    join_rows(joined)
    runs = {"quickstart": list(FIRST), "joined": [f"data.path={joined}", *JOINED]}
    if given.data is not None:
        runs[given.data.stem] = [f"data.path={given.data.absolute()}", *GIVEN]
    factors: dict[str, float] = {}
    for name, overrides in runs.items():
        overrides += SMALL if given.small else ()
        amounts, assumed = predict(overrides)
        how = [*(["--processor"] if given.processor else []), "--play", str(folder / name), *overrides]
        threads = {"OMP_NUM_THREADS": "1"} if given.processor else {}
        command = [sys.executable, __file__, *how]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **threads})
        found, took = measure(folder / name)
        print(f"\n**{name}**: `{' '.join(overrides)}`\n")
        print("\n".join(table(list(amounts), amounts, found)))
        print("\nseconds, " + ("at the speeds assumed" if not factors else "with the factors of the first run") + "\n")
        predicted: dict[str, Any] = {stage: factors.get(stage, 1.0) * assumed[stage] for stage in STAGES}
        predicted["all of these"] = sum(predicted.values())
        took["all of these"] = sum(took[stage] for stage in STAGES)
        print("\n".join(table([*STAGES, "all of these"], predicted, took)))
        factors = factors or {stage: took[stage] / assumed[stage] for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a .jsonl file for one more run")
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    parser.add_argument("--processor", action="store_true", help="count seconds of the processor, not of the clock")
    parser.add_argument("--small", action="store_true", help="smaller runs")
    parser.add_argument("--play", nargs="+", metavar="FOLDER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.play:
        play(Path(given.play[0]), given.play[1:], given.processor)
        return
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
        check(given.folder, given)
        return
    with tempfile.TemporaryDirectory() as name:
        check(Path(name), given)


if __name__ == "__main__":
    main()
