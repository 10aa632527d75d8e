"""Tokens per second of the local engine and of the official SPIN code's method, with the same model and prompts.

    python benchmarks/generation.py [--data FILE.jsonl] [--threads 2] [--prompts 64] [--new 320] [--model gpt-neo-125m]

The official code calls transformers' `generate` on padded batches of 16 in the order of the data; each batch runs until
its longest response ends. The benchmark does so with PEFT's own layers at temperature 1, and also measures a tuned
`generate`: sorted prompts, larger batches, merged adapter. The prompts are those in `--data` (GSM8K) or of the
quickstart. The benchmark first compares greedy responses token by token. Random weights, as of `--model gpt-neo-125m`,
end a response with probability 1/128 at each token.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import GPT_NEO, MODEL, model_path

BATCH = 16  # of the official code
GREEDY = 24  # tokens to compare
STOP_IDS = tuple(range(50257 // 128))  # of random weights, whose next token has a nearly uniform distribution


class Bench:
    """A model, and the methods to sample from it."""

    def __init__(self, data: str, prompts: int, new: int, dtype: str, model: str):
        from spinlm.generation.local import LocalEngine
        from spinlm.model.players import Players
        from spinlm.recipe.load import parse_recipe
        from spinlm.rundir.layout import RunDir

        self.folder = tempfile.TemporaryDirectory()
        place = model_path(model, Path(self.folder.name))
        recipe = parse_recipe(
            {"model": {"path": place, "dtype": dtype}, "lora": {"r": 16, "alpha": 32}, "data": {"path": "-"}}
        )
        self.players = Players(recipe, RunDir(Path(self.folder.name)))
        path = Path(data) if data else Path(__file__).parent.parent / "recipes" / "quickstart.jsonl"
        rows = [json.loads(line) for line in path.read_bytes().splitlines()[:prompts]]
        self.prompts = [self.players.renderer.prompt_ids(_prompt(row)) for row in rows]
        self.new = new
        self.stop_ids = STOP_IDS if model == GPT_NEO else self.players.renderer.stop_ids
        self.engine, self.padded_engine = (
            LocalEngine(self.players.logprobs, recipe.opponent.batch_size, sharing) for sharing in (True, False)
        )

    def spinlm(
        self, seed: int, temperature: float = 1.0, new: int | None = None, padded: bool = False
    ) -> list[list[int]]:
        """Sample with spinlm's local engine."""
        from spinlm.generation.base import Sampling

        sampling = Sampling(temperature, 1.0, new or self.new, 2048, 1, self.stop_ids)
        engine = self.padded_engine if padded else self.engine
        responses = engine.generate(self.prompts, sampling, seed, lambda completed, tokens: None)
        return [response.token_ids for (response,) in responses]

    def transformers(
        self,
        seed: int,
        order: list[int] | None = None,
        temperature: float = 1.0,
        new: int | None = None,
        batch_size: int = BATCH,
    ) -> list[list[int]]:
        """Sample with transformers' `generate`."""
        import torch

        from spinlm.model.fused import fuse_layers

        model = self.players.model
        self.players.logprobs.use_tree_attention(False)
        for layer in model.modules():
            vars(layer).pop("forward", None)  # PEFT's own
        torch.manual_seed(seed)
        order = order or list(range(len(self.prompts)))
        responses: dict[int, list[int]] = {}
        options: dict[str, Any] = {"do_sample": False}
        if temperature:
            options = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(self.prompts[index]) for index in batch)
            ids = torch.tensor([[0] * (width - len(self.prompts[i])) + self.prompts[i] for i in batch])
            mask = torch.tensor([[0] * (width - len(self.prompts[i])) + [1] * len(self.prompts[i]) for i in batch])
            with torch.inference_mode():
                out = self.players.logprobs.causal_lm.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=new or self.new,
                    eos_token_id=list(self.stop_ids),
                    pad_token_id=0,
                    **options,
                )
            for index, row in zip(batch, out[:, width:].tolist(), strict=True):
                ends = [place for place, token in enumerate(row) if token in self.stop_ids]
                responses[index] = row[: ends[0] + 1] if ends else row
        fuse_layers(model)
        return [responses[index] for index in range(len(self.prompts))]

    def transformers_tuned(self, seed: int) -> list[list[int]]:
        """Sample with `generate` on prompts sorted by length, spinlm's batch size, and a merged adapter."""
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        self.players.model.merge_adapter()
        responses = self.transformers(seed, order, batch_size=self.engine.batch_size)
        self.players.model.unmerge_adapter()
        return responses


def _prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return list(row["messages"][:-1])
    return [{"role": "user", "content": row.get("question") or row["prompt"]}]


def measure(
    data: str, threads: int, prompts: int, new: int, rounds: int, dtype: str = "float32", model: str = MODEL
) -> str:
    """Return a Markdown table of tokens per second, medians over rounds that alternate between the methods."""
    import torch

    torch.set_num_threads(threads)
    bench = Bench(data, prompts, new, dtype, model)
    local = bench.spinlm(0, temperature=0.0, new=GREEDY)
    reference = bench.transformers(0, temperature=0.0, new=GREEDY)
    same = sum(a == b for a, b in zip(local, reference, strict=True))
    if same < 0.9 * prompts:  # rounding may decide between two equally likely tokens
        raise SystemExit(f"greedy responses agree for only {same} of {prompts} prompts")
    methods: dict[str, Callable[[int], list[list[int]]]] = {
        "spinlm": bench.spinlm,
        **({"spinlm, padded batches": functools.partial(bench.spinlm, padded=True)} if model == GPT_NEO else {}),
        "transformers, official method": bench.transformers,
        "transformers, sorted, spinlm's batch size, merged adapter": bench.transformers_tuned,
    }
    rates: dict[str, list[float]] = {name: [] for name in methods}
    lengths: list[int] = []
    for seed in range(rounds):
        for name, method in methods.items():
            started = time.perf_counter()
            responses = method(seed)
            rates[name].append(sum(map(len, responses)) / (time.perf_counter() - started))
            lengths += map(len, responses)
    sizes = [len(prompt) for prompt in bench.prompts]
    best = statistics.median(rates["spinlm"])
    finished = sum(length < new for length in lengths) / len(lengths)
    lines = [
        f"{prompts} prompts of {min(sizes)} to {max(sizes)} tokens; responses of {min(lengths)} to {max(lengths)} "
        f"tokens ({finished:.0%} finish within {new}). The first {GREEDY} tokens of greedy responses of spinlm and "
        f"transformers agree for {same} of {prompts} prompts.",
        "",
        "| | tokens/s | spinlm is |",
        "|---|---|---|",
    ]
    for name, values in rates.items():
        rate = statistics.median(values)
        lines.append(f"| {name} | {rate:.0f} | {f'{best / rate:.2f}× faster' if name != 'spinlm' else ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default=MODEL)
    print(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
