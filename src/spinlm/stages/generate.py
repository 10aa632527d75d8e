"""Generate: the opponent θ_t responds to every training and held-out prompt.

With preference data, the data's rejected responses take the place of the opponent's.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext

from spinlm.distributed import processes
from spinlm.distributed.progress import Advance, track
from spinlm.generation import open_engine
from spinlm.generation.base import Engine, Sampling
from spinlm.model.players import Players
from spinlm.model.run import Run
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, Generation, RecordFile, response_splits, to_line
from spinlm.utils.atomic import atomic_file
from spinlm.utils.seeds import derive_seed

log = logging.getLogger("spinlm")


def generate(run: Run, t: int) -> None:
    """Write the responses of the opponent of iteration `t`, shard by shard. Verified shards are kept."""
    with run.stage("generate", t) as stage:
        if stage.done:
            return
        recipe, folder, players = run.recipe, run.folder, run.players
        size = recipe.opponent.shard_size
        splits = response_splits(is_control=recipe.is_control)
        examples = {split: RecordFile(folder.examples(split), Example) for split in splits}
        shards = [(split, shard) for split, records in examples.items() for shard in range(records.num_shards(size))]
        missing = processes.on_rank_zero(_missing, folder, t, shards)
        participates = processes.is_main_process() or recipe.opponent.engine == "local" or recipe.preferences
        if not participates:
            players.unload()  # only process 0 uses the engine, which may need the memory
        sampling = Sampling.from_recipe(recipe, players.renderer.stop_ids)
        total = sum(map(len, examples.values())) * sampling.samples
        remaining = sum(min(size, len(examples[split]) - shard * size) for split, shard in missing) * sampling.samples
        needs_engine = participates and missing and not recipe.preferences
        with (
            open_engine(players, t) if needs_engine else nullcontext() as engine,
            track(
                f"iteration {t}: generate", total, total - remaining, shared=True, response_unit="responses"
            ) as advance,
        ):
            for split, shard in processes.claim_work(missing, participates):
                chosen = examples[split].shard(shard, size)
                if engine is None:
                    rows = _rejected(players, chosen, t)
                    advance(len(chosen))
                else:
                    seed = derive_seed(recipe.seed, "generate", t, split, shard)
                    rows = _respond(players, engine, chosen, sampling, seed, t, advance)
                path = folder.generations(t, split, shard)
                with atomic_file(path, "w") as file:
                    file.writelines(to_line(row) for row in rows)
                folder.record_digest(path)
        stage.outputs = [folder.generations(t, split, shard) for split, shard in shards]


def _missing(folder: RunDir, t: int, shards: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return [shard for shard in shards if not folder.is_verified(folder.generations(t, *shard))]


def _respond(
    players: Players,
    engine: Engine,
    examples: list[Example],
    sampling: Sampling,
    seed: int,
    t: int,
    advance: Advance,
) -> list[Generation]:
    prompts = [example.prompt_ids for example in examples]
    return [
        Generation(
            id=example.id,
            iteration=t,
            sample=sample,
            token_ids=response.token_ids,
            text=players.renderer.decode(response.token_ids),
            finished=response.finished,
            logprob=response.logprob,
        )
        for example, responses in zip(examples, engine.generate(prompts, sampling, seed, advance), strict=True)
        for sample, response in enumerate(responses)
    ]


def _rejected(players: Players, examples: list[Example], t: int) -> list[Generation]:
    """Return the rejected responses of the data as if the opponent had written them."""
    rows = []
    for example in examples:
        ids = example.rejected_ids
        assert ids, "every example of a preference data set has a rejected response"
        text, finished = players.renderer.decode(ids), ids[-1] in players.renderer.stop_ids
        rows.append(Generation(example.id, t, 0, ids, text, finished, logprob=None))
    return rows
