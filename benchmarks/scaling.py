"""Measure time and resident memory of every stage as the data grows. The model is tiny, so its cost is small.

    python benchmarks/scaling.py [--rows 25000,50000]

Time may grow with the rows. Memory may grow by a hash per row only: rows are read from disk as they are needed. Each
stage is a separate process; memory is the peak above what the process held after torch and the model were loaded.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = ("prepare", "generate", "reference_logprobs", "train")
WORDS = ("red", "stone", "river", "seven", "lamp", "green", "orange", "table", "north", "wind", "paper", "under")


def recipe(folder: Path, rows: int) -> dict[str, Any]:
    """Make a recipe: one iteration over all rows. As Python objects, 50k tokenized texts would take about 100 MB."""
    return {
        "model": {"path": str(folder / "model")},
        "lora": {"r": 2},
        "data": {"path": str(folder / f"{rows}.jsonl"), "prompts": rows - 64, "heldout": 64},
        "opponent": {"max_new_tokens": 8, "batch_size": 256},
        "selfplay": {"iterations": 1},
        "train": {"epochs": 1, "batch_size": 64, "learning_rate": 1e-4, "tokens_per_micro_batch": 16384},
    }


def write_rows(path: Path, rows: int) -> None:
    pick = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            prompt, response = (" ".join(pick.choices(WORDS, k=8)) for _ in range(2))
            file.write(json.dumps({"prompt": f"{number} {prompt}", "response": response}) + "\n")


def stage(name: str, folder: Path, rows: int) -> None:
    """Run one stage. Print its seconds, and peak memory before and after it."""
    import importlib

    import torch

    from spinlm.model.run import Run
    from spinlm.recipe.load import parse_recipe
    from spinlm.rundir.layout import RunDir
    from spinlm.rundir.resume import claim_recipe

    torch.set_num_threads(1)
    parsed = parse_recipe(recipe(folder, rows))
    run = Run(parsed, RunDir(folder / f"run-{rows}"))
    if name == "prepare":
        claim_recipe(run.folder, parsed)
    _ = run.players.model
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = _peak()
    began = time.perf_counter()
    work = getattr(importlib.import_module(f"spinlm.stages.{name}"), name)
    if name == "prepare":
        from spinlm.stages.sft import sft

        work(run)
        sft(run)
    else:
        work(run, 0)
    print(json.dumps({"seconds": time.perf_counter() - began, "before": before, "peak": _peak()}))


def _peak() -> float:
    """Return the peak resident memory of this process in MB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3


def measure(sizes: list[int]) -> str:
    """Return a Markdown table: for each stage and size, seconds and MB above the loaded model."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from models import save_tiny_model

    lines = [
        "| stage | " + " | ".join(f"{size:,} rows" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model", max_position_embeddings=2048)
        measured: dict[tuple[str, int], dict[str, float]] = {}
        for size in sizes:
            write_rows(folder / f"{size}.jsonl", size)
            for one in STAGES:
                command = [sys.executable, __file__, "--stage", one, str(folder), str(size)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured[one, size] = json.loads(done.stdout.strip().splitlines()[-1])
        for one in STAGES:
            cells = [measured[one, size] for size in sizes]
            shown = [f"{cell['seconds']:.0f} s, +{cell['peak'] - cell['before']:.0f} MB" for cell in cells]
            lines.append(f"| {one} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        stage(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="25000,50000")
    print(measure([int(size) for size in parser.parse_args().rows.split(",")]))


if __name__ == "__main__":
    main()
