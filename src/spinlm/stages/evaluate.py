"""Evaluate: what the player that an iteration made does on held-out prompts."""

import logging

from spinlm.config import Recipe
from spinlm.evals.heldout import judge_real, repetition, summarise
from spinlm.evals.scorers import get_scorer
from spinlm.files import atomic_file, write_json
from spinlm.model.players import Players, seat
from spinlm.opponents import open_opponent
from spinlm.progress import track
from spinlm.records import Example, HeldOutAnswer, Sampling, read_lines, read_pairs, to_line
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
    metrics = summarise(answers) | real.pair_metrics()
    with atomic_file(run.answers(iteration), "w") as file:
        file.writelines(to_line(answer) for answer in answers)
    write_json(run.iteration_metrics(iteration), metrics)
    run.complete("evaluate", iteration, [run.answers(iteration), run.iteration_metrics(iteration)])


def _answer(
    recipe: Recipe, players: Players, examples: list[Example], nll: list[float], iteration: int, packing: str
) -> list[HeldOutAnswer]:
    sampling = Sampling(
        temperature=recipe.evaluate.temperature,
        top_p=1.0,
        max_new_tokens=recipe.evaluate.max_new_tokens or recipe.opponent.max_new_tokens,
        max_length=recipe.train.max_length,
        samples=1,
        stop_ids=players.renderer.stop_ids,
    )
    scorer = get_scorer(recipe.evaluate.scorer) if recipe.evaluate.scorer else None
    engine = open_opponent(recipe, players, packing)
    name = "start" if iteration == START else f"iteration {iteration}"
    with track(f"{name}: evaluate", len(examples)) as advance:
        given = engine.answer(
            [example.prompt_ids for example in examples],
            sampling,
            derive_seed(recipe.seed, "evaluate", iteration),
            advance,
        )
    answers = []
    for example, (answer,), value in zip(examples, given, nll, strict=True):
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
