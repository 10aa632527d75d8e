"""Reference log-probabilities: log p_θt of every real and synthetic response that is used in iteration t.

If `objective.reference_mix` is below 1, training pairs also hold log p_θ0 of both responses.

Because the opponent's log-probabilities are computed here, training needs only one model in memory.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from spinlm.distributed import processes
from spinlm.distributed.progress import Advance, track
from spinlm.errors import ModelError
from spinlm.evals.scorers import Scorer, get_scorer
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, micro_batches
from spinlm.model.run import Run
from spinlm.recipe.objective import TSpin
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import (
    PAIR_SPLITS,
    Example,
    Generation,
    Pair,
    RecordFile,
    read_lines,
    read_pairs,
    response_splits,
    write_pairs,
)
from spinlm.rundir.stage_graph import START
from spinlm.training.pairs import ResponseKey, choose_heldout_pairs, choose_train_pairs, response_key
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

    Training pairs use the synthetic responses of this iteration and of the `selfplay.replay` iterations before it; see
    `choose_train_pairs`. Held-out pairs use only those of this iteration, and only those that differ from the real one.
    """
    with run.stage("reference_logprobs", t) as stage:
        if stage.done:
            return
        recipe, folder, players = run.recipe, run.folder, run.players
        needs_initial = isinstance(recipe.objective, TSpin)
        name = recipe.evaluate.scorer if recipe.opponent.exclude_correct else None
        scorer = get_scorer(name) if name else None
        replayed = range(max(0, t - recipe.selfplay.replay), t)
        for iteration in {*replayed, *((0,) if needs_initial and t else ())}:
            processes.on_rank_zero(folder.require, "generate", iteration)
        players.load(t - 1)  # θ_t
        size = recipe.opponent.shard_size
        splits = response_splits(is_control=recipe.is_control)
        examples = {split: RecordFile(folder.examples(split), Example) for split in splits}
        shards = [(split, shard) for split, records in examples.items() for shard in range(records.num_shards(size))]
        tally = _Tally()
        mixed: dict[Path, int] = {}  # this process's files that also need log p_θ0, with their prompts
        total = sum(map(len, examples.values())) + (len(examples["train"]) if recipe.mixes_start(t) else 0)
        with track(f"iteration {t}: reference log-probabilities", total, shared=True) as advance:
            for split, shard in processes.claim_work(shards):
                chosen = examples[split].shard(shard, size)
                is_train = split == "train"
                sources = (t, *reversed(replayed)) if is_train else (t,)
                generations = [row for source in sources for row in _generations(folder, source, split, shard)]
                initial = _generations(folder, 0, split, shard) if needs_initial and is_train else []
                correct = None if scorer is None else _correct_responses(scorer, chosen, [*generations, *initial])
                path = folder.pairs(t, split, shard)
                if folder.is_verified(path):
                    pairs = [Pair(**row) for row in read_pairs([path]).to_pylist()]
                    advance(len(chosen))
                else:
                    if is_train:
                        pairs = choose_train_pairs(recipe, chosen, generations, correct or (), initial)
                    else:
                        pairs = choose_heldout_pairs(chosen, generations)
                    pairs = _with_logprobs(players, pairs, "opponent", advance)
                    advance(len(chosen) - len({pair.id for pair in pairs if pair.contrast}))
                    with atomic_path(path) as temporary:
                        write_pairs(temporary, pairs)
                    folder.record_digest(path)
                newest = [generation for generation in generations if generation.iteration == t]
                tally.add(split, chosen, newest, correct, pairs)
                if is_train and recipe.mixes_start(t):
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


def _generations(folder: RunDir, t: int, split: str, shard: int) -> list[Generation]:
    return list(read_lines(folder.generations(t, split, shard), Generation))


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


def _correct_responses(
    scorer: Scorer, examples: Sequence[Example], generations: Iterable[Generation]
) -> set[ResponseKey]:
    """Return the keys of the responses that the scorer rates 1. Raises DataError if it cannot read a real response."""
    references = {example.id: example.response for example in examples}
    return {
        response_key(generation)
        for generation in generations
        if scorer(generation.text, references[generation.id]) == 1
    }


def _with_logprobs(
    players: Players, pairs: Sequence[Pair], player: Literal["opponent", "start"], advance: Advance | None = None
) -> list[Pair]:
    """Return the pairs with log p(y|x) and log p(y'|x) under the loaded player; NaN for rows without contrast.

    Equal responses to a prompt are computed once. `player` names the fields of `Pair` to write.
    """
    contrasts = [number for number, pair in enumerate(pairs) if pair.contrast]
    prompts = [list(numbers) for _, numbers in groupby(contrasts, key=lambda number: pairs[number].id)]
    trees = []
    for numbers in prompts:
        first = pairs[numbers[0]]
        responses = [first.real_ids, *(pairs[number].synthetic_ids for number in numbers)]
        trees.append(PrefixTree(first.prompt_ids, tuple(dict.fromkeys(map(tuple, responses)))))
    values = [(math.nan, math.nan)] * len(pairs)
    for chosen in micro_batches(trees, players.recipe.train.tokens_per_micro_batch, players.prefix_sharing):
        check_interrupt()
        logprobs = iter(players.response_logprobs([trees[index] for index in chosen]))
        for index in chosen:
            of_response = {response: next(logprobs) for response in trees[index].responses}
            for number in prompts[index]:
                real, synthetic = tuple(pairs[number].real_ids), tuple(pairs[number].synthetic_ids)
                values[number] = of_response[real], of_response[synthetic]
        if advance is not None:
            advance(len(chosen), sum(len(trees[index]) for index in chosen))
    fields: list[dict[str, Any]] = [{f"{player}_real": real, f"{player}_synthetic": other} for real, other in values]
    return [replace(pair, **changed) for pair, changed in zip(pairs, fields, strict=True)]


def _add_start_logprobs(run: Run, path: Path) -> None:
    """Add log p_θ0 of both responses to the pairs of a file, for `objective.reference_mix`; keep a file that has them.

    A file without them is a complete result of θ_t, so a resumed run reads it and starts here.
    """
    pairs = [Pair(**row) for row in read_pairs([path]).to_pylist()]
    if not pairs or pairs[0].start_real is not None:
        return
    players, folder = run.players, run.folder
    players.load(START)
    with_start = _with_logprobs(players, pairs, "start")
    # Without the old digest, a file that was replaced just before a kill is unfinished work, and not a changed file.
    folder.digest_file(path).unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        write_pairs(temporary, with_start)
    folder.record_digest(path)


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
        self,
        split: str,
        examples: Sequence[Example],
        generations: Sequence[Generation],
        correct: Collection[ResponseKey] | None,
        pairs: Sequence[Pair],
    ) -> None:
        """Count a shard.

        Args:
            split: the split of the shard.
            examples: the examples.
            generations: the responses of this iteration to them.
            correct: keys of the responses that the scorer rates 1; None without `opponent.exclude_correct`.
            pairs: all rows of the pair file.
        """
        real = {example.id: example.response_ids for example in examples}
        newest = {response_key(generation): generation for generation in generations}
        contrasts = [(pair, (pair.source_iteration, pair.id, pair.sample)) for pair in pairs if pair.contrast]
        mismatches = [
            abs(pair.opponent_synthetic - logprob) / len(pair.synthetic_ids)
            for pair, key in contrasts
            if key in newest and (logprob := newest[key].logprob) is not None
        ]
        count = self.counts.setdefault(split, defaultdict(float))
        count["pairs"] += len(contrasts)
        count["nll_only"] += len(pairs) - len(contrasts)
        count["responses"] += len(newest)
        count["identical"] += sum(g.token_ids == real[g.id] for g in newest.values())
        count["truncated"] += sum(not g.finished for g in newest.values())
        count["tokens"] += sum(len(g.token_ids) for g in newest.values())
        count["scored"] += 0 if correct is None else len(newest)
        count["correct"] += len(newest.keys() & set(correct or ()))
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
                **({"nll_only": int(count["nll_only"])} if count["nll_only"] else {}),
                "responses": int(responses),
                "identical_rate": count["identical"] / responses,
                **({"correct_rate": count["correct"] / responses} if count["scored"] else {}),
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
        is_train = split == "train"
        parts = [f"{rates['pairs']} {'pairs' if is_train else 'held-out pairs'}"]
        if "nll_only" in rates:
            parts.append(f"{rates['nll_only']} rows with the NLL term alone")
        shares = f"{rates['identical_rate']:.1%} of the responses equal the real one"
        if "correct_rate" in rates and is_train:
            shares += f", {rates['correct_rate']:.1%} are correct and make no pair"
        parts.append(f"{shares}, {rates['truncated_rate']:.1%} are truncated")
        if (mismatch := rates.get("logprob_mismatch_mean")) is not None:
            parts.append(f"log-probabilities of engine and trainer differ by {mismatch:.1e} nats per token")
        return "; ".join(parts)
