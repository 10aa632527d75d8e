"""What a run folder holds: bytes and files, by part."""

import math
from typing import NamedTuple

from spinlm.plan.estimate import Plan
from spinlm.recipe.schema import optimizer_bytes

TEXT_BYTES = 3.5  # a token as text
NUMBER_BYTES = 5.5  # and as a decimal number in JSON, with its comma
RECORD_BYTES = 100  # of an example's line beside its texts and tokens: names of fields, id, roles, source
ANSWER_BYTES = 140  # of a generation's or answer's line
PAIR_BYTES = 90  # of a pair in Arrow beside its tokens: id, offsets, log-probabilities
FILE_BYTES = 2000  # of an Arrow file before its first pair
MARKED_BYTES = 125  # an output's path and digest in a stage's marker
STEP_BYTES = 270  # a line of train_log.jsonl
FOLDER_BYTES = 4500  # recipe, provenance and such; and of an iteration, measures and markers
TOKENIZER_BYTES = 75  # for each entry of the vocabulary


class Room(NamedTuple):
    """Bytes (None where the model's shape is needed), and how many files."""

    last: int | None  # bytes that the last iteration adds
    total: int | None
    files: int


def disk(plan: Plan) -> dict[str, Room]:
    """The run folder at its fullest: in the last training, with a checkpoint, which goes when that is complete.

    While one is being written there are two.
    """
    recipe, lengths, shape = plan.recipe, plan.lengths, plan.shape
    iterations, heldout = recipe.selfplay.iterations, recipe.data.heldout
    token = TEXT_BYTES + NUMBER_BYTES
    rejected = lengths.synthetic if recipe.preferences else 0
    examples = plan.prompts + plan.set_apart
    rows = examples * (RECORD_BYTES + (lengths.prompt + lengths.real) * token + rejected * NUMBER_BYTES)

    split = [heldout] if recipe.is_control else [plan.prompts, heldout]
    shards = sum(math.ceil(prompts / recipe.opponent.shard_size) for prompts in split)
    responses = sum(split) * recipe.opponent.samples_per_prompt
    generations = int(responses * (ANSWER_BYTES + lengths.synthetic * token))
    pair = PAIR_BYTES + 4 * (lengths.prompt + lengths.real + lengths.synthetic)
    held_out = heldout * recipe.opponent.samples_per_prompt
    pairs = [int((work.pairs + held_out) * pair + shards * FILE_BYTES) for work in plan.work[1:]]
    answers = 2 * heldout * (ANSWER_BYTES + plan.work[0].answered.tokens * token)
    small = [int(FOLDER_BYTES + answers + work.steps * STEP_BYTES + 2 * shards * MARKED_BYTES) for work in plan.work]

    player = checkpoint = largest = base = None
    if shape is not None:
        trained = shape.trained(recipe.lora)
        tokenizer = TOKENIZER_BYTES * shape.vocab
        player, base = 4 * trained + tokenizer, 4 * shape.parameters + tokenizer
        optimizers = [recipe.train.optimizer, *([recipe.sft.optimizer] if recipe.sft else [])]
        checkpoint = (4 + optimizer_bytes(optimizers[0])) * trained
        largest = (4 + max(map(optimizer_bytes, optimizers))) * trained
    return {
        "examples": Room(0, int(rows), 5),
        "generations": Room(generations, iterations * generations, 2 * iterations * shards),  # each with its digest
        "pairs": Room(pairs[-1], sum(pairs), 2 * iterations * shards),
        **({"base": Room(0, base, 7)} if recipe.model.path.endswith(".gguf") else {}),
        "players": Room(player, _times(player, iterations + 1), 6 * (iterations + 1)),  # θ_0 and each iteration's
        "checkpoint": Room(checkpoint, largest, 4),
        "measurements and markers": Room(small[-1], sum(small) + FOLDER_BYTES, 12 * iterations + 12),
    }


def total(parts: dict[str, Room]) -> Room:
    """All parts together; bytes that are not known count as none."""
    rooms = parts.values()
    return Room(
        sum(room.last or 0 for room in rooms), sum(room.total or 0 for room in rooms), sum(r.files for r in rooms)
    )


def _times(one: int | None, count: int) -> int | None:
    return None if one is None else one * count
