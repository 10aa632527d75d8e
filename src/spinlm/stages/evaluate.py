"""Evaluate: measure the player that an iteration made on the held-out prompts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spinlm.distributed import processes
from spinlm.distributed.progress import Advance, track
from spinlm.evals.heldout import (
    HeldoutScores,
    Metrics,
    ResponseFeatures,
    merge_metrics,
    repeated_4grams,
    response_features,
    score_heldout,
    summarize_greedy,
    summarize_pairs,
    summarize_probe,
    summarize_sampled,
    summarize_temperatures,
)
from spinlm.evals.scorers import Scorer, get_scorer
from spinlm.generation import local_engine
from spinlm.generation.base import Response, Sampling
from spinlm.model.run import Run
from spinlm.report.summary import numeric_metrics
from spinlm.rundir.records import (
    Example,
    HeldoutAtTemperature,
    HeldoutGreedy,
    HeldoutSampled,
    RecordFile,
    count_records,
    read_pairs,
    to_line,
)
from spinlm.rundir.stage_graph import START, player_name
from spinlm.training.step_log import metrics_logger
from spinlm.utils.atomic import atomic_file, write_json
from spinlm.utils.seeds import derive_seed

log = logging.getLogger("spinlm")


@dataclass(frozen=True)
class _ShardResults:
    """A player's responses to one shard of the held-out prompts, and its scores."""

    examples: list[Example]
    greedy: list[Response]
    sampled: list[Response]  # at temperature 1, from all tokens
    at_temperatures: dict[float, list[Response]]  # at each of `evaluate.temperatures`, from all tokens
    scores: HeldoutScores


def evaluate(run: Run, t: int) -> None:
    """Measure the player that iteration `t` made on the held-out prompts; `START` is θ_0.

    Writes heldout_greedy.jsonl, heldout_sampled.jsonl, heldout_temperatures.jsonl (if the recipe has
    `evaluate.temperatures`) and eval.json. For all players but θ_0, the metrics include accuracy and margin on held-out
    pairs of real and opponent's responses.
    """
    with run.stage("evaluate", t) as stage:
        if stage.done:
            return
        folder, players = run.folder, run.players
        players.load(t)
        size, heldout = run.recipe.opponent.shard_size, RecordFile(folder.examples("heldout"), Example)
        shards: dict[int, _ShardResults] = {}
        # Per prompt: the generated responses, one scoring pass of the player, one scoring pass of θ_0.
        total = (run.recipe.evaluate.responses_per_prompt + 2) * len(heldout)
        label = f"{player_name(t)}: evaluate"
        with track(label, total, shared=True, response_unit="responses written and read") as advance:
            for number in processes.claim_work(range(heldout.num_shards(size))):
                examples = heldout.shard(number, size)
                greedy, sampled, at_temperatures = _generate(run, t, number, examples, advance)
                pairs = None if t == START else read_pairs([folder.pairs(t, "heldout", number)])
                scores = score_heldout(players, examples, pairs, [response.token_ids for response in sampled])
                advance(len(examples))
                shards[number] = _ShardResults(examples, greedy, sampled, at_temperatures, scores)
            players.load(START)
            features: dict[int, ResponseFeatures] = {}
            for number, shard in shards.items():
                responses = [response.token_ids for response in shard.sampled]
                features[number] = response_features(players, shard.examples, responses)
                advance(len(shard.examples))
        gathered = {
            number: (shard, process_features[number])
            for process_shards, process_features in processes.all_gather((shards, features))
            for number, shard in process_shards.items()
        }
        ordered = [gathered[number] for number in sorted(gathered)]
        metrics = processes.on_rank_zero(_write_results, run, t, ordered)
        stage.outputs = [folder.heldout_greedy(t), folder.heldout_sampled(t), folder.eval_metrics(t)]
        stage.outputs += [folder.heldout_temperatures(t)] if run.recipe.evaluate.temperatures else []
    if processes.is_main_process():
        _report(run, t, metrics)


def _generate(
    run: Run, t: int, shard: int, examples: Sequence[Example], advance: Advance
) -> tuple[list[Response], list[Response], dict[float, list[Response]]]:
    """Return the responses to a shard: greedy, at temperature 1, and at each of `evaluate.temperatures`."""

    def respond(temperature: float, *purpose: str | int) -> list[Response]:
        return _respond(run, examples, temperature, derive_seed(run.recipe.seed, *purpose) + shard, advance)

    greedy, sampled = respond(0.0, "evaluate", t), respond(1.0, "sample", t)
    at_temperatures = {
        temperature: sampled if temperature == 1 else respond(temperature, "sample", t, f"{temperature:g}")
        for temperature in run.recipe.evaluate.temperatures
    }
    return greedy, sampled, at_temperatures


def _respond(run: Run, examples: Sequence[Example], temperature: float, seed: int, advance: Advance) -> list[Response]:
    recipe = run.recipe
    sampling = Sampling.from_recipe(
        recipe,
        run.players.renderer.stop_ids,
        temperature=temperature,
        top_p=1.0,
        samples=1,
        max_new_tokens=recipe.evaluate.max_new_tokens or recipe.opponent.max_new_tokens,
    )
    prompts = [example.prompt_ids for example in examples]
    return [response for (response,) in local_engine(run.players).generate(prompts, sampling, seed, advance)]


def _write_results(run: Run, t: int, shards: list[tuple[_ShardResults, ResponseFeatures]]) -> Metrics:
    """Write the responses and the metrics of all shards. Return the metrics."""
    scorer = get_scorer(run.recipe.evaluate.scorer) if run.recipe.evaluate.scorer else None
    decode = run.players.renderer.decode
    greedy_rows, sampled_rows = [], []
    temperature_rows = _temperature_rows(run, scorer, [shard for shard, _ in shards])
    for shard, features in shards:
        for number, example in enumerate(shard.examples):
            greedy, sampled = shard.greedy[number], shard.sampled[number]
            greedy_text, sampled_text = decode(greedy.token_ids), decode(sampled.token_ids)
            greedy_rows.append(
                HeldoutGreedy(
                    id=example.id,
                    token_ids=greedy.token_ids,
                    text=greedy_text,
                    finished=greedy.finished,
                    identical=greedy.token_ids == example.response_ids,
                    repeated_4grams=repeated_4grams(greedy.token_ids),
                    nll=shard.scores.nll[number],
                    task_score=scorer(greedy_text, example.response) if scorer else None,
                    margins=shard.scores.margins[number],
                )
            )
            start_logprob = features.sampled_logprobs[number]
            sampled_rows.append(
                HeldoutSampled(
                    id=example.id,
                    token_ids=sampled.token_ids,
                    text=sampled_text,
                    finished=sampled.finished,
                    logprob=start_logprob if t == START else shard.scores.sampled_logprobs[number],
                    start_logprob=start_logprob,
                    task_score=scorer(sampled_text, example.response) if scorer else None,
                )
            )
    metrics = merge_metrics(
        summarize_greedy(greedy_rows),
        summarize_pairs([margins for shard, _ in shards for margins in shard.scores.margins]),
        summarize_sampled(sampled_rows),
        summarize_temperatures(temperature_rows),
        summarize_probe([features for _, features in shards]),
    )
    _write_lines(run.folder.heldout_greedy(t), greedy_rows)
    _write_lines(run.folder.heldout_sampled(t), sampled_rows)
    if temperature_rows:
        _write_lines(run.folder.heldout_temperatures(t), temperature_rows)
    write_json(run.folder.eval_metrics(t), metrics)
    return metrics


def _temperature_rows(run: Run, scorer: Scorer | None, shards: Sequence[_ShardResults]) -> list[HeldoutAtTemperature]:
    """Score the responses at `evaluate.temperatures`."""
    decode, rows = run.players.renderer.decode, []
    for temperature in run.recipe.evaluate.temperatures:
        assert scorer is not None, "the recipe refuses temperatures without a scorer"
        for shard in shards:
            for example, response in zip(shard.examples, shard.at_temperatures[temperature], strict=True):
                ids, text = response.token_ids, decode(response.token_ids)
                score = scorer(text, example.response)
                rows.append(HeldoutAtTemperature(example.id, temperature, ids, text, response.finished, score))
    return rows


def _write_lines(path: Path, records: Sequence[HeldoutGreedy | HeldoutSampled | HeldoutAtTemperature]) -> None:
    with atomic_file(path, "w") as file:
        file.writelines(to_line(record) for record in records)


def _report(run: Run, t: int, metrics: Metrics) -> None:
    """Send the metrics to the trackers, and log two of them."""
    steps = count_records(run.folder.train_log) if run.folder.train_log.exists() else 0
    metrics_logger(run, "evaluate", t)(numeric_metrics(metrics), steps)
    kl = "" if t == START else f"; KL from the start: {metrics['kl_from_start']:+z.4f} nats per token"
    if "probe_auc" not in metrics:
        log.info("%s: too few prompts for a probe AUC%s", player_name(t), kl)
        return
    low, high = metrics["intervals"]["probe_auc"]
    log.info(
        "%s: probe AUC, real vs generated: %.2f [%.2f, %.2f] (0.5 = indistinguishable)%s",
        *(player_name(t), metrics["probe_auc"], low, high, kl),
    )
