"""Measure how far players have moved on general prompts, which are unlike the task that they were trained on.

    python benchmarks/replication/general.py RUN [RUN …] [--data FILE.jsonl] [--max-new-tokens 96]

For the start and the last player of each run: the NLL of reference responses, the KL divergence from the start, and
repeated 4-grams and truncation of greedy and sampled responses. general.jsonl holds the default prompts and references.
The results lie beside the run folders. A second call measures only players that have no results.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spinlm.evals.heldout import repeated_4grams, score_heldout
from spinlm.generation import local_engine
from spinlm.generation.base import Response, Sampling
from spinlm.model.run import Run
from spinlm.recipe.load import parse_recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.records import Example
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import file_digest, read_json, read_json_lines, write_json

HERE = Path(__file__).resolve().parent

COLUMNS = {
    "task_score": "{:.3f}",
    "heldout_nll": "{:.3f}",
    "general_nll": "{:.3f}",
    "kl_from_start": "{:+.4f}",
    "repeated_4grams": "{:.1%}",
    "repeated_4grams_sampled": "{:.1%}",
    "truncated": "{:.1%}",
    "truncated_sampled": "{:.1%}",
}
"""Columns of the table with their number formats; the first two are those of the task."""


def summarize(
    nll: Sequence[float],
    greedy: Sequence[Response],
    sampled: Sequence[Response],
    logprobs: Sequence[float],
    start_logprobs: Sequence[float],
) -> dict[str, float]:
    """Return the metrics of a player on P prompts.

    Args:
        nll: [P] NLL of the reference responses, nats per token.
        greedy: [P] responses at temperature 0.
        sampled: [P] responses at temperature 1.
        logprobs: [P] log p of the sampled responses under the player.
        start_logprobs: [P] likewise under θ_0.
    """
    tokens = sum(len(response.token_ids) for response in sampled)
    kl = sum(own - start for own, start in zip(logprobs, start_logprobs, strict=True)) / tokens
    return {
        "general_nll": statistics.fmean(nll),
        "kl_from_start": kl,
        "repeated_4grams": statistics.fmean(repeated_4grams(response.token_ids) for response in greedy),
        "repeated_4grams_sampled": statistics.fmean(repeated_4grams(response.token_ids) for response in sampled),
        "truncated": statistics.fmean(not response.finished for response in greedy),
        "truncated_sampled": statistics.fmean(not response.finished for response in sampled),
    }


def measure(run: Run, player: int, data: Path, max_new_tokens: int) -> dict[str, float]:
    """Measure a player of a run on the prompts of a file."""
    players, recipe = run.players, run.recipe
    examples = []
    for row in read_json_lines(data):
        messages = [{"role": "user", "content": row["prompt"]}]
        encoded = players.renderer.encode(messages, row["response"], recipe.train.max_length)
        examples.append(
            Example(
                row["prompt"], messages, row["response"], encoded.prompt_ids, encoded.response_ids, source=data.name
            )
        )

    def respond(temperature: float) -> list[Response]:
        settings = {"temperature": temperature, "top_p": 1.0, "samples": 1, "max_new_tokens": max_new_tokens}
        sampling = Sampling.from_recipe(recipe, players.renderer.stop_ids, **settings)
        prompts = [example.prompt_ids for example in examples]
        engine = local_engine(players)
        return [response for (response,) in engine.generate(prompts, sampling, recipe.seed, lambda ended, steps: None)]

    players.load(player)
    greedy, sampled = respond(0.0), respond(1.0)
    responses = [response.token_ids for response in sampled]
    own = score_heldout(players, examples, None, responses)
    start = own
    if player != START:
        players.load(START)
        start = score_heldout(players, examples, None, responses)
    return summarize(own.nll, greedy, sampled, own.sampled_logprobs, start.sampled_logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data", type=Path, default=HERE / "general.jsonl", help="prompts and reference responses")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    args = parser.parse_args()
    print("| run | " + " | ".join(COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    starts = set()
    for path in args.runs:
        folder = RunDir(path)
        last = max(t for t in range(START, 100) if folder.marker("evaluate", t).exists())
        for player in (START, last):
            target = path.parent / f"{'start' if player == START else path.name}-{args.data.stem}.json"
            if player == START and target in starts:  # all runs of a seed have one start
                continue
            starts.add(target)
            made_from = {
                "player": folder.player_digest(player),
                "data": file_digest(args.data),
                "max_new_tokens": args.max_new_tokens,
            }
            if not target.exists() or read_json(target)["made_from"] != made_from:
                recipe = parse_recipe(read_recipe(folder), str(folder.recipe))
                with Run(recipe, folder) as run:
                    measured = measure(run, player, args.data, args.max_new_tokens)
                write_json(target, measured | {"made_from": made_from})
            task = {name: read_json(folder.eval_metrics(player)).get(name) for name in ("task_score", "heldout_nll")}
            values: dict[str, Any] = task | read_json(target)
            name = path.parent / "start" if player == START else path
            cells = ["–" if values[key] is None else form.format(values[key]) for key, form in COLUMNS.items()]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
