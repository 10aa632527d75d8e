"""Evaluate: what the player that an iteration made does on held-out prompts."""

import logging

from spinlm.config import Recipe
from spinlm.evals.heldout import (
    Metrics,
    judge_real,
    merged,
    read_samples,
    repetition,
    summarise,
    summarise_probe,
    summarise_samples,
)
from spinlm.evals.scorers import get_scorer
from spinlm.files import atomic_file, write_json
from spinlm.model.players import Players, seat
from spinlm.opponents import local_opponent
from spinlm.opponents.base import Answer
from spinlm.progress import track
from spinlm.records import Example, HeldOutAnswer, HeldOutSample, Sampling, read_lines, read_pairs, to_line
from spinlm.rundir import START, RunDir, player_name
from spinlm.seeds import derive_seed
from spinlm.shards import count_shards

log = logging.getLogger("spinlm")


def evaluate(recipe: Recipe, run: RunDir, iteration: int) -> None:
    """Answer the held-out prompts with the player an iteration made (`START`: θ_0), and measure it.

    Writes one line per prompt to answers.jsonl and the means to metrics.json; from iteration 0 on also how well the
    player tells the held-out real responses from its opponent's.
    """
    if run.done("evaluate", iteration):
        return
    run.begin("evaluate", iteration)
    players = seat(recipe, run)
    players.become(iteration)
    examples = list(read_lines(run.examples("heldout"), Example))
    pairs = None
    if iteration != START:
        files = count_shards(run.examples("heldout"), recipe.opponent.shard_size)
        pairs = read_pairs(run.pairs(iteration, "heldout", shard) for shard in range(files))
    packing, budget = run.facts("warmup", START)["packing"], recipe.train.tokens_per_micro_batch
    given = _ask(recipe, players, examples, recipe.evaluate.temperature, "evaluate", iteration, packing)
    drawn = _ask(recipe, players, examples, 1.0, "sample", iteration, packing)
    ids = [answer.token_ids for answer in drawn]
    real = judge_real(players, examples, packing, budget, pairs, ids)
    players.become(START)
    start = read_samples(players, examples, ids, packing, budget)
    answers = [
        HeldOutAnswer(
            id=example.id,
            token_ids=answer.token_ids,
            text=text,
            finished=answer.finished,
            identical=answer.token_ids == example.response_ids,
            repetition=repetition(answer.token_ids),
            nll=nll,
            task_score=score,
        )
        for example, answer, nll, (text, score) in zip(
            examples, given, real.nll, _scored(recipe, players, examples, given), strict=True
        )
    ]
    samples = [
        HeldOutSample(
            id=example.id,
            token_ids=answer.token_ids,
            text=text,
            finished=answer.finished,
            logprob=start.logprobs[number] if iteration == START else real.sampled[number],
            start_logprob=start.logprobs[number],
            task_score=score,
        )
        for number, (example, answer, (text, score)) in enumerate(
            zip(examples, drawn, _scored(recipe, players, examples, drawn), strict=True)
        )
    ]
    told_apart = summarise_probe(start)
    metrics = merged(summarise(answers), real.pair_metrics(), summarise_samples(samples), told_apart)
    for path, records in ((run.answers(iteration), answers), (run.samples(iteration), samples)):
        with atomic_file(path, "w") as file:
            file.writelines(to_line(record) for record in records)
    write_json(run.iteration_metrics(iteration), metrics)
    outputs = run.answers(iteration), run.samples(iteration), run.iteration_metrics(iteration)
    run.complete("evaluate", iteration, outputs)
    log.info("%s: %s", player_name(iteration), _about(metrics))


def _about(metrics: Metrics) -> str:
    drift = f"drift from the start {metrics['drift']:+.4f} nats per token"
    if "discriminability" not in metrics:
        return f"too few prompts to say how well its responses are told from the real ones; {drift}"
    low, high = metrics["intervals"]["discriminability"]
    return (
        f"its responses are told from the real ones with AUC {metrics['discriminability']:.2f} "
        f"[{low:.2f}, {high:.2f}] (0.5: not at all); {drift}"
    )


def _scored(
    recipe: Recipe, players: Players, examples: list[Example], given: list[Answer]
) -> list[tuple[str, float | None]]:
    """The text of each answer, and its task score where the recipe names a scorer."""
    scorer = get_scorer(recipe.evaluate.scorer) if recipe.evaluate.scorer else None
    texts = [players.renderer.decode(answer.token_ids) for answer in given]
    return [
        (text, scorer(text, example.response) if scorer else None)
        for text, example in zip(texts, examples, strict=True)
    ]


def _ask(
    recipe: Recipe,
    players: Players,
    examples: list[Example],
    temperature: float,
    purpose: str,
    iteration: int,
    packing: str,
) -> list[Answer]:
    sampling = Sampling(
        temperature=temperature,
        top_p=1.0,
        max_new_tokens=recipe.evaluate.max_new_tokens or recipe.opponent.max_new_tokens,
        max_length=recipe.train.max_length,
        samples=1,
        stop_ids=players.renderer.stop_ids,
    )
    engine = local_opponent(recipe, players, packing)
    prompts = [example.prompt_ids for example in examples]
    with track(f"{player_name(iteration)}: {purpose}", len(examples)) as advance:
        given = engine.answer(prompts, sampling, derive_seed(recipe.seed, purpose, iteration), advance)
    return [answer for (answer,) in given]
