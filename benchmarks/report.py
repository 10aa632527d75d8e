"""Run the benchmarks and write docs/performance.md; `make bench` does this.

    python benchmarks/report.py [--data GSM8K.jsonl] [--rounds 3]
    python benchmarks/report.py --parts gpt-neo
    python benchmarks/report.py --insert SECTION.md

The tables are measured by this script. The text below the tables comes from benchmarks/reading.md. The second command
measures one section (8 minutes) and replaces it in the page; the third one replaces the section that a file holds.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from flops import SMOLLM2, flops, peak_gflops
from training import CONTENDERS, GPT_NEO, Shape, compare, table

HERE = Path(__file__).parent
TARGET = HERE.parent / "docs" / "performance.md"
SHORT = ("spinlm", "trl-best-1")
PACKAGES = ("spinlm", "torch", "transformers", "peft", "accelerate", "trl")
SHAPES: tuple[tuple[str, Shape, tuple[str, ...]], ...] = (
    (
        "128 + 128, one synthetic response (iteration 0), float32",
        Shape(),
        (*CONTENDERS, "spinlm-checkpointed"),
    ),
    ("128 + 128, two synthetic responses to a prompt (later iterations), float32", Shape(opponents=2), CONTENDERS),
    ("128 + 128, one synthetic response, bfloat16", Shape(dtype="bfloat16"), CONTENDERS),
    ("512 + 64, one synthetic response, float32", Shape(prompt=512, response=64), SHORT),
    ("32 + 256, one synthetic response, float32", Shape(prompt=32, response=256), SHORT),
)


GPT_NEO_SHAPES: tuple[tuple[str, Shape, tuple[str, ...], int], ...] = (
    (
        "256 + 128, one synthetic response, two pairs per step",
        Shape(prompt=256, pairs=2, model=GPT_NEO),
        ("spinlm", "spinlm-rows", "trl", "trl-best-1"),
        2,
    ),
    (
        "256 + 128, two synthetic responses to a prompt, four pairs per step",
        Shape(prompt=256, opponents=2, model=GPT_NEO),
        ("spinlm", "spinlm-rows", "trl-best-1"),
        1,
    ),
)


SCALING = (
    "A model of three tiny layers on one thread, so that the time is not the model's: seconds of each stage, and its "
    "peak memory above the loaded model."
)


def training(rounds: int, threads: int, data: str, count: int) -> list[str]:
    shapes = list(SHAPES[:count])
    if data and count > len(SHAPES):
        shapes.append(("lengths of GSM8K, one synthetic response, float32", Shape(data=data, pairs=8), SHORT))
    lines = [
        "SmolLM2-135M with LoRA of rank 16 on all linear layers, four pairs per step (eight with the lengths of "
        "GSM8K). `trl` is DPOTrainer with its defaults. `trl-best` computes the reference once and has no "
        "gradient checkpointing; `trl-best-1` is the same with one pair per pass. `spinlm-checkpointed` has "
        "gradient checkpointing, as `trl` has. Rates count two epochs and all reference passes. In bfloat16, TRL "
        "uses autocast over float32 weights and spinlm bfloat16 weights. Before the timing, loss and gradients of "
        "all contenders agree: to 1e-4 of the gradient's norm in float32, to 0.2 in bfloat16.",
    ]
    for title, given, contenders in shapes:
        shape = replace(given, threads=threads)
        main = shape.dtype == "float32" and len(contenders) > 2
        results = compare(shape, rounds if main else 1, contenders)
        lines += ["", f"**{title}**", "", table(results, shape)]
        if not shape.data:
            step, score = flops(SMOLLM2, shape)
            rate = peak_gflops(shape.dtype, threads=threads)
            ours = results["spinlm"]
            lines += [
                "",
                f"Step and reference: {step / 1e9:.0f} and {score / 1e9:.0f} GFLOP, at "
                f"{step / ours.step / 1e9:.0f} and {score / ours.score / 1e9:.0f} GFLOP/s. A large matrix product: "
                f"{rate:.0f} GFLOP/s.",
            ]
        print("\n".join(lines[-6:]), flush=True)
    return lines


def gpt_neo(threads: int) -> list[str]:
    lines = [
        "## The shape of GPT-Neo-125M",
        "",
        f"Measured on {datetime.date.today()}: {machine()}, {threads} threads. Random weights, 12 layers, of which 6 "
        "attend to the last 256 tokens; LoRA of rank 16, float32. `spinlm-rows` is spinlm without prefix sharing: one "
        "response per row. The first table has medians of two measurements.",
    ]
    for title, given, contenders, rounds in GPT_NEO_SHAPES:
        shape = replace(given, threads=threads)
        lines += ["", f"**{title}**", "", table(compare(shape, rounds, contenders), shape)]
    options = ("--threads", str(threads), "--rounds", "1", "--prompts", "32", "--model", GPT_NEO)
    return [*lines, "", "**Generation.** " + run_script("generation.py", *options)]


def replace_section(section: list[str]) -> None:
    """Replace the section of this title in the page, or insert it before the last section, which is the text."""
    title, page = section[0], TARGET.read_text(encoding="utf-8")
    head, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    others = [one for one in sections if one.splitlines()[0] != title]
    place = next((i for i, one in enumerate(sections) if one.splitlines()[0] == title), len(sections) - 1)
    others.insert(place, "\n".join(section).strip() + "\n\n")
    TARGET.write_text("".join([head, *others]), encoding="utf-8")
    print(f"wrote {title[3:]!r} to {TARGET}")


def run_script(name: str, *arguments: str) -> str:
    """Run another benchmark in a separate process, and return the Markdown that it prints."""
    done = subprocess.run([sys.executable, HERE / name, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[")]  # log lines of other packages
    print("\n".join(lines), flush=True)
    return "\n".join(lines).strip()


def machine() -> str:
    names = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    return f"{', '.join(names)}, {os.cpu_count()} virtual cores, no GPU used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rows", default="25000,50000")
    parser.add_argument("--shapes", type=int, default=99, help="maximum number of training shapes")
    parser.add_argument("--parts", default="training,generation,gpt-neo,scaling")
    parser.add_argument(
        "--insert", type=Path, metavar="FILE", help="replace one section by this Markdown; no measuring"
    )
    args = parser.parse_args()
    if args.insert is not None or args.parts == "gpt-neo":
        section = args.insert.read_text(encoding="utf-8").splitlines() if args.insert else gpt_neo(args.threads)
        print("\n".join(section))
        replace_section(section)
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    data = ("--data", args.data) if args.data else ()
    command = " ".join(["python benchmarks/report.py", *(Path(one).name for one in sys.argv[1:])])
    parts = [
        "# Performance",
        "",
        f"Measured by `{command}` on {datetime.date.today()}: {machine()}, {args.threads} threads, Python "
        f"{platform.python_version()}, {versions}. Contenders take turns. Lengths are tokens of "
        f"prompt + response. Times of 128 + 128 in float32 are medians of {args.rounds}, all others are single "
        "measurements. The machine is noisy: read the ratios.",
    ]
    for part in args.parts.split(","):
        match part:
            case "training":
                parts += [
                    "",
                    "## Training and scoring",
                    "",
                    *training(args.rounds, args.threads, args.data, args.shapes),
                ]
            case "generation":
                options = ("--threads", str(args.threads), "--rounds", "1")
                parts += ["", "## Generation", "", run_script("generation.py", *data, *options)]
            case "gpt-neo":
                parts += ["", *gpt_neo(args.threads)]
            case "scaling":
                parts += ["", "## As the data grows", "", SCALING, "", run_script("scaling.py", "--rows", args.rows)]
            case _:
                raise SystemExit(f"no part {part!r}")
        reading = (HERE / "reading.md").read_text(encoding="utf-8").strip()
        TARGET.write_text("\n".join([*parts, "", reading]) + "\n", encoding="utf-8")
        print(f"wrote {TARGET} with {part}")


if __name__ == "__main__":
    main()
