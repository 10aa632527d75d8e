"""The plan on a terminal: tables, what they assume, and notes."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from spinlm.plan.costs import IterationCost
from spinlm.plan.estimate import DeviceEstimate, Plan
from spinlm.rundir.stage_graph import START

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render(plan: Plan) -> "RenderableType":
    """Return the plan as something that rich prints."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"model: {plan.model}\ndata:  {plan.data}", style="bold"), Text(plan.trained)]
    parts += [Text(f"This run will be refused: {reason}", style="red") for reason in plan.refusals]
    for title, table in _tables(plan):
        parts += [Text(f"\n{title}", style="bold"), table]
    parts += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    return Group(*parts)


def _tables(plan: Plan) -> Iterator[tuple[str, "Table"]]:
    columns = ["iteration", "responses", "pairs", "steps", "generated", "at most", "scored", "trained"]
    yield "Counts and tokens", _table(columns, map(_work_row, plan.iterations))
    for device in plan.devices:
        title = f"Time on {'one' if plan.processes == 1 else f'{plan.processes} ×'} {device.name}, estimated"
        columns = ["iteration", "generate", "reference_logprobs", "train", "evaluate", "total"]
        yield title, _table(columns, _time_rows(plan, device), bold="total")
    if plan.devices:
        columns = ["", *(f"{device.name}, {device.dtype}" for device in plan.devices)]
        rows = (
            [part, *(format_number(device.memory[part], "B") for device in plan.devices)]
            for part in plan.devices[0].memory
        )
        yield "Peak memory of one process", _table(columns, rows, bold="training generating")
    yield "Assumptions", _table([], _assumptions(plan))


def _table(columns: list[str], rows: Iterable[Iterable[str]], bold: str = "-") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=bool(columns))
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    for first, *others in rows:
        table.add_row(first, *others, style="bold" if first in bold.split() else None)
    return table


def _label(cost: IterationCost) -> str:
    return str(cost.iteration) if cost.iteration != START else "sft" if cost.steps else "start"


def _work_row(cost: IterationCost) -> list[str]:
    counts = [f"{count:,}" if count else "–" for count in (cost.responses, cost.pairs, cost.steps)]
    tokens = (cost.generated, cost.max_generated, cost.scored, cost.training_tokens)
    return [_label(cost), *counts, *map(format_number, tokens)]


def _time_rows(plan: Plan, device: DeviceEstimate) -> Iterator[list[str]]:
    rows = [[time.generate, time.reference_logprobs, time.train, time.evaluate, time.total] for time in device.hours]
    for cost, row in zip(plan.iterations, rows, strict=True):
        yield [_label(cost), *map(format_hours, row)]
    yield ["total", *(format_hours(sum(column)) for column in zip(*rows, strict=True))]


def _assumptions(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and source of what the numbers depend on."""
    lengths = plan.lengths
    if plan.parameters:
        yield "model", f"{plan.parameters:,} parameters", plan.shape_source
    examples = "rows not counted" if lengths.examples is None else f"of {lengths.examples:,} examples in the data"
    yield "prompts", f"{plan.prompts:,}, and {plan.heldout:,} held out", examples
    yield "prompt + response", f"{lengths.prompt:,} + {lengths.real:,} tokens", lengths.source
    source = "upper limit" if lengths.are_limits else "assumed to be as long as real responses"
    yield "synthetic response", f"{lengths.synthetic:,} tokens", source
    rows = "all responses to a prompt" if plan.prefix_sharing else "one response"
    yield "prefix sharing", "on" if plan.prefix_sharing else "off", f"{rows} in one row"
    for device in plan.devices:
        state = "on" if device.gradient_checkpointing else "off"
        yield f"{device.name} speed", "assumed", device.speed
        yield f"{device.name} memory", format_number(int(device.capacity), "B"), f"gradient checkpointing {state}"


def format_number(number: int, unit: str = "") -> str:
    """Return a number with an SI prefix."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * scale:
            return f"{number / scale:.{0 if number >= 99.95 * scale else 1}f} {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def format_hours(hours: float) -> str:
    """Return hours in the unit that suits them."""
    if hours < 1 / 3600:
        return "under 1 s" if hours else "–"
    if hours >= 1:
        return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.3g} d"
    if hours >= 1 / 60:
        return f"{hours * 60:.{0 if hours >= 1 / 6 else 1}f} min"
    return f"{hours * 3600:.0f} s"
