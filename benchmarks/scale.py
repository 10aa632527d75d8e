"""Print a Markdown table of estimates for the experiment of the paper, which was not run.

    python benchmarks/scale.py

Each run is the recipe of that experiment with the listed changes. Lengths are assumed. Nothing is loaded or
downloaded. Hours are for the whole run; † is more than a GPU of 80 GB has.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from spinlm.plan.costs import iteration_costs
from spinlm.plan.devices import GPU, DeviceModel
from spinlm.plan.lengths import Lengths
from spinlm.plan.model_shape import shape_from_config
from spinlm.recipe.load import load_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "zephyr-7b-ultrachat.yaml"
LENGTHS = Lengths(prompt=300, real=250, synthetic=250, longest_prompt=1500, source="assumed", are_limits=False)

MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}


@dataclass(frozen=True)
class Scale:
    name: str
    changes: tuple[str, ...]  # to the recipe
    spread: tuple[tuple[int, bool], ...]  # number of GPUs, and whether they shard the model


SCALES = (
    Scale("zephyr-7B, 50,000 prompts", (), ((1, False), (8, False), (8, True), (64, True))),
    Scale(
        "The same with LoRA",
        ("lora={r: 64}", "train.optimizer=adamw"),
        ((1, False), (8, False), (64, False)),
    ),
)


def row(scale: Scale, processes: int, sharded: bool) -> list[str]:
    recipe = load_recipe(RECIPE, [*scale.changes, f"train.fsdp={'full_shard' if sharded else 'none'}"])
    model = DeviceModel(recipe, LENGTHS, shape_from_config(MISTRAL_7B), GPU, processes)
    times = [model.stage_time(cost) for cost in iteration_costs(recipe, LENGTHS, prefix_sharing=True)]
    stages = ("generate", "reference_logprobs", "train", "evaluate")
    hours = [sum(getattr(time, stage) for time in times) for stage in stages]
    memory = model.memory()
    return [
        f"{processes}{', sharded' if sharded else ''}",
        *(f"{hour:,.0f}" if hour >= 10 else f"{hour:.1f}" for hour in hours),
        *(
            f"{size / 1e9:,.0f}{'' if size <= GPU.memory else ' †'}"
            for size in (memory["training"], memory["generating"])
        ),
    ]


def table(scale: Scale) -> str:
    head = ["GPUs", "generate", "reference_logprobs", "train", "evaluate", "GB to train", "GB to generate"]
    rows = [head, ["---"] * len(head), *(row(scale, *spread) for spread in scale.spread)]
    changes = f": {', '.join(f'`{change}`' for change in scale.changes)}" if scale.changes else ""
    title = textwrap.fill(f"**{scale.name}**{changes}", 120)
    return "\n".join((title, "", *(f"| {' | '.join(cells)} |" for cells in rows)))


def main() -> None:
    print("\n\n".join(map(table, SCALES)))


if __name__ == "__main__":
    main()
