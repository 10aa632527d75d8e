"""The plan of a run: costs, memory and time, what these assume, and why the run would be refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spinlm.errors import ModelError, RecipeError
from spinlm.evals.scorers import get_scorer
from spinlm.model.families import check_row_length
from spinlm.plan.costs import IterationCost, iteration_costs, num_prompts, num_reserved
from spinlm.plan.devices import DEVICES, GPU, DeviceModel, StageTime
from spinlm.plan.lengths import Lengths, find_lengths
from spinlm.plan.model_shape import UnknownShapeError, describe_trained, find_config, shape_from_config
from spinlm.recipe.adapter import with_adapter
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.resume import recipe_changes
from spinlm.utils.hardware import has_gpu
from spinlm.utils.model_path import resolve_model


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
class Plan:
    """What `spinlm plan` shows; `dataclasses.asdict` of it is its JSON."""

    model: str
    data: str
    processes: int
    prompts: int
    heldout: int
    prefix_sharing: bool  # assumed for all numbers
    iterations: tuple[IterationCost, ...]  # the start, then each iteration
    devices: tuple[DeviceEstimate, ...]  # this machine's kind first; empty without the model's shape
    lengths: Lengths
    parameters: int | None  # None without the model's shape
    shape_source: str  # where the shape was read, or why it is unknown
    trained: str  # the layers that are trained, and those that stay frozen
    refusals: tuple[str, ...]  # why the run would not start
    notes: tuple[str, ...]  # why the numbers are uncertain


def make_plan(recipe: Recipe, folder: RunDir | None = None, processes: int = 1) -> Plan:
    """Estimate what a recipe will do and need.

    Args:
        recipe: the recipe.
        folder: the run folder, which may not exist yet.
        processes: number of processes, one on each device.
    """
    adapter_error = None
    try:
        recipe = with_adapter(recipe)
    except (ModelError, RecipeError) as error:
        adapter_error = str(error)
    lengths = find_lengths(recipe)
    config: dict[str, Any] = {}
    shape = None
    try:
        config, shape_source = find_config(recipe.model)
        shape = shape_from_config(config)
    except UnknownShapeError as error:
        shape_source = str(error)
    prefix_sharing = recipe.train.prefix_sharing != "never"  # all families that the plan knows support it
    iterations = iteration_costs(recipe, lengths, prefix_sharing)
    devices = sorted(DEVICES[recipe.model.dtype], key=lambda device: (device is GPU) != has_gpu())
    models = [DeviceModel(recipe, lengths, shape, device, processes) for device in devices if shape]
    estimates = tuple(_device_estimate(model, iterations) for model in models)
    return Plan(
        model=recipe.start,
        data=recipe.data.where,
        processes=processes,
        prompts=num_prompts(recipe, lengths),
        heldout=recipe.data.heldout,
        prefix_sharing=prefix_sharing,
        iterations=iterations,
        devices=estimates,
        lengths=lengths,
        parameters=shape.parameters if shape else None,
        shape_source=shape_source,
        trained=describe_trained(config, shape, recipe.lora),
        refusals=(*filter(None, [adapter_error]), *_refusals(recipe, config, lengths, folder)),
        notes=tuple(_notes(recipe, lengths, shape_source, estimates)),
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


def _refusals(recipe: Recipe, config: Mapping[str, Any], lengths: Lengths, folder: RunDir | None) -> Iterator[str]:
    """Yield why the run would not start, as far as that is known without loading anything."""
    try:
        resolve_model(recipe.model.path)
        resolve_model(recipe.model.base_model.path)
        check_row_length(recipe.model.base_model.path, config, recipe.train.max_length)
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
    examples, prompts, reserved = lengths.examples, recipe.data.prompts or 1, num_reserved(recipe)
    # With all turns as examples, their number is an estimate; otherwise a row has at most one.
    if examples is not None and recipe.data.turns != "all" and prompts > examples - reserved:
        sft = reserved - recipe.data.heldout
        yield (
            f"{recipe.data.where} has {examples:,} examples: too few for {prompts:,} prompts, "
            f"{recipe.data.heldout:,} held-out examples{f' and {sft:,} examples for SFT alone' if sft else ''}. "
            f"Lower data.heldout{', data.prompts or sft.prompts' if sft else ' or data.prompts'}"
        )
    if folder is not None and (changes := recipe_changes(folder, recipe)):
        yield "\n  ".join(("the run folder was made with a different recipe:", *changes))


def _notes(recipe: Recipe, lengths: Lengths, shape_source: str, devices: tuple[DeviceEstimate, ...]) -> Iterator[str]:
    """Yield why the numbers are uncertain."""
    if lengths.examples is None and recipe.data.prompts is None and not lengths.data_error:
        yield (
            "data.prompts is not set, and the plan does not count the rows of hub data sets and large files. The plan "
            f"is for {num_prompts(recipe, lengths):,} prompts."
        )
    if lengths.bad_rows:
        yield lengths.bad_rows
    if lengths.are_limits:
        yield "Lengths are upper limits, so tokens and time are, too. From a local file the plan estimates lengths."
    if not devices:
        yield f"Memory and time are unknown, because the shape of the model is unknown: {shape_source}."
    for device in (device for device in devices if device.name == GPU.name):
        for phase in ("training", "generating"):
            if device.memory[phase] > device.capacity:
                size, limit = (f"{number / 1e9:,.0f} GB" for number in (device.memory[phase], device.capacity))
                yield f"{phase.capitalize()} takes {size} on each GPU, more than the {limit} of an H100."
    if recipe.opponent.engine == "server":
        yield "The speed of the server is unknown: the time to generate is for this process."
