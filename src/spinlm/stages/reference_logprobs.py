"""Reference log-probabilities: log p_θt of every real and synthetic response that is used in iteration t.

If `objective.reference_mix` is below 1, training pairs also hold log p_θ0 of both responses.

Because the opponent's log-probabilities are computed here, training needs only one model in memory.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from spinlm.distributed import processes
from spinlm.distributed.progress import Advance, track
from spinlm.errors import ModelError
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, micro_batches
from spinlm.model.run import Run
from spinlm.recipe.objective import TSpin
from spinlm.rundir.fork import prompt_splits
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
from spinlm.utils.atomic import atomic_path
from spinlm.utils.signals import check_interrupt

log = logging.getLogger("spinlm")

MAX_LOGPROB_MISMATCH = {torch.float32: 0.01, torch.bfloat16: 0.1}
"""Largest mean difference between the engine's log-probabilities and ours that rounding explains, in nats per token.

Keys: the precision that the model computes in. SmolLM2-135M reaches 1e-6 in float32 and 0.009 in bfloat16.
"""

MISMATCH_CAUSE = "The usual cause is another model, template, end token or precision in the engine"


def reference_logprobs(run: Run, t: int) -> None:
    """Write the pairs of iteration `t`, one shard at a time. Verified shards are kept.

    Training pairs use the synthetic responses of this iteration and of the `selfplay.replay` iterations before it.
    Held-out pairs use only those of this iteration. A synthetic response that equals the real one is counted but makes
    no pair, because its gradient is 0.
    """
    with run.stage("reference_logprobs", t) as stage:
        if stage.done:
            return
        recipe, folder, players = run.recipe, run.folder, run.players
        needs_initial = isinstance(recipe.objective, TSpin)
        replayed = range(max(0, t - recipe.selfplay.replay), t)
        for iteration in {*replayed, *((0,) if needs_initial and t else ())}:
            processes.on_rank_zero(folder.require, "generate", iteration)
        players.load(t - 1)  # θ_t
        size = recipe.opponent.shard_size
        examples = {split: RecordFile(folder.examples(split), Example) for split in prompt_splits(recipe)}
        shards = [(split, shard) for split, records in examples.items() for shard in range(records.num_shards(size))]
        tally = _Tally()
        mixed: dict[Path, int] = {}  # this process's files that also need log p_θ0, with their prompts
        total = sum(map(len, examples.values())) + (len(examples["train"]) if recipe.mixes_start(t) else 0)
        with track(f"iteration {t}: reference log-probabilities", total, shared=True) as advance:
            for split, shard in processes.claim_work(shards):
                chosen = examples[split].shard(shard, size)
                generations = [
                    generation
                    for iteration in ((t, *reversed(replayed)) if split == "train" else (t,))
                    for generation in read_lines(folder.generations(iteration, split, shard), Generation)
                ]
                path = folder.pairs(t, split, shard)
                if folder.is_verified(path):
                    pairs = [Pair(**row) for row in read_pairs([path]).to_pylist()]
                    advance(len(chosen))
                else:
                    pairs = _make_pairs(players, chosen, generations, advance)
                    if needs_initial and split == "train":
                        pairs = _with_initial(pairs, read_lines(folder.generations(0, split, shard), Generation))
                    with atomic_path(path) as temporary:
                        write_pairs(temporary, pairs)
                    folder.record_digest(path)
                tally.add(split, t, chosen, generations, pairs)
                if split == "train" and recipe.mixes_start(t):
                    mixed[path] = len(chosen)
            for path, prompts in mixed.items():
                _add_start_logprobs(run, path)
                advance(prompts)
        tally = _Tally.sum(processes.all_gather(tally.counts))
        if processes.is_main_process():
            log.info("iteration %d: %s", t, tally.summary())
        _check_mismatch(run, t, tally)
        stage.outputs = [folder.pairs(t, *shard) for shard in shards]
        stage.metadata = dict(tally.rates())


def _check_mismatch(run: Run, t: int, tally: "_Tally") -> None:
    """Compare the engine's log-probabilities with ours. Warn of a difference if the engine is another program.

    Raises:
        ModelError: the local engine's log-probabilities differ from ours by more than rounding.
    """
    rates = max(tally.rates().values(), key=lambda rates: rates.get("logprob_mismatch_mean", 0.0))
    mismatch, engine, players = rates.get("logprob_mismatch_mean", 0.0), run.recipe.opponent.engine, run.players
    if engine == "local" and not mismatch <= MAX_LOGPROB_MISMATCH[players.dtype]:
        raise ModelError(
            f"{players.base_model}: when it generates, its log-probabilities differ from those in training by "
            f"{mismatch:.2g} nats per token on average, {rates['logprob_mismatch_max']:.2g} at most; rounding explains "
            f"{MAX_LOGPROB_MISMATCH[players.dtype]:g}. {type(players.logprobs.causal_lm).__name__} computes a token "
            "differently when it reads the earlier tokens from its cache, so the local engine would sample from "
            "another opponent. Set opponent.engine to vllm or server, or use another model"
        )
    if processes.is_main_process() and mismatch > MAX_LOGPROB_MISMATCH[torch.bfloat16]:
        log.warning(
            "iteration %d: the log-probabilities of the %s engine differ from ours by %.2f nats per token. %s; `spinlm "
            "check` shows where the responses differ",
            *(t, engine, mismatch, MISMATCH_CAUSE),
        )


def _make_pairs(
    players: Players, examples: list[Example], generations: list[Generation], advance: Advance
) -> list[Pair]:
    """Pair the real response of each example with each synthetic one, and compute log p_θt of both."""
    by_id: dict[str, list[Generation]] = defaultdict(list)
    for generation in generations:
        by_id[generation.id].append(generation)
    members = []  # of each tree: the example and its synthetic responses
    trees = []
    for example in examples:
        synthetic = [g for g in by_id[example.id] if g.token_ids != example.response_ids]
        if synthetic:
            members.append((example, synthetic))
            trees.append(PrefixTree(example.prompt_ids, (example.response_ids, *(g.token_ids for g in synthetic))))
    pairs: dict[int, list[Pair]] = {}
    budget = players.recipe.train.tokens_per_micro_batch
    for chosen in micro_batches(trees, budget, players.prefix_sharing):
        check_interrupt()
        logprobs = iter(players.response_logprobs([trees[index] for index in chosen]))
        for index in chosen:
            example, synthetic = members[index]
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
    advance(len(examples) - len(trees))  # examples whose synthetic responses all equal the real one
    return [pair for index in range(len(trees)) for pair in pairs[index]]


def _add_start_logprobs(run: Run, path: Path) -> None:
    """Add log p_θ0 of both responses to the pairs of a file, for `objective.reference_mix`; keep a file that has them.

    A file without them is a complete result of θ_t, so a resumed run reads it and starts here.
    """
    pairs = [Pair(**row) for row in read_pairs([path]).to_pylist()]
    if not pairs or pairs[0].start_real is not None:
        return
    players, folder = run.players, run.folder
    players.load(START)
    prompts = [list(group) for _, group in groupby(pairs, key=lambda pair: pair.id)]
    trees = [PrefixTree(of[0].prompt_ids, (of[0].real_ids, *(pair.synthetic_ids for pair in of))) for of in prompts]
    with_start: dict[int, list[Pair]] = {}
    for chosen in micro_batches(trees, players.recipe.train.tokens_per_micro_batch, players.prefix_sharing):
        check_interrupt()
        logprobs = iter(players.response_logprobs([trees[index] for index in chosen]))
        for index in chosen:
            real = next(logprobs)
            with_start[index] = [
                replace(pair, start_real=real, start_synthetic=next(logprobs)) for pair in prompts[index]
            ]
    # Without the old digest, a file that was replaced just before a kill is unfinished work, and not a changed file.
    folder.digest_file(path).unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        write_pairs(temporary, [pair for index in range(len(trees)) for pair in with_start[index]])
    folder.record_digest(path)


def _with_initial(pairs: list[Pair], generations: Iterable[Generation]) -> list[Pair]:
    """Add θ_0's response to each pair, for T-SPIN.

    If θ_0's response equals the real one, use the synthetic one instead, because the loss must not lower the
    likelihood of the real response.
    """
    initial = {(generation.id, generation.sample): generation.token_ids for generation in generations}

    def initial_ids(pair: Pair) -> list[int]:
        ids = initial[pair.id, pair.sample]
        return pair.synthetic_ids if ids == pair.real_ids else ids

    return [replace(pair, initial_ids=initial_ids(pair)) for pair in pairs]


class _Tally:
    """Counts of responses and pairs, by split."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, float]] = {}

    @classmethod
    def sum(cls, parts: list[dict[str, dict[str, float]]]) -> "_Tally":
        """Add up the counts of several processes."""
        total = cls()
        for split in PAIR_SPLITS:
            if counts := [part[split] for part in parts if split in part]:
                total.counts[split] = {name: sum(count[name] for count in counts) for name in counts[0]}
                total.counts[split]["mismatch_max"] = max(count["mismatch_max"] for count in counts)
        return total

    def add(
        self, split: str, t: int, examples: list[Example], generations: list[Generation], pairs: list[Pair]
    ) -> None:
        """Count a shard."""
        real = {example.id: example.response_ids for example in examples}
        newest = {(g.id, g.sample): g for g in generations if g.iteration == t}
        mismatches = [
            abs(pair.opponent_synthetic - logprob) / len(pair.synthetic_ids)
            for pair in pairs
            if pair.source_iteration == t and (logprob := newest[pair.id, pair.sample].logprob) is not None
        ]
        count = self.counts.setdefault(split, defaultdict(float))
        count["pairs"] += len(pairs)
        count["responses"] += len(newest)
        count["identical"] += sum(g.token_ids == real[g.id] for g in newest.values())
        count["truncated"] += sum(not g.finished for g in newest.values())
        count["tokens"] += sum(len(g.token_ids) for g in newest.values())
        count["mismatch"] += sum(mismatches)
        count["mismatches"] += len(mismatches)
        count["mismatch_max"] = max([count["mismatch_max"], *mismatches])

    def rates(self) -> dict[str, dict[str, float]]:
        """Return counts, rates, and the log-probability mismatch in nats per token, by split."""
        rates: dict[str, dict[str, float]] = {}
        for split, count in self.counts.items():
            responses = count["responses"]
            rates[split] = {
                "pairs": int(count["pairs"]),
                "responses": int(responses),
                "identical_rate": count["identical"] / responses,
                "truncated_rate": count["truncated"] / responses,
                "mean_tokens": count["tokens"] / responses,
            }
            if count["mismatches"]:
                rates[split]["logprob_mismatch_mean"] = count["mismatch"] / count["mismatches"]
                rates[split]["logprob_mismatch_max"] = count["mismatch_max"]
        return rates

    def summary(self) -> str:
        """Describe the training split, or the held-out split if there is no training split, in one line."""
        split, rates = next(iter(self.rates().items()))
        pairs = "pairs" if split == "train" else "held-out pairs"
        mismatch = rates.get("logprob_mismatch_mean")
        return (
            f"{rates['pairs']} {pairs}; {rates['identical_rate']:.1%} of the responses equal the real one, "
            f"{rates['truncated_rate']:.1%} are truncated"
            + (
                ""
                if mismatch is None
                else f"; log-probabilities of engine and trainer differ by {mismatch:.1e} nats per token"
            )
        )
