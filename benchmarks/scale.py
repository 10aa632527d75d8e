"""What `spinlm plan`'s model says of runs larger than any that was tried here, as a Markdown table.

    python benchmarks/scale.py

Each run is the recipe of the paper's experiment with another model, more prompts and the changes named; lengths are
assumed, not the data's. Nothing is loaded or downloaded. Hours are of the whole run, files those of pairs in an
iteration; † is more than a GPU of 80 GB has.
"""

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from spinlm.plan import Plan, make_plan
from spinlm.plan.devices import GPU
from spinlm.plan.disk import disk, total
from spinlm.recipe.load import load_recipe
from spinlm.rundir.stage_graph import START

RECIPE = Path(__file__).parent.parent / "recipes" / "zephyr-7b-ultrachat.yaml"
PROMPT, RESPONSE = 300, 250  # tokens in a typical example, and a response of the opponent is as long


@dataclass(frozen=True)
class Scale:
    name: str
    changes: tuple[str, ...]  # to the recipe
    spread: tuple[tuple[int, bool], ...]  # GPUs, and whether they divide the model


SCALES = (
    Scale("zephyr-7B, 50,000 prompts", (), ((1, False), (8, False), (8, True), (64, True))),
    Scale("The same with LoRA", ("lora={r: 64}", "train.optimizer=adamw"), ((1, False), (8, False), (64, False))),
    Scale(
        "Llama-3.1-70B, 200,000 prompts",
        ("model.path=meta-llama/Llama-3.1-70B", "data.prompts=200000", "train.batch_size=256"),
        ((8, True), (64, True)),
    ),
    Scale(
        "Llama-3.1-8B, 10,000,000 prompts",
        (
            *("model.path=meta-llama/Llama-3.1-8B", "data.prompts=10000000", "opponent.batch_size=128"),
            *("train.batch_size=2048", "train.epochs=1"),
        ),
        ((1, False), (8, True), (64, True)),
    ),
)


def plan_of(scale: Scale, processes: int, divided: bool) -> Plan:
    sharding = f"train.fsdp={'full_shard' if divided else 'none'}"
    plan = make_plan(load_recipe(RECIPE, [*scale.changes, sharding]), processes=processes)
    lengths = replace(plan.lengths, prompt=PROMPT, real=RESPONSE, synthetic=RESPONSE, longest_prompt=1500, limits=False)
    return replace(plan, lengths=lengths)


def row(scale: Scale, processes: int, divided: bool) -> list[str]:
    plan = plan_of(scale, processes, divided)
    assert plan.shape
    hours = [plan.hours(plan.shape, GPU, work) for work in plan.work]
    stages = [plan.preparing, *(sum(column) for column in zip(*hours, strict=True))]
    memory = plan.memory(plan.shape, GPU)
    speed, _ = GPU.bandwidth(processes)
    sent = plan.traffic(plan.shape, GPU, plan.work[-1])
    moving = sum(work.steps * plan.traffic(plan.shape, GPU, work) / speed / 3600 for work in plan.work)
    room = total(disk(plan))
    shards = disk(plan)["pairs"].files // 2 // sum(work.iteration != START for work in plan.work)
    return [
        f"{processes}{', divided' if divided else ''}",
        *(f"{hour:,.0f}" if hour >= 10 else f"{hour:.1f}" for hour in stages),
        *(_fits(memory[what]) for what in ("training", "generating")),
        *([f"{sent / 1e9:,.1f} GB, {sent / speed:.1f} s", f"{moving:,.1f}"] if processes > 1 else ["", ""]),
        f"{(room.total or 0) / 1e12:,.2f}",
        f"{shards:,}",
    ]


def _fits(size: int) -> str:
    return f"{size / 1e9:,.0f}{'' if size <= GPU.memory else ' †'}"


def table(scale: Scale) -> str:
    head = ["GPUs", "prepare", "generate", "reference_logprobs", "train", "evaluate", "GB train", "GB generate"]
    head += ["sent in a step", "sending", "TB", "files"]
    rows = [head, ["---"] * len(head), *(row(scale, *spread) for spread in scale.spread)]
    changes = f": {', '.join(f'`{change}`' for change in scale.changes)}" if scale.changes else ""
    return (
        textwrap.fill(f"**{scale.name}**{changes}", 120)
        + "\n\n"
        + "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    )


def main() -> None:
    print("\n\n".join(map(table, SCALES)))


if __name__ == "__main__":
    main()
