"""Evaluate: what the player that an iteration made does on held-out prompts."""

import logging
import math

from spinlm.config import Recipe
from spinlm.evals.heldout import (
    Metrics,
    judge_real,
    merged,
    read_samples,
    repetition,
    summarise,
    summarise_samples,
)
from spinlm.evals.probe import discriminability
from spinlm.evals.scorers import get_scorer
from spinlm.files import atomic_file, write_json
from spinlm.model.players import Players, seat
from spinlm.opponents import open_opponent
from spinlm.opponents.base import Answer
from spinlm.progress import track
from spinlm.records import Example, HeldOutAnswer, HeldOutSample, Sampling, read_lines, read_pairs, to_line
from spinlm.rundir import START, RunDir
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
    packing = run.facts("warmup", START)["packing"]
    real = judge_real(players, examples, packing, recipe.train.tokens_per_micro_batch, pairs)
    answers = _answer(recipe, players, examples, real.nll, iteration, packing)
    samples, told_apart = _sample(recipe, players, examples, iteration, packing)
    metrics = merged(summarise(answers), real.pair_metrics(), summarise_samples(samples), told_apart)
    for path, records in ((run.answers(iteration), answers), (run.samples(iteration), samples)):
        with atomic_file(path, "w") as file:
            file.writelines(to_line(record) for record in records)
    write_json(run.iteration_metrics(iteration), metrics)
    outputs = run.answers(iteration), run.samples(iteration), run.iteration_metrics(iteration)
    run.complete("evaluate", iteration, outputs)
    log.info("%s: %s", _name(iteration), _about(metrics))


def _name(iteration: int) -> str:
    return "start" if iteration == START else f"iteration {iteration}"


def _about(metrics: Metrics) -> str:
    low, high = metrics["intervals"].get("discriminability", (math.nan, math.nan))
    told = f"AUC {metrics['discriminability']:.2f} [{low:.2f}, {high:.2f}]" if low == low else "too few prompts to say"
    return (
        f"its own responses are told from the real ones with {told} (0.5: not at all); drift from the start "
        f"{metrics['drift']:+.4f} nats per token"
    )


def _answer(
    recipe: Recipe, players: Players, examples: list[Example], nll: list[float], iteration: int, packing: str
) -> list[HeldOutAnswer]:
    """The answers that are scored, greedy ones by default."""
    scorer = get_scorer(recipe.evaluate.scorer) if recipe.evaluate.scorer else None
    given = _ask(recipe, players, examples, recipe.evaluate.temperature, "evaluate", iteration, packing)
    answers = []
    for example, answer, value in zip(examples, given, nll, strict=True):
        text = players.renderer.decode(answer.token_ids)
        answers.append(
            HeldOutAnswer(
                id=example.id,
                token_ids=answer.token_ids,
                text=text,
                finished=answer.finished,
                identical=answer.token_ids == example.response_ids,
                repetition=repetition(answer.token_ids),
                nll=value,
                task_score=scorer(text, example.response) if scorer else None,
            )
        )
    return answers


def _sample(
    recipe: Recipe, players: Players, examples: list[Example], iteration: int, packing: str
) -> tuple[list[HeldOutSample], Metrics]:
    """Responses from the player's own distribution, and how well θ_0's features tell them from the real ones."""
    scorer = get_scorer(recipe.evaluate.scorer) if recipe.evaluate.scorer else None
    given = _ask(recipe, players, examples, 1.0, "sample", iteration, packing)
    ids, budget = [answer.token_ids for answer in given], recipe.train.tokens_per_micro_batch
    own = start = read_samples(players, examples, ids, packing, budget)
    if iteration != START:
        players.become(START)
        start = read_samples(players, examples, ids, packing, budget)
    samples = []
    for number, (example, answer) in enumerate(zip(examples, given, strict=True)):
        text = players.renderer.decode(answer.token_ids)
        samples.append(
            HeldOutSample(
                id=example.id,
                token_ids=answer.token_ids,
                text=text,
                finished=answer.finished,
                logprob=own.logprobs[number],
                start_logprob=start.logprobs[number],
                task_score=scorer(text, example.response) if scorer else None,
            )
        )
    auc, low, high = discriminability(start.real, start.sampled)
    return samples, {} if math.isnan(auc) else {"discriminability": auc, "intervals": {"discriminability": [low, high]}}


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
    engine = open_opponent(recipe, players, packing)
    prompts = [example.prompt_ids for example in examples]
    with track(f"{_name(iteration)}: {purpose}", len(examples)) as advance:
        given = engine.answer(prompts, sampling, derive_seed(recipe.seed, purpose, iteration), advance)
    return [answer for (answer,) in given]
