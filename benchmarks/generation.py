"""The opponent's tokens per second, beside the way of the official SPIN code, with the same model and prompts.

    python benchmarks/generation.py [--data FILE.jsonl] [--threads 2] [--prompts 64] [--new 320]

The official code calls `generate` on batches of 16 in the order of the data, padded, each until its longest response
has ended; here that is transformers' own `generate` on PEFT's own layers, sampling at temperature 1 from the whole
distribution, as SPIN asks. Beside it stands `generate` with all that can be done for it here. Prompts are GSM8K's
questions where `--data` names its file, else those of the quickstart; answers end where they end. Greedy answers are
compared first, token by token.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import MODEL

BATCH = 16  # of the official code
GREEDY = 24  # tokens to compare


class Bench:
    """One model in memory, and the ways to sample from it."""

    def __init__(self, data: str, prompts: int, new: int, dtype: str):
        from spinlm.generation.local import LocalEngine
        from spinlm.model.players import Players
        from spinlm.recipe.load import parse_recipe
        from spinlm.rundir.layout import RunDir

        self.folder = tempfile.TemporaryDirectory()
        recipe = parse_recipe(
            {"model": {"path": MODEL, "dtype": dtype}, "lora": {"r": 16, "alpha": 32}, "data": {"path": "-"}}
        )
        self.players = Players(recipe, RunDir(Path(self.folder.name)))
        path = Path(data) if data else Path(__file__).parent.parent / "recipes" / "quickstart.jsonl"
        rows = [json.loads(line) for line in path.read_bytes().splitlines()[:prompts]]
        self.prompts = [self.players.renderer.prompt_ids(_prompt(row)) for row in rows]
        self.new = new
        self.stop_ids = self.players.renderer.stop_ids
        self.engine = LocalEngine(self.players.logprobs, recipe.opponent.batch_size, True)

    def spinlm(self, seed: int, temperature: float = 1.0, new: int | None = None) -> list[list[int]]:
        from spinlm.generation.base import Sampling

        sampling = Sampling(temperature, 1.0, new or self.new, 4096, 1, self.stop_ids)
        answers = self.engine.generate(self.prompts, sampling, seed, lambda ended, tokens: None)
        return [answer.token_ids for (answer,) in answers]

    def transformers(
        self,
        seed: int,
        order: list[int] | None = None,
        temperature: float = 1.0,
        new: int | None = None,
        size: int = BATCH,
    ) -> list[list[int]]:
        import torch

        from spinlm.model.fused import fuse_layers

        model = self.players.model
        self.players.logprobs.use_tree_attention(False)
        for layer in model.modules():
            vars(layer).pop("forward", None)  # PEFT's own
        torch.manual_seed(seed)
        order = order or list(range(len(self.prompts)))
        found: dict[int, list[int]] = {}
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
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
                    **how,
                )
            for index, row in zip(batch, out[:, width:].tolist(), strict=True):
                ends = [place for place, token in enumerate(row) if token in self.stop_ids]
                found[index] = row[: ends[0] + 1] if ends else row
        fuse_layers(model)
        return [found[index] for index in range(len(self.prompts))]

    def transformers_at_its_best(self, seed: int) -> list[list[int]]:
        """Sorted by length, as many at once as spinlm has, the adapter merged."""
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        self.players.model.merge_adapter()
        found = self.transformers(seed, order, size=self.engine.batch_size)
        self.players.model.unmerge_adapter()
        return found


def _prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return list(row["messages"][:-1])
    return [{"role": "user", "content": row.get("question") or row["prompt"]}]


def measure(data: str, threads: int, prompts: int, new: int, rounds: int, dtype: str = "float32") -> str:
    """A Markdown table of tokens per second, medians over rounds that are taken in turn."""
    import torch

    torch.set_num_threads(threads)
    bench = Bench(data, prompts, new, dtype)
    ours = bench.spinlm(0, temperature=0.0, new=GREEDY)
    theirs = bench.transformers(0, temperature=0.0, new=GREEDY)
    same = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    if same < 0.9 * prompts:  # rounding may decide between two tokens that are as likely
        raise SystemExit(f"greedy answers agree for {same} of {prompts} prompts only")
    ways: dict[str, Callable[[int], list[list[int]]]] = {
        "spinlm": bench.spinlm,
        "transformers, official way": bench.transformers,
        "transformers, sorted, as many at once as spinlm, adapter merged": bench.transformers_at_its_best,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    lengths: list[int] = []
    for seed in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            answers = way(seed)
            count = sum(map(len, answers))
            rates[name].append(count / (time.perf_counter() - began))
            lengths += map(len, answers)
    size = [len(prompt) for prompt in bench.prompts]
    best = statistics.median(rates["spinlm"])
    lines = [
        f"{prompts} prompts of {min(size)} to {max(size)} tokens; answers of {min(lengths)} to {max(lengths)} tokens, "
        f"{sum(length < new for length in lengths) / len(lengths):.0%} of which end by themselves within {new}; greedy "
        f"answers of spinlm and transformers are the same {GREEDY} tokens for {same} of {prompts} prompts.",
        "",
        "| | tokens/s | spinlm is |",
        "|---|---|---|",
    ]
    for name, found in rates.items():
        rate = statistics.median(found)
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
    print(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
