"""Generate: the opponent θ_t answers every training and held-out prompt. Where the data are preferences, their rejected
responses stand for its answers."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext

from spinlm.distributed import processes
from spinlm.distributed.progress import Advance, track
from spinlm.generation import open_engine
from spinlm.generation.base import Engine, Sampling
from spinlm.model.players import Players, seat
from spinlm.recipe.fingerprint import recipe_fingerprint
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import PAIR_SPLITS, Example, Generation, RecordFile, to_line
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import atomic_file
from spinlm.utils.seeds import derive_seed

log = logging.getLogger("spinlm")


def splits(recipe: Recipe) -> tuple[str, ...]:
    """Whose prompts the opponent answers: where nothing is learned from its answers, the held-out ones alone."""
    return ("heldout",) if recipe.is_control else PAIR_SPLITS


def generate(recipe: Recipe, run: RunDir, iteration: int) -> None:
    """Write the responses of the opponent of an iteration, a shard of prompts at a time.

    Shards that are there and as they were written are kept.
    """
    if processes.on_rank_zero(run.done, "generate", iteration):
        return
    processes.on_rank_zero(run.begin, "generate", iteration, recipe_fingerprint(recipe, iteration))
    players = seat(recipe, run)
    prefix_sharing = run.metadata("sft", START)["prefix_sharing"]
    sampling = Sampling.from_recipe(recipe, players.renderer.stop_ids)
    size = recipe.opponent.shard_size
    examples = {split: RecordFile(run.examples(split), Example) for split in splits(recipe)}
    shards = [(split, shard) for split, records in examples.items() for shard in range(records.shards(size))]
    missing = processes.on_rank_zero(_missing, run, iteration, shards)
    at_work = processes.is_main_process() or recipe.opponent.engine == "local" or recipe.preferences
    if not at_work:
        players.let_go()  # the first asks another engine for all of them, and that may need the memory
    total = sum(map(len, examples.values())) * sampling.samples
    left = sum(min(size, len(examples[split]) - shard * size) for split, shard in missing) * sampling.samples
    needed = at_work and missing and not recipe.preferences
    with (
        open_engine(recipe, players, iteration, prefix_sharing) if needed else nullcontext() as opponent,
        track(f"iteration {iteration}: generate", total, total - left, shared=True, responses="responses") as advance,
    ):
        for split, shard in processes.claim_work(missing, at_work):
            chosen = examples[split].shard(shard, size)
            if opponent is None:
                rows = _rejected(players, chosen, iteration)
                advance(len(chosen))
            else:
                seed = derive_seed(recipe.seed, "generate", iteration, split, shard)
                rows = _answer(players, opponent, chosen, sampling, seed, iteration, advance)
            path = run.generations(iteration, split, shard)
            with atomic_file(path, "w") as file:
                file.writelines(to_line(row) for row in rows)
            run.record_digest(path)
    outputs = [run.generations(iteration, split, shard) for split, shard in shards]
    processes.on_rank_zero(run.complete, "generate", iteration, outputs)


def _missing(run: RunDir, iteration: int, shards: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return [one for one in shards if not run.is_verified(run.generations(iteration, *one))]


def _answer(
    players: Players,
    opponent: Engine,
    examples: list[Example],
    sampling: Sampling,
    seed: int,
    iteration: int,
    advance: Advance,
) -> list[Generation]:
    prompts = [example.prompt_ids for example in examples]
    answers = opponent.generate(prompts, sampling, seed, advance)
    return [
        Generation(
            id=example.id,
            iteration=iteration,
            sample=sample,
            token_ids=answer.token_ids,
            text=players.renderer.decode(answer.token_ids),
            finished=answer.finished,
            logprob=answer.logprob,
        )
        for example, given in zip(examples, answers, strict=True)
        for sample, answer in enumerate(given)
    ]


def _rejected(players: Players, examples: list[Example], iteration: int) -> list[Generation]:
    """The data's rejected responses, as an opponent's answers."""
    rows = []
    for example in examples:
        ids = example.rejected_ids
        assert ids, "examples of a preference data set have a rejected response"
        text, finished = players.renderer.decode(ids), ids[-1] in players.renderer.stop_ids
        rows.append(Generation(example.id, iteration, 0, ids, text, finished, logprob=None))
    return rows
