"""What `spinlm plan`'s model says of runs larger than any that was tried here, as a Markdown table.

    python benchmarks/scale.py

Each run is the recipe of the paper's experiment with another model, more prompts and the changes named; lengths are
assumed, not the data's. Nothing is loaded or downloaded.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from spinlm.plan import Plan, make_plan
from spinlm.plan.devices import GPU
from spinlm.plan.disk import disk, total
from spinlm.plan.shapes import Shape, shape_from_config
from spinlm.recipe import load_recipe
from spinlm.rundir import START

RECIPE = Path(__file__).parent.parent / "recipes" / "zephyr-7b-ultrachat.yaml"
PROMPT, RESPONSE = 300, 250  # tokens in a typical example, and a response of the opponent is as long


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> Shape:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    return shape_from_config(
        {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv_heads, **sizes}
    )


MISTRAL_7B = llama(4096, 14336, 32, 32, 8, 32_000)
LLAMA_8B = llama(4096, 14336, 32, 32, 8, 128_256)
LLAMA_70B = llama(8192, 28672, 80, 64, 8, 128_256)


@dataclass(frozen=True)
class Scale:
    name: str
    shape: Shape
    changes: tuple[str, ...]
    spread: tuple[tuple[int, bool], ...]  # GPUs, and whether they divide the model


SCALES = (
    Scale("zephyr-7B, 50,000 prompts", MISTRAL_7B, (), ((1, False), (8, False), (8, True), (64, True))),
    Scale(
        "the same with LoRA, r = 64",
        MISTRAL_7B,
        ("lora={r: 64}", "train.optimizer=adamw"),
        ((1, False), (8, False), (64, False)),
    ),
    Scale(
        "Llama-3-70B, 200,000 prompts, batches of 256",
        LLAMA_70B,
        ("data.prompts=200000", "train.batch_size=256"),
        ((8, True), (64, True)),
    ),
    Scale(
        "Llama-3-8B, 10,000,000 prompts, batches of 2048, one epoch, 256 responses at once",
        LLAMA_8B,
        ("data.prompts=10000000", "train.batch_size=2048", "train.epochs=1", "opponent.batch_size=256"),
        ((1, False), (8, True), (64, True)),
    ),
)


class Divided(Plan):
    """A plan in which the processes divide the model."""

    @property
    def sharded(self) -> bool:
        return True


def plan_of(scale: Scale, processes: int, divided: bool) -> Plan:
    plan = make_plan(load_recipe(RECIPE, list(scale.changes)), processes=processes)
    lengths = replace(plan.lengths, prompt=PROMPT, real=RESPONSE, synthetic=RESPONSE, longest_prompt=1500, limits=False)
    plan = replace(plan, shape=scale.shape, lengths=lengths)
    return Divided(**{field.name: getattr(plan, field.name) for field in fields(plan)}) if divided else plan


def row(scale: Scale, processes: int, divided: bool) -> list[str]:
    plan = plan_of(scale, processes, divided)
    assert plan.shape
    hours = [plan.hours(plan.shape, GPU, work) for work in plan.work]
    stages = [sum(column) for column in zip(*hours, strict=True)]
    memory = plan.memory(plan.shape, GPU)
    speed, _ = GPU.bandwidth(processes)
    sent = plan.traffic(plan.shape, GPU, plan.work[-1])
    moving = sum(work.steps * plan.traffic(plan.shape, GPU, work) / speed / 3600 for work in plan.work)
    room = total(disk(plan))
    shards = disk(plan)["pairs"].files // sum(work.iteration != START for work in plan.work)
    return [
        f"{processes}{', divided' if divided else ''}",
        *(f"{hour:,.0f}" if hour >= 10 else f"{hour:.1f}" for hour in stages),
        *(_fits(memory[what]) for what in ("training", "generating")),
        *([f"{sent / 1e9:,.1f} GB, {sent / speed:.1f} s", f"{moving:,.1f}"] if processes > 1 else ["", ""]),
        *(f"{(size or 0) / 1e12:,.2f}" for size in (room.last, room.total)),
        f"{shards:,}",
    ]


def _fits(size: int) -> str:
    return f"{size / 1e9:,.0f}{'' if size <= GPU.memory else ' †'}"


def table(scale: Scale) -> str:
    head = [
        "GPUs",
        "generate, h",
        "score, h",
        "train, h",
        "evaluate, h",
        "GB training",
        "GB generating",
        "sent in a step",
    ]
    head += ["sending, h", "TB an iteration", "TB in all", "pair files an iteration"]
    rows = [head, ["---"] * len(head), *(row(scale, *spread) for spread in scale.spread)]
    changes = f" (`{' '.join(scale.changes)}`)" if scale.changes else ""
    return f"**{scale.name}**{changes}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    print("\n\n".join(map(table, SCALES)))


if __name__ == "__main__":
    main()
