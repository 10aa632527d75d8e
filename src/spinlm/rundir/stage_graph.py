"""The stages of a run, their order and their inputs; and the names of the players."""

from collections.abc import Iterator

StageKey = tuple[str, int]  # name and iteration

START = -1
"""The iteration number of the starting player θ_0."""

START_STAGES = ("prepare", "sft", "evaluate")
"""The stages that make and measure the starting player."""

STAGES = ("generate", "reference_logprobs", "regime", "train", "evaluate", "promote")
"""The stages of an iteration."""


def stages(iterations: int) -> Iterator[StageKey]:
    """Yield the stages of a run in order."""
    yield from ((stage, START) for stage in START_STAGES)
    yield from ((stage, t) for t in range(iterations) for stage in STAGES)


def player_folder(t: int) -> str:
    """Return the name of the folder that holds an iteration's player; `START` is the starting player."""
    return "start" if t == START else f"iteration-{t}"


def player_name(t: int) -> str:
    """Return the name of an iteration's player for messages and tables; `START` is the starting player."""
    return "start" if t == START else f"iteration {t}"


def player_stage(t: int) -> StageKey:
    """Return the stage that makes an iteration's player."""
    return ("sft", START) if t == START else ("train", t)


def parent_stage(stage: str, t: int) -> StageKey | None:
    """Return the stage whose digest goes into the marker of this stage; None for prepare."""
    match stage:
        case "prepare":
            return None
        case "sft":
            return ("prepare", START)
        case "generate":
            return player_stage(t - 1)
        case "reference_logprobs":
            return ("generate", t)
        case "regime" | "train":  # training does not depend on what was measured before it
            return ("reference_logprobs", t)
        case "evaluate":
            return player_stage(t)
        case "promote":
            return ("evaluate", t)
    raise AssertionError(f"unknown stage {stage}")


def inputs_of(stage: str, t: int) -> list[StageKey]:
    """Return the stages whose files this stage reads."""
    inputs: list[StageKey] = [] if stage in ("prepare", "promote") else [("prepare", START)]
    match stage:
        case "generate":
            inputs += [player_stage(t - 1)]
        case "reference_logprobs" | "regime" | "train":
            inputs += [player_stage(t - 1), player_stage(START)]
        case "evaluate":
            inputs += [player_stage(t), player_stage(START)]
            inputs += [("reference_logprobs", t)] if t != START else []
    parent = parent_stage(stage, t)
    return list(dict.fromkeys([*inputs, *([] if parent is None else [parent])]))


def stage_label(stage: StageKey | None) -> str:
    """Return the name of a stage for messages."""
    if stage is None:
        return "nothing"
    name, t = stage
    if t != START:
        return f"{name} of iteration {t}"
    return "evaluate of the start" if name == "evaluate" else name
