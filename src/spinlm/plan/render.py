"""The plan on a terminal: tables, the numbers they rest on, and notes."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from spinlm.data.sources import names_a_file
from spinlm.errors import ModelError, RecipeError
from spinlm.evals.scorers import get_scorer
from spinlm.plan.devices import GPU, TOKENISER_SPEED, Device
from spinlm.plan.disk import disk, total
from spinlm.plan.estimate import Hours, Plan, Work
from spinlm.plan.lengths import READ_WHOLE
from spinlm.plan.model_shape import Shape
from spinlm.recipe.schema import OPTIMIZER_BYTES
from spinlm.rundir.stage_graph import START
from spinlm.utils.hardware import has_gpu
from spinlm.utils.model_path import existing_path, resolve_model

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LIBRARIES = 250_000_000  # bytes of a process that has imported PyTorch, transformers and PEFT


def render(plan: Plan) -> "RenderableType":
    """The plan for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(f"model: {plan.recipe.model.path}\ndata:  {plan.recipe.data.path}", style="bold")
    ]
    if plan.prepared:
        said = "The run has begun: lengths below are those of its examples, and times include what is done already."
        parts += [Text(said, style="green")]
    parts += [Text(f"This run will be refused: {reason}", style="red") for reason in refusals(plan)]
    for title, table in _tables(plan):
        parts += [Text(f"\n{title}", style="bold"), table]
    parts += [Text(f"note: {note}", style="yellow") for note in notes(plan)]
    if plan.finished and not plan.changed:
        parts += [Text(f"done already, will not be repeated: {', '.join(plan.finished)}", style="green")]
    return Group(*parts)


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan for programs: the same numbers, in bytes, hours and tokens."""
    sizes, shape = {**(parts := disk(plan)), "run folder": total(parts)}, plan.shape
    devices = [
        {
            "name": device.name,
            "dtype": device.dtype,
            "hours": [_named(plan.hours(shape, device, work)) for work in plan.work],
            "memory": plan.memory(shape, device),
        }
        for device in plan.devices
        if shape is not None
    ]
    return {
        "refusals": list(refusals(plan)),
        "notes": list(notes(plan)),
        "finished": list(plan.finished),
        "work": [
            {name: _named(value) for name, value in asdict(work).items()}
            | {"generated": work.generated, "generated_at_most": work.generated_at_most}
            for work in plan.work
        ],
        "devices": devices,
        "disk": {part: _named(room) for part, room in sizes.items()},
        "facts": [dict(zip(("name", "value", "source"), fact, strict=True)) for fact in facts(plan)],
    }


def _devices(plan: Plan) -> list[Device]:
    """The plan's, with this machine's own kind first."""
    return sorted(plan.devices, key=lambda device: (device is GPU) != has_gpu())


def _named(value: Any) -> Any:
    """A named tuple with its names."""
    return value._asdict() if hasattr(value, "_asdict") else value


def _tables(plan: Plan) -> Iterator[tuple[str, "Table"]]:
    yield "Work", _table(["iteration", "prompts", "responses", "pairs", "steps", "learning rate", "beta"], _work(plan))
    columns = ["iteration", "generated", "at most", "scored: tree", "rows", "trained: tree", "rows", "saved"]
    title = "Tokens: all responses to a prompt in one row (tree), or one response per row"
    yield title, _table(columns, map(_tokens, plan.work))
    if plan.shape:
        for device in _devices(plan):
            where = f"one {device.name}" if plan.processes == 1 else f"{plan.processes} × {device.name}"
            title = f"Time on {where}, at the speeds assumed below"
            yield title, _table(["iteration", *Hours._fields, "in all"], _hours(plan, plan.shape, device), "all")
        columns = [f"{device.name}, {device.dtype}" for device in _devices(plan)]
        divided = "the model divided over all" if plan.sharded else "nothing divided over devices"
        title = f"Peak memory of one process, {divided}"
        yield title, _table(["", *columns], _memory(plan, plan.shape), "training", "generating")
    yield "Disk", _table(["", "last iteration", "in all", "files, about"], _disk(plan), "run folder")
    yield "What this rests on", _table([], facts(plan))


def _table(columns: list[str], rows: Iterable[Iterable[str]], *bold: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=bool(columns))
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    for first, *others in rows:
        table.add_row(first, *others, style="bold" if first in bold else None)
    return table


def _work(plan: Plan) -> Iterator[list[str]]:
    for one in plan.work:
        counts = [one.prompts, one.responses, one.pairs, one.steps]
        rates = ["" if rate is None else f"{rate:g}" for rate in (one.learning_rate, one.beta)]
        if one.iteration != START:
            yield [_name(one), *(f"{count:,}" for count in counts), *rates]
        elif one.steps:
            yield [_name(one), f"{one.prompts:,}", "", "", f"{one.steps:,}", *rates]


def _tokens(one: Work) -> list[str]:
    rows = one.read.rows + one.trained.rows
    saved = f"{1 - (one.read.tree + one.trained.tree) / rows:.0%}" if one.pairs else ""
    return [_name(one), *map(_short, (one.generated, one.generated_at_most, *one.read, *one.trained)), saved]


def _hours(plan: Plan, shape: Shape, device: Device) -> Iterator[list[str]]:
    table = [plan.hours(shape, device, work) for work in plan.work]
    for work, row in zip(plan.work, table, strict=True):
        yield [_name(work), *map(_duration, (*row, sum(row)))]
    yield ["all", *map(_duration, (*map(sum, zip(*table, strict=True)), sum(map(sum, table))))]


def _memory(plan: Plan, shape: Shape) -> Iterator[list[str]]:
    devices = [plan.memory(shape, device) for device in _devices(plan)]
    for part in devices[0]:
        yield [part, *(_short(memory[part], "B") for memory in devices)]


def _disk(plan: Plan) -> Iterator[list[str]]:
    parts = disk(plan)
    for part, room in parts.items():
        sizes = ("unknown" if size is None else _short(size, "B") for size in (room.last, room.total))
        yield [part, *sizes, f"{room.files:,}"]
    whole, missing = total(parts), any(room.total is None for room in parts.values())
    sizes = (f"{'at least ' if missing else ''}{_short(size or 0, 'B')}" for size in (whole.last, whole.total))
    yield ["run folder", *sizes, f"{whole.files:,}"]


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
    limit = "train.max_length" if recipe.preferences else "opponent.max_new_tokens"
    yield "synthetic response", f"{lengths.synthetic:,} tokens", lengths.answered or f"{source}{limit}"
    if plan.shape and recipe.lora:
        yield "trained", f"{plan.shape.trained(recipe.lora):,} parameters", "the LoRA adapter, from the shape"
    if recipe.train.prefix_sharing != "never":
        layout = "one row for all responses" if plan.trees else "one response per row"
        yield "layout", layout, "assumed for time; the run measures whether the model can take trees"
    if plan.shape:
        modes = [f"{one.name} {'on' if plan.checkpoints(plan.shape, one) else 'off'}" for one in _devices(plan)]
        memory = ", ".join(f"{one.memory / 1e9:.0f} GB" for one in _devices(plan))
        auto = recipe.train.gradient_checkpointing == "auto"
        source = f"by need, in {memory}" if auto else "train.gradient_checkpointing"
        yield "gradient checkpointing", ", ".join(modes), source
    for device in _devices(plan) if plan.shape else ():
        yield from device.speeds(recipe.opponent.batch_size)
    yield "libraries", _short(LIBRARIES, "B"), "beside the memory above; measured on a CPU, when they are loaded"
    speed = f"assumed: {TOKENISER_SPEED:,.0f} tokens/s, in one process; a .gguf file is unpacked before that"
    yield "prepare, before all this", _duration(plan.preparing), speed
    if plan.shape and plan.processes > 1:
        yield from _sent(plan, plan.shape)


def _sent(plan: Plan, shape: Shape) -> Iterator[tuple[str, str, str]]:
    for device in _devices(plan):
        speed, source = device.bandwidth(plan.processes)
        sent = plan.traffic(shape, device, plan.work[-1])
        said = f"{_short(sent, 'B')} from each process, {_short_seconds(sent / speed)}"
        yield f"{device.name}, sent in a step", said, f"{source}; not in the time above"


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


def refusals(plan: Plan) -> Iterator[str]:
    """Why the run cannot begin, as far as that shows without loading anything."""
    try:
        resolve_model(plan.recipe.model.path)
    except ModelError as error:
        yield str(error)
    recipe, examples, asked = plan.recipe, plan.lengths.examples, plan.recipe.data.prompts or 1
    if plan.lengths.unreadable:
        yield plan.lengths.unreadable
    scorer = recipe.evaluate.scorer
    if scorer is not None and ":" not in scorer:  # otherwise it is code of the user's
        try:
            get_scorer(scorer)
        except RecipeError as error:
            yield str(error)
    # With every turn an example, their number is an estimate; otherwise there is at most one in a row.
    if examples is not None and recipe.data.turns != "all" and asked > examples - plan.set_apart:
        warmup = plan.set_apart - recipe.data.heldout
        yield (
            f"{recipe.data.path} has {examples:,} examples: too few for {asked:,} prompts beside "
            f"{recipe.data.heldout:,} held out" + (f" and {warmup:,} for the warm-up alone" if warmup else "") + ". "
            f"Lower {'data.heldout, data.prompts or sft.prompts' if warmup else 'data.heldout or data.prompts'}."
        )
    if plan.changed:
        yield "\n  ".join(("the run folder was made with a different recipe:", *plan.changed))


def notes(plan: Plan) -> Iterator[str]:
    """What makes the numbers less than certain."""
    recipe, examples = plan.recipe, plan.lengths.examples
    if plan.shape is None:
        yield f"Memory, disk for players and time are missing: {plan.shape_source}."
    here = names_a_file(recipe.data.path) or existing_path(recipe.data.path) is not None
    if examples is None and recipe.data.prompts is None and not plan.lengths.unreadable:
        why = f"files over {READ_WHOLE >> 20} MiB" if here else "data sets of the hub"
        yield (
            f"data.prompts is not set, and the rows of {why} are not counted: for every {plan.prompts:,} prompts the "
            "run does what is shown here."
        )
    if plan.lengths.limits:
        yield (
            "Lengths are the longest possible: tokens, time and disk are at most as shown, and with shorter prompts "
            "trees save less." + ("" if here else " A local file as data.path gives estimates instead.")
        )
    if plan.shape and GPU in plan.devices:
        memory = plan.memory(plan.shape, GPU)
        for what in (what for what in ("training", "generating") if memory[what] > GPU.memory):
            need, has = (_short(int(size), "B") for size in (memory[what], GPU.memory))
            yield f"{what.capitalize()} takes {need} on each GPU: more than the {has} of the one assumed here."
    if plan.shape and recipe.opponent.engine == "server":
        yield "Responses come from a server, whose speed is not known: the time to generate is that of this process."
    if plan.shape and recipe.model.load_in_4bit:
        yield "The frozen layers are in 4 bits: the time to unpack them for each product is not counted."
    if plan.shape and recipe.train.prefix_sharing == "auto" and not plan.trees:
        yield f"{plan.shape.family}'s attention cannot take trees: time is counted with one response per row."
    for name in dict.fromkeys(plan.optimizers) if plan.shape else ():
        if name.lower() not in OPTIMIZER_BYTES:
            yield f"The state of the optimiser {name} is not known; counted as 8 bytes per parameter, like AdamW."


def _name(work: Work) -> str:
    return str(work.iteration) if work.iteration != START else "warm-up" if work.steps else "start"


def _short(number: int, unit: str = "") -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * scale:
            return f"{number / scale:.{0 if number >= 99.95 * scale else 1}f} {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def _short_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def _duration(hours: float) -> str:
    if hours < 1 / 3600:
        return "under 1 s" if hours else "–"
    if hours >= 1:
        return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.3g} d"
    if hours >= 1 / 60:
        return f"{hours * 60:.{0 if hours >= 1 / 6 else 1}f} min"
    return f"{hours * 3600:.0f} s"
