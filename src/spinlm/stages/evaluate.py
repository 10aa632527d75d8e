"""Evaluate: what the player that an iteration made does on held-out prompts."""

import logging
from dataclasses import dataclass

from spinlm.distributed import processes
from spinlm.distributed.progress import Advance, track
from spinlm.evals.heldout import (
    Metrics,
    RealScores,
    SampleFeatures,
    merged,
    real_nll_and_margins,
    repetition,
    sample_features,
    summarise,
    summarise_pairs,
    summarise_probe,
    summarise_samples,
)
from spinlm.evals.scorers import get_scorer
from spinlm.generation import local_engine
from spinlm.generation.base import Response, Sampling
from spinlm.model.players import Players, seat
from spinlm.recipe.fingerprint import recipe_fingerprint
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import (
    Example,
    HeldoutGreedy,
    HeldoutSampled,
    RecordFile,
    count_records,
    read_pairs,
    to_line,
)
from spinlm.rundir.stage_graph import START, player_name
from spinlm.training.step_log import tracker
from spinlm.utils.atomic import atomic_file, write_json
from spinlm.utils.seeds import derive_seed

log = logging.getLogger("spinlm")


@dataclass(frozen=True)
class _Part:
    """What a player does on one shard of the held-out prompts."""

    examples: list[Example]
    given: list[Response]  # as evaluation asks for them
    drawn: list[Response]  # from the player's own distribution
    real: RealScores


def evaluate(recipe: Recipe, run: RunDir, iteration: int) -> None:
    """Response the held-out prompts with the player an iteration made (`START`: θ_0), and measure it.

    Writes one line per prompt to heldout_greedy.jsonl and the means to eval.json; from iteration 0 on also how well the
    player tells the held-out real responses from its opponent's.
    """
    if processes.on_rank_zero(run.done, "evaluate", iteration):
        return
    processes.on_rank_zero(run.begin, "evaluate", iteration, recipe_fingerprint(recipe, iteration))
    players = seat(recipe, run)
    players.become(iteration)
    size, heldout = recipe.opponent.shard_size, RecordFile(run.examples("heldout"), Example)
    prefix_sharing, budget = run.metadata("sft", START)["prefix_sharing"], recipe.train.tokens_per_micro_batch
    ways = [
        (temperature, derive_seed(recipe.seed, purpose, iteration))
        for purpose, temperature in (("evaluate", 0.0), ("sample", 1.0))
    ]
    mine: dict[int, _Part] = {}
    passes = len(ways) + 2  # its own responses and the real ones are read by it, and its own by the start
    with track(
        f"{player_name(iteration)}: evaluate", passes * len(heldout), shared=True, responses="answers written and read"
    ) as advance:
        for shard in processes.claim_work(range(heldout.shards(size))):
            examples = heldout.shard(shard, size)
            given, drawn = (
                _ask(recipe, players, prefix_sharing, examples, temperature, seed + shard, advance)
                for temperature, seed in ways
            )
            pairs = None if iteration == START else read_pairs([run.pairs(iteration, "heldout", shard)])
            sampled = [answer.token_ids for answer in drawn]
            real = real_nll_and_margins(players, examples, prefix_sharing, budget, pairs, sampled)
            advance(len(examples))
            mine[shard] = _Part(examples, given, drawn, real)
        players.become(START)
        read: dict[int, SampleFeatures] = {}
        for shard, part in mine.items():
            sampled = [answer.token_ids for answer in part.drawn]
            read[shard] = sample_features(players, part.examples, sampled, prefix_sharing, budget)
            advance(len(part.examples))
    found = {
        shard: (part, theirs[1][shard])
        for theirs in processes.all_gather((mine, read))
        for shard, part in theirs[0].items()
    }
    processes.on_rank_zero(_conclude, recipe, run, iteration, players, [found[shard] for shard in sorted(found)])


def _conclude(
    recipe: Recipe, run: RunDir, iteration: int, players: Players, found: list[tuple[_Part, SampleFeatures]]
) -> None:
    """Write down what all shards say together."""
    scorer = get_scorer(recipe.evaluate.scorer) if recipe.evaluate.scorer else None
    answers, samples = [], []
    for part, start in found:
        for number, example in enumerate(part.examples):
            answer, drawn = part.given[number], part.drawn[number]
            text, sampled = players.renderer.decode(answer.token_ids), players.renderer.decode(drawn.token_ids)
            answers.append(
                HeldoutGreedy(
                    id=example.id,
                    token_ids=answer.token_ids,
                    text=text,
                    finished=answer.finished,
                    identical=answer.token_ids == example.response_ids,
                    repeated_4grams=repetition(answer.token_ids),
                    nll=part.real.nll[number],
                    task_score=scorer(text, example.response) if scorer else None,
                    margins=part.real.margins[number],
                )
            )
            samples.append(
                HeldoutSampled(
                    id=example.id,
                    token_ids=drawn.token_ids,
                    text=sampled,
                    finished=drawn.finished,
                    logprob=start.logprobs[number] if iteration == START else part.real.sampled[number],
                    start_logprob=start.logprobs[number],
                    task_score=scorer(sampled, example.response) if scorer else None,
                )
            )
    margins = [margins for part, _ in found for margins in part.real.margins]
    told_apart = summarise_probe([start for _, start in found])
    metrics = merged(summarise(answers), summarise_pairs(margins), summarise_samples(samples), told_apart)
    for path, records in ((run.heldout_greedy(iteration), answers), (run.heldout_sampled(iteration), samples)):
        with atomic_file(path, "w") as file:
            file.writelines(to_line(record) for record in records)
    write_json(run.eval_metrics(iteration), metrics)
    outputs = run.heldout_greedy(iteration), run.heldout_sampled(iteration), run.eval_metrics(iteration)
    run.complete("evaluate", iteration, outputs)
    steps = count_records(run.train_log) if run.train_log.exists() else 0
    tracker(players, run, recipe, "evaluate", iteration)(metrics, steps)
    log.info("%s: %s", player_name(iteration), _about(metrics, itself=iteration == START))


def _about(metrics: Metrics, itself: bool) -> str:
    drift = "" if itself else f"; drift from the start {metrics['kl_from_start']:+z.4f} nats per token"
    if "probe_auc" not in metrics:
        return f"too few prompts to say how well its responses are told from the real ones{drift}"
    low, high = metrics["intervals"]["probe_auc"]
    return (
        f"its responses are told from the real ones with AUC {metrics['probe_auc']:.2f} "
        f"[{low:.2f}, {high:.2f}] (0.5: not at all){drift}"
    )


def _ask(
    recipe: Recipe,
    players: Players,
    prefix_sharing: bool,
    examples: list[Example],
    temperature: float,
    seed: int,
    advance: Advance,
) -> list[Response]:
    sampling = Sampling.from_recipe(
        recipe,
        players.renderer.stop_ids,
        temperature=temperature,
        top_p=1.0,
        max_new_tokens=recipe.evaluate.max_new_tokens or recipe.opponent.max_new_tokens,
        samples=1,
    )
    engine = local_engine(recipe, players, prefix_sharing)
    given = engine.generate([example.prompt_ids for example in examples], sampling, seed, advance)
    return [answer for (answer,) in given]
