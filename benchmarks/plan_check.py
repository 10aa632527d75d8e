"""Compare what `spinlm plan` estimates with what runs did: counts, tokens and seconds.

    python benchmarks/plan_check.py [--data FILE.jsonl] [--folder DIR] [--processor] [--small]

Each plan is made before its run, from recipe and data alone. A plan assumes a typical machine, so the first run gives a
factor for each stage, and the seconds of the other runs are estimated with these factors. A run that is complete in DIR
is not repeated.
With --processor runs have one thread, and seconds are processor time: on a shared machine wall-clock time says little.
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
    """Write the quickstart's notes, `together` in each prompt: longer prompts and responses of the same kind."""
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
    """Return amounts, and seconds by stage, of a run before it starts."""
    from spinlm.plan import make_plan
    from spinlm.recipe.load import load_recipe

    plan = make_plan(load_recipe(RECIPE, overrides))
    costs = plan.iterations
    amounts: dict[str, float] = {
        "prompt, tokens": plan.lengths.prompt,
        "real response, tokens": plan.lengths.real,
        "pairs": sum(cost.pairs for cost in costs),
        "optimizer steps": sum(cost.steps for cost in costs),
        "tokens generated": sum(cost.generated for cost in costs),
        "tokens generated, at most": sum(cost.max_generated for cost in costs),
        "tokens of reference_logprobs": sum(cost.reference_tokens for cost in costs),
        "tokens read in evaluate": sum(cost.evaluation_tokens for cost in costs),
        "tokens trained on": sum(cost.training_tokens for cost in costs),
    }
    (hours,) = (device.hours for device in plan.devices if device.name == "CPU")
    seconds = {
        "sft": hours[0].train,
        "generate": sum(time.generate for time in hours),
        "reference_logprobs": sum(time.reference_logprobs for time in hours),
        "train": sum(time.train for time in hours[1:]),
        "evaluate": sum(time.evaluate for time in hours),
    }
    return amounts, {stage: 3600 * value for stage, value in seconds.items()}


def measure(root: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the same amounts and seconds of a finished run, from its folder."""
    from spinlm.rundir.layout import RunDir
    from spinlm.rundir.provenance import read_recipe
    from spinlm.rundir.records import Example, Generation, HeldoutGreedy, HeldoutSampled, read_lines, read_pairs
    from spinlm.rundir.stage_graph import START
    from spinlm.utils.atomic import read_json

    folder = RunDir(root)
    recipe = read_recipe(folder)
    epochs, sft_epochs = recipe["train"]["epochs"], recipe["sft"]["epochs"]
    amounts: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    examples = {split: list(read_lines(folder.examples(split), Example)) for split in ("train", "heldout", "sft")}
    sizes = {
        example.id: len(example.prompt_ids) + len(example.response_ids) - 1
        for split in examples.values()
        for example in split
    }
    everything = [example for split in examples.values() for example in split]
    amounts["prompt, tokens"] = sum(len(example.prompt_ids) for example in everything) / len(everything)
    amounts["real response, tokens"] = sum(len(example.response_ids) for example in everything) / len(everything)
    amounts["tokens trained on"] = sft_epochs * sum(sizes[example.id] for example in examples["sft"])
    amounts["optimizer steps"] = len(folder.train_log.read_text().splitlines())
    for t in [START, *(int(path.name.split("-")[1]) for path in root.glob("iteration-*"))]:
        sampled = {record.id: record.token_ids for record in read_lines(folder.heldout_sampled(t), HeldoutSampled)}
        greedy = [record.token_ids for record in read_lines(folder.heldout_greedy(t), HeldoutGreedy)]
        shards = folder.iteration(t).glob("generations/*")
        opponent = [record.token_ids for path in shards for record in read_lines(path, Generation)]
        amounts["tokens generated"] += sum(map(len, [*greedy, *sampled.values(), *opponent]))
        # The player reads its response together with the opponent's (added below); the starting player reads it, too.
        amounts["tokens read in evaluate"] += sum(2 * (sizes[id] + len(ids) - 1) for id, ids in sampled.items())
        for split in ("train", "heldout"):
            rows = read_pairs(sorted(folder.iteration(t).glob(f"pairs/{split}-*"))).to_pylist()
            rows = [row for row in rows if row["contrast"]]
            prompts = {row["id"]: len(row["prompt_ids"]) + len(row["real_ids"]) - 1 for row in rows}
            responses = sum(len(row["synthetic_ids"]) - 1 for row in rows)
            amounts["tokens of reference_logprobs"] += sum(prompts.values()) + responses
            if split == "train":
                amounts["pairs"] += len(rows)
                amounts["tokens trained on"] += epochs * (sum(prompts.values()) + responses)
            else:
                amounts["tokens read in evaluate"] += responses
    amounts["tokens generated, at most"] = amounts["tokens generated"]
    for marker in root.rglob("*.done"):
        metadata = read_json(marker)
        if metadata.get("resumed"):
            sys.exit(f"{marker}: this stage was interrupted, so its time is unknown. Delete {root} and run again")
        seconds[marker.stem] += metadata["seconds"]
    return amounts, seconds


def table(names: list[str], predicted: dict[str, float], measured: dict[str, float]) -> list[str]:
    lines = ["| | predicted | measured | ratio | |", "|---|---|---|---|---|"]
    for name in names:
        ratio = predicted[name] / measured[name] if measured[name] else float("nan")
        mark = "" if abs(ratio - 1) <= TOLERANCE or name.endswith("at most") else "off"
        lines.append(f"| {name} | {predicted[name]:,.0f} | {measured[name]:,.0f} | {ratio:.2f} | {mark} |")
    return lines


def play(folder: Path, overrides: list[str], processor: bool) -> None:
    """Run a recipe in this process."""
    from spinlm.recipe.load import load_recipe
    from spinlm.rundir import layout
    from spinlm.selfplay import run

    if processor:  # markers then hold processor time
        vars(layout)["time"] = SimpleNamespace(**vars(time) | {"monotonic": time.process_time})
    run(load_recipe(RECIPE, overrides), folder)


def check(folder: Path, args: argparse.Namespace) -> None:
    """Plan, play and compare each run."""
    joined = folder / "joined.jsonl"
    join_rows(joined)
    runs = {"quickstart": list(FIRST), "joined": [f"data.path={joined}", *JOINED]}
    if args.data is not None:
        runs[args.data.stem] = [f"data.path={args.data.absolute()}", *GIVEN]
    factors: dict[str, float] = {}
    for name, overrides in runs.items():
        overrides += SMALL if args.small else ()
        amounts, assumed = predict(overrides)
        options = [*(["--processor"] if args.processor else []), "--play", str(folder / name), *overrides]
        threads = {"OMP_NUM_THREADS": "1"} if args.processor else {}
        command = [sys.executable, __file__, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **threads})
        measured_amounts, measured_seconds = measure(folder / name)
        print(f"\n**{name}**: `{' '.join(overrides)}`\n")
        print("\n".join(table(list(amounts), amounts, measured_amounts)))
        print("\nseconds, " + ("at the speeds assumed" if not factors else "with the factors of the first run") + "\n")
        predicted: dict[str, Any] = {stage: factors.get(stage, 1.0) * assumed[stage] for stage in STAGES}
        predicted["total"] = sum(predicted.values())
        measured_seconds["total"] = sum(measured_seconds[stage] for stage in STAGES)
        print("\n".join(table([*STAGES, "total"], predicted, measured_seconds)))
        factors = factors or {stage: measured_seconds[stage] / assumed[stage] for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="add a run on this .jsonl file")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--processor", action="store_true", help="measure processor time, not wall-clock time")
    parser.add_argument("--small", action="store_true", help="make the runs smaller")
    parser.add_argument("--play", nargs="+", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        play(Path(args.play[0]), args.play[1:], args.processor)
    elif args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
        check(args.folder, args)
    else:
        with tempfile.TemporaryDirectory() as name:
            check(Path(name), args)


if __name__ == "__main__":
    main()
