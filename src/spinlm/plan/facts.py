"""What the plan rests on, and what there is to say about it."""

from collections.abc import Iterator

from spinlm.plan.estimate import OPTIMIZER_BYTES, Plan
from spinlm.plan.shapes import Shape


def facts(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """The numbers the plan rests on: name, value, and where it comes from."""
    recipe, lengths = plan.recipe, plan.lengths
    if plan.shape is None:
        yield "model", "shape unknown", f"unknown: {plan.shape_source}"
    else:
        yield "model", _words(plan.shape), plan.shape_source
    yield "prompts", f"{plan.prompts:,}, and {recipe.data.heldout:,} held out", _prompts_source(plan)
    yield "prompt + response", f"{lengths.prompt:,} + {lengths.real:,} tokens", lengths.source
    source = "at most: " if lengths.limits else "assumed: as long as the real ones, at most "
    yield "synthetic response", f"{lengths.synthetic:,} tokens", f"{source}opponent.max_new_tokens"
    if plan.shape and recipe.lora:
        yield "trained", f"{plan.shape.trained(recipe.lora):,} parameters", "the LoRA adapter, from the shape"
    if recipe.train.packing != "pair":
        layout = "one row for all responses" if plan.trees else "one response per row"
        yield "layout", layout, "assumed for time; the run measures whether the model can take trees"
    for device in plan.devices if plan.shape else ():
        yield from device.speeds(recipe.opponent.batch_size)


def _words(shape: Shape) -> str:
    keys = f" ({shape.kv_heads} for keys)" if shape.kv_heads != shape.heads else ""
    sizes = f"{shape.layers} layers of {shape.hidden:,}, {shape.heads} heads{keys}, {shape.vocab:,} tokens"
    return f"{shape.parameters:,} parameters: {sizes}"


def _prompts_source(plan: Plan) -> str:
    asked, examples, counted = plan.recipe.data.prompts, plan.lengths.examples, plan.lengths.counted
    if examples is None:
        return "data.prompts" if asked else "assumed: data.prompts is not set"
    if plan.prompts == asked:
        return f"data.prompts, out of {examples:,} ({counted})"
    return f"{examples:,} less {plan.set_apart:,} set apart ({counted})"


def notes(plan: Plan) -> Iterator[str]:
    """What makes the numbers less than certain, or the run impossible."""
    recipe, examples, asked = plan.recipe, plan.lengths.examples, plan.recipe.data.prompts or 1
    if plan.shape is None:
        yield f"Memory, disk for players and time are missing: {plan.shape_source}."
    if examples is None and recipe.data.prompts is None:
        yield (
            "data.prompts is not set, and only the rows of a local .jsonl file are counted: for every "
            f"{plan.prompts:,} prompts the run does what is shown here."
        )
    if examples is not None and asked > examples - plan.set_apart:
        yield (
            f"{recipe.data.path} has {examples:,} examples: too few for {asked:,} prompts beside {plan.set_apart:,} "
            f"that are set apart, so the run will refuse it. Counted with {plan.prompts:,}."
        )
    if plan.lengths.limits:
        yield (
            "Lengths are the longest possible: tokens, time and disk are at most as shown, and with shorter prompts "
            "trees save less. A local .jsonl file as data.path gives estimates instead."
        )
    if plan.shape and recipe.train.packing == "auto" and not plan.trees:
        yield f"{plan.shape.family}'s attention cannot take trees: time is counted with one response per row."
    for name in dict.fromkeys(plan.optimizers) if plan.shape else ():
        if name.lower() not in OPTIMIZER_BYTES:
            yield f"The state of the optimiser {name} is not known; counted as 8 bytes per parameter, like AdamW."
