"""The plan of a run: costs, memory and time, what these assume, and why the run would be refused."""

from collections.abc import Iterator
from dataclasses import dataclass

from spinlm.data.sources import names_a_file
from spinlm.errors import ModelError, RecipeError
from spinlm.evals.scorers import get_scorer
from spinlm.plan.costs import IterationCost, iteration_costs, num_prompts, num_reserved
from spinlm.plan.devices import DEVICES, GPU, TOKENIZER_SPEED, DeviceModel, StageTime
from spinlm.plan.lengths import MAX_FILE_BYTES, Lengths, find_lengths
from spinlm.plan.model_shape import Shape, UnknownShapeError, find_shape
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.resume import recipe_changes
from spinlm.rundir.stage_graph import START, stages
from spinlm.training.memory import OPTIMIZER_BYTES, optimizer_bytes
from spinlm.utils.hardware import has_gpu
from spinlm.utils.model_path import existing_path, resolve_model


@dataclass(frozen=True, slots=True)
class DeviceEstimate:
    """Memory and time on one kind of device."""

    name: str
    dtype: str
    speed: str  # as assumed
    capacity: float  # bytes of memory
    gradient_checkpointing: bool
    memory: dict[str, int]  # part to peak bytes of one process
    hours: list[StageTime]  # of the start, then of each iteration


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes of the largest files in the run folder."""

    players: int  # the starting player and one for each iteration
    checkpoint: int  # kept while training
    base: int  # the model of a .gguf file, unpacked


@dataclass(frozen=True, slots=True)
class Plan:
    """What `spinlm plan` shows; `dataclasses.asdict` of it is its JSON."""

    model: str
    data: str
    processes: int
    prompts: int
    heldout: int
    iterations: tuple[IterationCost, ...]  # the start, then each iteration
    devices: tuple[DeviceEstimate, ...]  # this machine's kind first; empty without the model's shape
    prepare_hours: float
    disk: DiskUsage | None  # None without the model's shape
    lengths: Lengths
    parameters: int | None  # None without the model's shape
    shape_source: str  # where the shape was read, or why it is unknown
    refusals: tuple[str, ...]  # why the run would not start
    notes: tuple[str, ...]  # why the numbers are uncertain
    finished: tuple[str, ...]  # stages of an existing run


def make_plan(recipe: Recipe, folder: RunDir | None = None, processes: int = 1) -> Plan:
    """Estimate what a recipe will do and need.

    Args:
        recipe: the recipe.
        folder: the run folder, which may not exist yet.
        processes: number of processes, one on each device.
    """
    changes = recipe_changes(folder, recipe) if folder else []
    lengths = find_lengths(recipe, folder if not changes else None)
    try:
        shape, shape_source = find_shape(recipe.model)
    except UnknownShapeError as error:
        shape, shape_source = None, str(error)
    iterations = iteration_costs(recipe, lengths)
    devices = sorted(DEVICES[recipe.model.dtype], key=lambda device: (device is GPU) != has_gpu())
    models = [DeviceModel(recipe, lengths, shape, device, processes) for device in devices if shape]
    prompts = num_prompts(recipe, lengths)
    done = [
        (stage, t) for stage, t in stages(recipe.selfplay.iterations) if folder and folder.marker(stage, t).exists()
    ]
    return Plan(
        model=recipe.model.path,
        data=recipe.data.path,
        processes=processes,
        prompts=prompts,
        heldout=recipe.data.heldout,
        iterations=iterations,
        devices=tuple(_device_estimate(model, iterations) for model in models),
        prepare_hours=(prompts + num_reserved(recipe)) * (lengths.prompt + lengths.real) / TOKENIZER_SPEED / 3600,
        disk=_disk_usage(recipe, shape) if shape else None,
        lengths=lengths,
        parameters=shape.parameters if shape else None,
        shape_source=shape_source,
        refusals=tuple(_refusals(recipe, lengths, changes)),
        notes=tuple(_notes(recipe, lengths, shape, shape_source, models)),
        finished=() if changes else tuple(stage if t == START else f"{stage} {t}" for stage, t in done),
    )


def _device_estimate(model: DeviceModel, iterations: tuple[IterationCost, ...]) -> DeviceEstimate:
    return DeviceEstimate(
        model.device.name,
        model.device.dtype,
        model.device.speed,
        model.device.memory,
        model.gradient_checkpointing,
        model.memory(),
        [model.stage_time(cost) for cost in iterations],
    )


def _disk_usage(recipe: Recipe, shape: Shape) -> DiskUsage:
    trained = shape.trained(recipe.lora)
    return DiskUsage(
        players=(recipe.selfplay.iterations + 1) * 4 * trained,
        checkpoint=(4 + optimizer_bytes(recipe.train.optimizer)) * trained,
        base=4 * shape.parameters if recipe.model.path.endswith(".gguf") else 0,
    )


def _refusals(recipe: Recipe, lengths: Lengths, changes: list[str]) -> Iterator[str]:
    """Yield why the run would not start, as far as that is known without loading anything."""
    try:
        resolve_model(recipe.model.path)
    except ModelError as error:
        yield str(error)
    if lengths.data_error:
        yield lengths.data_error
    scorer = recipe.evaluate.scorer
    if scorer is not None and ":" not in scorer:  # a plan does not run the user's code
        try:
            get_scorer(scorer)
        except RecipeError as error:
            yield str(error)
    # With all turns as examples, their number is an estimate; otherwise a row has at most one.
    prompts = recipe.data.prompts or 1
    if (
        lengths.examples is not None
        and recipe.data.turns != "all"
        and prompts > lengths.examples - num_reserved(recipe)
    ):
        sft = num_reserved(recipe) - recipe.data.heldout
        yield (
            f"{recipe.data.path} has {lengths.examples:,} examples: too few for {prompts:,} prompts, "
            f"{recipe.data.heldout:,} held-out examples"
            + (f" and {sft:,} examples for SFT alone" if sft else "")
            + ". "
            f"Lower data.heldout{', data.prompts or sft.prompts' if sft else ' or data.prompts'}"
        )
    if changes:
        yield "\n  ".join(("the run folder was made with a different recipe:", *changes))


def _notes(
    recipe: Recipe, lengths: Lengths, shape: Shape | None, shape_source: str, models: list[DeviceModel]
) -> Iterator[str]:
    """Yield why the numbers are uncertain."""
    is_local = names_a_file(recipe.data.path) or existing_path(recipe.data.path) is not None
    if lengths.examples is None and recipe.data.prompts is None and not lengths.data_error:
        kind = f"files over {MAX_FILE_BYTES >> 20} MiB" if is_local else "hub data sets"
        yield (
            f"data.prompts is not set, and the plan does not count the rows of {kind}. The plan is for "
            f"{num_prompts(recipe, lengths):,} prompts."
        )
    if lengths.are_limits:
        yield (
            "Lengths are upper limits, so tokens and time are, too; with shorter prompts prefix sharing saves less."
            + ("" if is_local else " With a local file as data.path the plan estimates lengths.")
        )
    if shape is None:
        yield f"Memory and time are unknown, because the model's shape is: {shape_source}."
        return
    for model in (model for model in models if model.device is GPU):
        memory = model.memory()
        for phase in ("training", "generating"):
            if memory[phase] > GPU.memory:
                size, limit = (f"{number / 1e9:,.0f} GB" for number in (memory[phase], GPU.memory))
                yield f"{phase.capitalize()} takes {size} on each GPU, more than the {limit} of an H100."
    if recipe.opponent.engine == "server":
        yield "The speed of the server is unknown: the time to generate is for this process."
    if recipe.model.load_in_4bit:
        yield "The time to dequantize 4-bit weights is not counted."
    if recipe.train.prefix_sharing == "auto" and not shape.supports_prefix_sharing:
        yield f"The attention of {shape.family} does not support prefix sharing: the plan is for one response per row."
    for name in dict.fromkeys([recipe.train.optimizer, *([recipe.sft.optimizer] if recipe.sft else [])]):
        if name.lower() not in OPTIMIZER_BYTES:
            yield f"The state of the optimizer {name} is unknown; the plan counts 8 bytes per parameter, as for AdamW."
