"""Print a Markdown table of estimates for runs larger than any that was tried.

    python benchmarks/scale.py

Each run is the recipe of the paper's experiment with another model, more prompts and the listed changes. Lengths are
assumed. Nothing is loaded or downloaded. Hours are for the whole run; † is more than a GPU of 80 GB has.
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


def llama(model_type: str, vocab: int, hidden: int, layers: int, heads: int, inner: int) -> dict[str, object]:
    """Return the config.json of a model of the Llama family with 8 key-value heads."""
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": model_type, "num_key_value_heads": 8, "intermediate_size": inner, **sizes}


MISTRAL_7B = llama("mistral", 32000, 4096, 32, 32, 14336)
LLAMA_8B = llama("llama", 128256, 4096, 32, 32, 14336)
LLAMA_70B = llama("llama", 128256, 8192, 80, 64, 28672)


@dataclass(frozen=True)
class Scale:
    name: str
    config: dict[str, object]  # of the model
    changes: tuple[str, ...]  # to the recipe
    spread: tuple[tuple[int, bool], ...]  # number of GPUs, and whether they shard the model


SCALES = (
    Scale("zephyr-7B, 50,000 prompts", MISTRAL_7B, (), ((1, False), (8, False), (8, True), (64, True))),
    Scale(
        "The same with LoRA",
        MISTRAL_7B,
        ("lora={r: 64}", "train.optimizer=adamw"),
        ((1, False), (8, False), (64, False)),
    ),
    Scale(
        "Llama-3.1-70B, 200,000 prompts",
        LLAMA_70B,
        ("data.prompts=200000", "train.batch_size=256"),
        ((8, True), (64, True)),
    ),
    Scale(
        "Llama-3.1-8B, 10,000,000 prompts",
        LLAMA_8B,
        ("data.prompts=10000000", "opponent.batch_size=128", "train.batch_size=2048", "train.epochs=1"),
        ((1, False), (8, True), (64, True)),
    ),
)


def row(scale: Scale, processes: int, sharded: bool) -> list[str]:
    recipe = load_recipe(RECIPE, [*scale.changes, f"train.fsdp={'full_shard' if sharded else 'none'}"])
    model = DeviceModel(recipe, LENGTHS, shape_from_config(scale.config), GPU, processes)
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
