"""Score: the opponent's log-probabilities of every real and synthetic response in use, once, without gradients.

From then on nobody needs a second model in memory.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from spinlm.distributed import processes
from spinlm.distributed.progress import Advance, track
from spinlm.model.players import Players, seat
from spinlm.model.prefix_trees import PrefixTree, micro_batches
from spinlm.recipe.fingerprint import recipe_fingerprint
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import (
    PAIR_SPLITS,
    Example,
    Generation,
    Pair,
    RecordFile,
    read_lines,
    read_pairs,
    write_pairs,
)
from spinlm.rundir.stage_graph import START
from spinlm.stages.generate import splits
from spinlm.utils.atomic import atomic_path
from spinlm.utils.signals import check_interrupt

log = logging.getLogger("spinlm")

GAP = 0.1  # nats per token between sampler and scorer that rounding does not explain


def score(recipe: Recipe, run: RunDir, iteration: int) -> None:
    """Write the pairs of an iteration, a shard at a time; those that are there and as they were written are kept.

    Training pairs use the newest synthetic responses and those of `selfplay.replay` iterations before; held-out pairs
    the newest only. A synthetic response equal to the real one carries no gradient: it makes no pair, and is counted.
    """
    if processes.on_rank_zero(run.done, "reference_logprobs", iteration):
        return
    processes.on_rank_zero(run.begin, "reference_logprobs", iteration, recipe_fingerprint(recipe, iteration))
    initial = recipe.objective.name == "t-spin"
    earlier = range(max(0, iteration - recipe.selfplay.replay), iteration)
    for source in {*earlier, *((0,) if initial and iteration else ())}:
        processes.on_rank_zero(run.require, "generate", source)
    players = seat(recipe, run)
    players.become(iteration - 1)
    prefix_sharing = run.metadata("sft", START)["prefix_sharing"]
    size = recipe.opponent.shard_size
    examples = {split: RecordFile(run.examples(split), Example) for split in splits(recipe)}
    shards = [(split, shard) for split, records in examples.items() for shard in range(records.shards(size))]
    tally = _Tally()
    with track(f"iteration {iteration}: score", sum(map(len, examples.values())), shared=True) as advance:
        for split, shard in processes.claim_work(shards):
            chosen = examples[split].shard(shard, size)
            generations = [
                generation
                for source in ((iteration, *reversed(earlier)) if split == "train" else (iteration,))
                for generation in read_lines(run.generations(source, split, shard), Generation)
            ]
            path = run.pairs(iteration, split, shard)
            if run.is_verified(path):
                pairs = [Pair(**row) for row in read_pairs([path]).to_pylist()]
                advance(len(chosen))
            else:
                pairs = _score_shard(recipe, players, chosen, generations, prefix_sharing, advance)
                if initial and split == "train":
                    pairs = _with_initial(pairs, read_lines(run.generations(0, split, shard), Generation))
                with atomic_path(path) as temporary:
                    write_pairs(temporary, pairs)
                run.record_digest(path)
            tally.add(split, iteration, chosen, generations, pairs)
    tally = _Tally.together(processes.all_gather(tally.counts))
    if processes.is_main_process():
        _tell(recipe, iteration, tally)
    outputs = [run.pairs(iteration, *shard) for shard in shards]
    processes.on_rank_zero(run.complete, "reference_logprobs", iteration, outputs, **tally.facts())


def _tell(recipe: Recipe, iteration: int, tally: "_Tally") -> None:
    """Say what was scored, and warn where the sampler and we do not agree."""
    log.info("iteration %d: %s", iteration, tally.summary())
    gap = max(counts.get("logprob_mismatch_mean", 0.0) for counts in tally.facts().values())
    if gap > GAP:
        log.warning(
            "iteration %d: the log-probabilities of the %s engine differ from ours by %.2f nats per token: another "
            "model, template, end token or precision there is the usual cause; `spinlm check` shows where they part",
            iteration,
            recipe.opponent.engine,
            gap,
        )


def _score_shard(
    recipe: Recipe,
    players: Players,
    examples: list[Example],
    generations: list[Generation],
    prefix_sharing: bool,
    advance: Advance,
) -> list[Pair]:
    by_id: dict[str, list[Generation]] = defaultdict(list)
    for generation in generations:
        by_id[generation.id].append(generation)
    used = []
    trees = []
    for example in examples:
        synthetic = [g for g in by_id[example.id] if g.token_ids != example.response_ids]
        if synthetic:
            used.append((example, synthetic))
            trees.append(PrefixTree(example.prompt_ids, (example.response_ids, *(g.token_ids for g in synthetic))))
    pairs: dict[int, list[Pair]] = {}
    for chosen in micro_batches(trees, recipe.train.tokens_per_micro_batch, prefix_sharing):
        check_interrupt()
        logprobs = iter(players.response_logprobs([trees[index] for index in chosen], prefix_sharing))
        for index in chosen:
            example, synthetic = used[index]
            real = next(logprobs)
            pairs[index] = [
                Pair(
                    id=example.id,
                    source_iteration=generation.iteration,
                    sample=generation.sample,
                    prompt_ids=example.prompt_ids,
                    real_ids=example.response_ids,
                    synthetic_ids=generation.token_ids,
                    opponent_real=real,
                    opponent_synthetic=next(logprobs),
                )
                for generation in synthetic
            ]
        advance(len(chosen), sum(len(trees[index]) for index in chosen))
    advance(len(examples) - len(trees))  # those whose responses all equal the real one
    return [pair for index in range(len(trees)) for pair in pairs[index]]


def _with_initial(pairs: list[Pair], generations: Iterable[Generation]) -> list[Pair]:
    """The same pairs with θ_0's response to their prompt, for T-SPIN.

    Where that is the real one, the synthetic one stands for it: nothing should become likelier than the real one.
    """
    initial = {(generation.id, generation.sample): generation.token_ids for generation in generations}

    def initial_response(pair: Pair) -> list[int]:
        ids = initial[pair.id, pair.sample]
        return pair.synthetic_ids if ids == pair.real_ids else ids

    return [replace(pair, initial_ids=initial_response(pair)) for pair in pairs]


class _Tally:
    """What the shards add up to."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, float]] = {}

    @classmethod
    def together(cls, parts: list[dict[str, dict[str, float]]]) -> "_Tally":
        """What several processes have counted, as one."""
        whole = cls()
        for split in PAIR_SPLITS:
            if counts := [part[split] for part in parts if split in part]:
                whole.counts[split] = {name: sum(count[name] for count in counts) for name in counts[0]}
                whole.counts[split]["worst"] = max(count["worst"] for count in counts)
        return whole

    def add(
        self, split: str, iteration: int, examples: list[Example], generations: list[Generation], pairs: list[Pair]
    ) -> None:
        real = {example.id: example.response_ids for example in examples}
        newest = [generation for generation in generations if generation.iteration == iteration]
        ours = {(pair.id, pair.sample): pair for pair in pairs if pair.source_iteration == iteration}
        sampled = {(g.id, g.sample): g for g in newest}
        gaps = [
            abs(pair.opponent_synthetic - sampled_as) / len(pair.synthetic_ids)
            for key, pair in ours.items()
            if (sampled_as := sampled[key].logprob) is not None
        ]
        count = self.counts.setdefault(split, defaultdict(float))
        count["pairs"] += len(pairs)
        count["responses"] += len(newest)
        count["identical"] += sum(g.token_ids == real[g.id] for g in newest)
        count["unfinished"] += sum(not g.finished for g in newest)
        count["tokens"] += sum(len(g.token_ids) for g in newest)
        count["gap"] += sum(gaps)
        count["gaps"] += len(gaps)
        count["worst"] = max([count["worst"], *gaps])

    def facts(self) -> dict[str, dict[str, float]]:
        """Per split: counts, shares, and how far a sampler's log-probabilities are from ours, per token."""
        return {
            split: {
                "pairs": int(count["pairs"]),
                "responses": int(count["responses"]),
                "identical_rate": count["identical"] / count["responses"],
                "truncated_rate": count["unfinished"] / count["responses"],
                "mean_tokens": count["tokens"] / count["responses"],
            }
            | (
                {"logprob_mismatch_mean": count["gap"] / count["gaps"], "logprob_mismatch_max": count["worst"]}
                if count["gaps"]
                else {}
            )
            for split, count in self.counts.items()
        }

    def summary(self) -> str:
        """One line about the training split, or where there is none the held-out one."""
        split, facts = next(iter(self.facts().items()))
        pairs = "pairs" if split == "train" else "held-out pairs"
        gap = facts.get("logprob_mismatch_mean")
        return (
            f"{facts['pairs']} {pairs}; {facts['identical_rate']:.1%} of the responses equal the real one, "
            f"{facts['truncated_rate']:.1%} did not end"
            + ("" if gap is None else f"; sampler and scorer differ by {gap:.1e} nats per token")
        )
