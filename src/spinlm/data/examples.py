"""Select a run's examples from a data set, and count the rows that are skipped and why.

Rows are read one at a time in a seeded order, and examples are written as they are accepted. So .jsonl and .arrow files
and hub data sets may be larger than memory; other files are held in memory.
"""

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spinlm.data.chat_template import shared_length
from spinlm.data.columns import recognize_layout
from spinlm.data.messages import NOT_AN_EXAMPLE
from spinlm.data.renderer import MIN_CHARACTER_LIMIT, Encoded, Renderer
from spinlm.data.sources import Source, open_source
from spinlm.distributed.progress import track
from spinlm.errors import DataError, RowError, shortened
from spinlm.recipe.data import Data
from spinlm.rundir.records import SPLITS, Example, Message

MAX_LISTED_ROWS = 100  # skipped rows that are listed one by one
MAX_CHANGED = 3  # changed responses that are shown


@dataclass(frozen=True)
class Selection:
    """The result of `select_examples`. With `turns: all`, some turns of a row can be skipped and others used."""

    counts: dict[str, int]  # split to number of examples
    rows: int  # in the source
    skipped: dict[str, int]  # reason to number of rows or turns
    skipped_rows: list[str]  # "file:row: reason: detail" of the first MAX_LISTED_ROWS
    truncated: int  # examples whose response was cut at the length limit
    changed: int  # responses whose rendered text is not the data's, apart from white space around it
    changed_responses: list[str]  # "file:row: both texts" of the first MAX_CHANGED
    not_sampled: int  # rows that were not needed
    columns: str  # which columns are used, and which ignored


def select_examples(
    data: Data, sft_prompts: int | None, renderer: Renderer, max_length: int, write: Callable[[str, Example], None]
) -> Selection:
    """Draw held-out examples, then examples for SFT alone, then those of self-play.

    The same data and seed give the same examples in the same order on every machine. All examples of a row go to the
    same split, exact duplicates are skipped, and a held-out prompt occurs in no other split.

    Args:
        data: the recipe's data section.
        sft_prompts: number of examples for SFT alone; None means none.
        renderer: tokenizes the conversations.
        max_length: maximum tokens of prompt and response together.
        write: called with each split and example, in order.

    Raises:
        DataError: the data cannot be read or the columns are not recognized; a row is bad and `data.on_bad_row` is
            `error`; or there are fewer usable examples than the recipe asks for.
    """
    source = open_source(data)
    sizes = {"heldout": data.heldout, "sft": sft_prompts or 0, "train": data.prompts or math.inf}
    selector = _Selector(data, sizes, source, renderer, max_length, write)
    rows = len(source)
    with track("prepare", int(min(rows, sum(sizes.values()))), unit="rows") as advance:
        for index in np.random.default_rng(data.seed).permutation(rows).tolist():
            if selector.split is None:
                break
            before = sum(selector.counts.values())
            selector.add_row(index)
            # If all rows are used, progress counts rows; otherwise it counts examples.
            advance(1 if data.prompts is None else sum(selector.counts.values()) - before, 1)
    return selector.selection()


class _Selector:
    """Fills one split after the other, one row at a time."""

    def __init__(
        self,
        data: Data,
        sizes: dict[str, float],
        source: Source,
        renderer: Renderer,
        max_length: int,
        write: Callable[[str, Example], None],
    ):
        self.data, self.sizes, self.source, self.renderer = data, sizes, source, renderer
        self.max_length, self.write = max_length, write
        self.layout = recognize_layout(source, data.columns)
        self.counts = dict.fromkeys(SPLITS, 0)
        self.skipped: Counter[str] = Counter()
        self.skipped_rows: list[str] = []
        self.digests: set[bytes] = set()
        self.heldout_prompts: set[bytes] = set()
        self.ids: set[str] = set()
        self.visited = self.truncated = self.changed = 0
        self.changed_responses: list[str] = []

    @property
    def split(self) -> str | None:
        """The split that is being filled; None when all are full."""
        return next((split for split in SPLITS if self.counts[split] < self.sizes[split]), None)

    def add_row(self, index: int) -> None:
        """Add the examples of a row, all to the split that is being filled.

        Raises:
            DataError: the row is bad, and `data.on_bad_row` is `error`.
        """
        split = self.split
        assert split is not None
        self.visited += 1
        try:
            row = self.source.row(index)
            conversation = self.layout.conversation(row)
            row_id = self.layout.row_id(row)
            positions = self.layout.responses(conversation, self.data.turns)
            rejected = self.layout.rejected_response(row, conversation)
            tools = self.layout.tools(row)
        except RowError as error:
            self._bad_row(index, error)
            return
        messages = conversation.messages
        if conversation.error and self.data.turns == "all":  # the turns before it remain examples
            self._bad_row(index, conversation.error)
        for turn, position in enumerate(positions):
            if self.counts[split] >= self.sizes[split]:
                return
            responses = [messages[position], *rejected]
            content = _digest([messages[:position], *map(_response_key, responses), *([tools] if tools else [])]).hex()[
                :16
            ]
            example_id = (row_id or content) + (f"-{turn}" if len(positions) > 1 else "")
            while example_id in self.ids:
                example_id += f"-{content}"
            try:
                self._add_example(split, index, example_id, messages[:position], responses, tools)
            except RowError as error:
                self._bad_row(index, error)

    def _add_example(
        self,
        split: str,
        index: int,
        example_id: str,
        messages: list[Message],
        responses: list[Message],
        tools: list[Any] | None,
    ) -> None:
        """Add one prompt, its response and, with preferences, the rejected response; or count why it is skipped.

        Raises:
            RowError: the prompt or a response is empty or cannot be rendered.
        """
        _check_not_empty(messages, responses)
        messages = self.renderer.place_system(messages)
        real, *others = (
            self.renderer.encode(messages, response["content"], self.max_length, tools, _other_fields(response))
            for response in responses
        )
        # Compare tokens, because a template may render different texts to the same tokens.
        prompt = _digest(real.prompt_ids)
        digest = _digest([real.prompt_ids, *(encoded.response_ids for encoded in (real, *others))])
        if digest in self.digests:
            self._skip(index, "duplicate", "the prompt and the response are those of an earlier row")
            return
        if split != "heldout" and prompt in self.heldout_prompts:
            self._skip(index, "prompt_in_heldout", "the prompt is a held-out prompt")
            return
        self.ids.add(example_id)
        self.digests.add(digest)
        if split == "heldout":
            self.heldout_prompts.add(prompt)
        self.counts[split] += 1
        self.truncated += real.truncated
        for response, encoded in zip(responses, (real, *others), strict=True):
            self._compare(index, response, encoded)
        example = Example(
            example_id,
            messages,
            real.text,
            real.prompt_ids,
            real.response_ids,
            source=self.source.label(index),
            rejected_ids=others[0].response_ids if others else None,
            tools=tools,
        )
        self.write(split, example)

    def _compare(self, index: int, response: Message, encoded: Encoded) -> None:
        """Count a response whose rendered text is not the data's. The renderer compares responses with other fields."""
        text, rendered = response["content"].strip(), encoded.rendered.strip()
        if text == rendered or _other_fields(response) or len(text) > MIN_CHARACTER_LIMIT:
            return
        self.changed += 1
        if len(self.changed_responses) < MAX_CHANGED:
            begin = max(0, shared_length(text, rendered) - 20)
            ends = [("…" if begin else "") + shortened(repr(value[begin:]), 120) for value in (text, rendered)]
            self.changed_responses.append(f"{self.source.label(index)}:\n  data      {ends[0]}\n  rendered  {ends[1]}")

    def _bad_row(self, index: int, error: RowError) -> None:
        if self.data.on_bad_row == "error" and error.reason not in NOT_AN_EXAMPLE:
            raise DataError(
                f"{self.source.place(index)}: {error}. Correct or remove it, or set data.on_bad_row: skip"
            ) from error
        self._skip(index, error.reason, str(error))

    def _skip(self, index: int, reason: str, detail: str) -> None:
        self.skipped[reason] += 1
        if len(self.skipped_rows) < MAX_LISTED_ROWS:
            self.skipped_rows.append(f"{self.source.label(index)}: {reason}: {detail}")

    def selection(self) -> Selection:
        """Return the counts.

        Raises:
            DataError: there are fewer usable examples than the recipe asks for.
        """
        rows, counts, sizes, skipped = len(self.source), self.counts, self.sizes, dict(self.skipped)
        if any(counts[split] < (1 if math.isinf(size) else size) for split, size in sizes.items()):
            numbers = ", ".join(
                f"{counts[split]} of {'at least 1' if math.isinf(size) else size} {split}"
                for split, size in sizes.items()
                if size
            )
            reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items()) or "none"
            raise DataError(
                f"{self.source.where}: not enough usable examples: {numbers}. {rows} rows gave {sum(counts.values())} "
                f"examples; skipped: {reasons}. Add rows, or lower data.heldout, data.prompts or sft.prompts"
            )
        return Selection(
            counts,
            rows,
            skipped,
            self.skipped_rows,
            self.truncated,
            self.changed,
            self.changed_responses,
            not_sampled=rows - self.visited,
            columns=self.layout.column_summary(),
        )


def _other_fields(response: Message) -> Message:
    """Return the texts of a response besides its content, such as reasoning_content."""
    return {key: text for key, text in response.items() if key not in ("role", "content")}


def _response_key(response: Message) -> str | Message:
    """Return what identifies a response: its text, with its reasoning if it has one."""
    return response if _other_fields(response) else response["content"]


def _check_not_empty(messages: list[Message], responses: list[Message]) -> None:
    if not all(_is_visible(response["content"]) for response in responses):
        raise RowError("empty_response", "the response is empty")
    *_, last_user = (message["content"] for message in messages if message["role"] == "user")
    if not _is_visible(last_user):
        raise RowError("empty_prompt", "the prompt is empty")


def _is_visible(text: str) -> bool:
    """Return whether a text has a character other than white space, control and format characters."""
    return any(not sign.isspace() and unicodedata.category(sign) not in ("Cc", "Cf") for sign in text)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(
        json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    ).digest()
