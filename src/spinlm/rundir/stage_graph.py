"""The order of a run: its players, its stages, and what each stage is made from."""

from collections.abc import Iterator

Stage = tuple[str, int]  # name and iteration

START = -1
"""The iteration number of the starting player θ_0."""

START_STAGES = ("prepare", "sft", "evaluate")
"""The stages of the start."""

STAGES = ("generate", "reference_logprobs", "train", "evaluate", "promote")
"""Those of an iteration."""


def stages(iterations: int) -> Iterator[Stage]:
    """The stages of a run of so many iterations, in order."""
    yield from ((stage, START) for stage in START_STAGES)
    yield from ((stage, iteration) for iteration in range(iterations) for stage in STAGES)


def player_name(iteration: int) -> str:
    """How messages and tables call the player that an iteration made; `START` is the starting player."""
    return "start" if iteration == START else f"iteration {iteration}"


def parent_stage(stage: str, iteration: int) -> Stage | None:
    """The stage whose result a stage is made from."""
    match stage:
        case "prepare":
            return None
        case "sft":
            return ("prepare", START)
        case "generate":
            return ("sft", START) if iteration == 0 else ("train", iteration - 1)
        case "reference_logprobs":
            return ("generate", iteration)
        case "train":
            return ("reference_logprobs", iteration)
        case "evaluate":
            return ("sft", START) if iteration == START else ("train", iteration)
        case "promote":
            return ("evaluate", iteration)
    raise AssertionError(f"unknown stage {stage}")


def inputs_of(stage: str, iteration: int) -> list[Stage]:
    """The stages whose files a stage reads."""

    def player(iteration: int) -> Stage:
        return ("sft", START) if iteration == START else ("train", iteration)

    match stage:
        case "generate":
            also = [player(iteration - 1)]
        case "reference_logprobs" | "train":
            also = [player(iteration - 1), player(START)]
        case "evaluate":
            also = [player(iteration), player(START)] + (
                [("reference_logprobs", iteration)] if iteration != START else []
            )
        case _:
            also = []
    before = parent_stage(stage, iteration)
    data: list[Stage] = [] if stage in ("prepare", "promote") else [("prepare", START)]
    return list(dict.fromkeys([*data, *also, *([] if before is None else [before])]))


def stage_label(stage: Stage | None) -> str:
    """How messages call a stage."""
    if stage is None:
        return "nothing"
    name, iteration = stage
    if iteration != START:
        return f"{name} of iteration {iteration}"
    return {"sft": "warm-up", "evaluate": "evaluate of the start"}.get(name, name)
