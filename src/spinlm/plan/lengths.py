"""How long the data's prompts and responses are, in tokens: estimated from a local .jsonl file, or at most."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spinlm.config import Data, Recipe

CHARACTERS_PER_TOKEN = 4
SAMPLE_ROWS = 200


class Tokens(NamedTuple):
    """Tokens in the two layouts."""

    tree: int  # [prompt | real | synthetic …] in one row
    rows: int  # one response in a row, each behind the prompt


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens in a typical example."""

    prompt: int
    real: int
    synthetic: int
    longest_prompt: int
    source: str
    limits: bool  # the longest possible, not what the data have
    examples: int | None = None  # in the data; None where they were not counted
    counted: str = ""  # how

    def tokens(self, *parts: tuple[int, int]) -> Tokens:
        """Of some prompts with their real response and a number of synthetic ones each."""
        one = self.prompt + self.real
        tree = sum(prompts * (one + responses * self.synthetic) for prompts, responses in parts)
        return Tokens(tree, tree + sum(prompts * responses * self.prompt for prompts, responses in parts))


def find_lengths(recipe: Recipe) -> Lengths:
    """How long prompts and responses are: estimated from a local .jsonl file, else the recipe's limits."""
    limit, new = recipe.train.max_length, recipe.longest_synthetic
    path = Path(recipe.data.path).expanduser()
    count, counted, sizes = None, "", []
    if path.suffix == ".jsonl" and path.is_file():
        count, sample = _sample_lines(path)
        sizes = [size for line in sample for size in _sizes(line, recipe.data)]
        counted = f"lines counted in {path.name}"
        if sizes and recipe.data.turns == "every":
            turns = len(sizes) / len(sample)
            count, counted = round(count * turns), f"{counted}, {turns:.1f} turns in each"
    if not sizes:
        # The longest possible example: prompt and real response fill a row, and so do prompt and synthetic response.
        prompt = max(limit - new, limit // 2)
        real, source = limit - prompt, "at most: train.max_length, of which max_new_tokens (or half) for the response"
        counted += "; no prompt and response recognised in them"
        return Lengths(prompt, real, min(new, real), prompt, source, True, count, counted)
    fitting = [(prompt, real) for prompt, real in sizes if prompt < limit] or [(limit // 2, limit // 2)]
    prompt = math.ceil(sum(prompt for prompt, _ in fitting) / len(fitting))
    real = math.ceil(sum(min(real, limit - prompt) for prompt, real in fitting) / len(fitting))
    source = f"mean of {len(sizes)} examples in {path.name}, at {CHARACTERS_PER_TOKEN} characters per token"
    longest = max(prompt for prompt, _ in fitting)
    return Lengths(prompt, real, min(real, new), longest, source, False, count, counted)


def _sample_lines(path: Path) -> tuple[int, list[bytes]]:
    """How many lines a file has that are not blank, and up to SAMPLE_ROWS of them, evenly spread."""
    sample: list[bytes] = []
    count, stride = 0, 1
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            if count % stride == 0:
                sample.append(line)
                if len(sample) > SAMPLE_ROWS:
                    sample, stride = sample[::2], 2 * stride
            count += 1
    return count, sample


_PROMPTS = ("prompt", "instruction", "question")
_RESPONSES = ("response", "completion", "output", "answer", "chosen")


def _sizes(line: bytes, data: Data) -> list[tuple[int, int]]:
    """Tokens of the prompt and the response of each example in a row, roughly."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        return []
    columns = data.columns
    messages = row.get(columns.messages or "messages")
    if columns.prompt or not isinstance(messages, list):
        response = _text(row, columns.response, _RESPONSES)
        if isinstance(response, list):  # the prompt may stand before it there, too
            response = response[-1:]
        texts = {"user": _text(row, columns.prompt, _PROMPTS), "assistant": response}
        turns = [{"role": role, "content": text} for role, text in texts.items() if text is not None]
        messages = [row.get(columns.system or "system"), *turns]
    tokens = [_characters(message) / CHARACTERS_PER_TOKEN for message in messages]
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    replies = [at for at, role in enumerate(roles) if role == "assistant" and "user" in roles[:at]]
    chosen = {"first": replies[:1], "last": replies[-1:], "every": replies}[data.turns]
    return [(max(1, math.ceil(sum(tokens[:at]))), max(1, math.ceil(tokens[at]))) for at in chosen]


def _text(row: dict[str, Any], named: str | None, usual: tuple[str, ...]) -> Any:
    return next((row[name] for name in ([named] if named else usual) if row.get(name) is not None), None)


def _characters(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_characters, value))
    if isinstance(value, dict):
        return _characters(value.get("content", value.get("text")))
    return len(value) if isinstance(value, str) else 0
