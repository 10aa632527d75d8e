"""Token lengths of prompts and responses: estimated from a local file, or the recipe's limits."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from spinlm.data.columns import Layout, recognize_layout
from spinlm.data.readers import file_kind, is_read_by_line
from spinlm.data.sources import Source, data_files, open_source
from spinlm.errors import DataError, RowError
from spinlm.recipe.data import Data
from spinlm.recipe.schema import Recipe

SAMPLE_ROWS = 200
MAX_FILE_BYTES = 1 << 26  # of files that have to be read whole; larger ones are not read for a plan
MESSAGE_TOKENS = 5  # of a chat template around a message, its role included
RESPONSE_START_TOKENS = 3  # of a chat template between the prompt and the response


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a typical example, and how many examples the data have."""

    prompt: int
    real: int
    synthetic: int
    longest_prompt: int
    source: str
    are_limits: bool  # the recipe's limits, not the data's lengths
    examples: int | None = None  # None if not counted
    data_error: str = ""  # why the data cannot be used
    bad_rows: str = ""  # how many of the sampled rows cannot be used, and why

    def tokens(self, prefix_sharing: bool, *parts: tuple[int, int]) -> int:
        """Count tokens of prompts, each with its real response and a number of synthetic ones.

        Args:
            prefix_sharing: whether the responses share one copy of the prompt.
            parts: pairs of (prompts, synthetic responses per prompt).
        """
        response = self.synthetic + (0 if prefix_sharing else self.prompt)
        return sum(prompts * (self.prompt + self.real + responses * response) for prompts, responses in parts)


def find_lengths(recipe: Recipe) -> Lengths:
    """Return the lengths of a recipe's examples."""
    examples, sizes, error, bad_rows = _sample_data(recipe.data)
    limit, new = recipe.train.max_length, recipe.longest_synthetic
    name = ", ".join(Path(path).name for path in recipe.data.paths[:3])
    if sizes:
        fitting = [(prompt, real) for prompt, real in sizes if prompt < limit] or [(limit // 2, limit // 2)]
        prompt = math.ceil(sum(prompt for prompt, _ in fitting) / len(fitting))
        real = math.ceil(sum(min(real, limit - prompt) for prompt, real in fitting) / len(fitting))
        longest = max(prompt for prompt, _ in fitting)
        source = f"mean of {len(sizes)} examples in {name}, estimated from words and punctuation"
    else:
        # The longest possible example: prompt and real response fill a row, and so do prompt and synthetic response.
        prompt = longest = max(limit - new, limit // 2)
        real, source = limit - prompt, "upper limits, from train.max_length and opponent.max_new_tokens"
    return Lengths(
        prompt,
        real,
        min(real, new),
        longest,
        source,
        are_limits=not sizes,
        examples=examples,
        data_error=error,
        bad_rows=bad_rows,
    )


def _sample_data(data: Data) -> tuple[int | None, list[tuple[int, int]], str, str]:
    """Count the examples of a local file and measure some.

    Returns:
        The number of examples (None if unknown), the tokens of prompt and response of some, why the data cannot be used
        (empty if they can), and a note on rows that cannot be used. Hub data sets and large files are not read.
    """
    source: Source | None = None
    try:
        files = data_files(data)
        if files is None or sum(file.stat().st_size for file in files if _is_read_whole(file)) > MAX_FILE_BYTES:
            return None, [], "", ""
        source = open_source(data)
        layout = recognize_layout(source, data.columns)
    except DataError as error:
        return len(source) if source else None, [], str(error), ""
    rows = len(source)
    sizes, readable, faults = [], 0, []
    for index in _sample(rows):
        try:
            sizes += _example_sizes(source.row(index), layout, data.turns)
            readable += 1
        except RowError as error:
            faults.append(f"{source.place(index)}: {error}")
    examples = round(rows * len(sizes) / readable) if data.turns == "all" and readable else rows
    if faults and not readable:
        return examples, [], f"no row can be used: {faults[0]}", ""
    note = f"{len(faults)} of {len(faults) + readable} sampled rows cannot be used: {faults[0]}." if faults else ""
    return examples, sizes, "", note


def _is_read_whole(file: Path) -> bool:
    return not is_read_by_line(file) and file_kind(file) != ".arrow"


def _sample(count: int) -> range:
    """Return at most SAMPLE_ROWS indices, evenly spread; an odd step does not follow a cycle of kinds in the data."""
    return range(0, count, math.ceil(count / SAMPLE_ROWS) | 1)


def _example_sizes(row: dict[str, object], layout: Layout, turns: str) -> list[tuple[int, int]]:
    """Estimate the tokens of the prompt and of the response, for each example of a row.

    Raises:
        RowError: the row cannot be used.
    """
    conversation = layout.conversation(row)
    tokens = [
        sum(estimate_tokens(text) for key, text in message.items() if key != "role")
        for message in conversation.messages
    ]
    tools = layout.tools(row)
    tool_tokens = estimate_tokens(json.dumps(tools)) if tools else 0
    sizes = []
    for position in layout.responses(conversation, turns):
        template = MESSAGE_TOKENS * position + RESPONSE_START_TOKENS
        sizes.append((math.ceil(tool_tokens + sum(tokens[:position]) + template), math.ceil(tokens[position]) + 1))
    return sizes


_WORD, _SIGNS, _SINGLE = re.compile(r"[^\W\d_]+"), re.compile(r"[^\w\s]+|_+"), re.compile(r"\d|\n+")


def estimate_tokens(text: str) -> float:
    """Estimate the tokens of a text without a tokenizer.

    Tuned on SmolLM2's vocabulary: a common word is one token, capitals and other alphabets are several, each digit is
    one. For English prose, code, arithmetic and JSON the mean is within 20% of the true count.
    """
    words = sum(map(_word_tokens, _WORD.findall(text)))
    return words + sum(1 + 0.5 * (len(signs) - 1) for signs in _SIGNS.findall(text)) + len(_SINGLE.findall(text))


def _word_tokens(word: str) -> float:
    if not word.isascii() or (word.isupper() and len(word) > 1):
        return max(1.0, len(word) / 2.5)
    return 1 + 0.05 * max(0, len(word) - 4)
