"""Selection of examples: columns, preferences, turns, ids, splits, and every way a row can be bad."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import assistant, system, user
from spinlm.data.examples import Selection, select_examples
from spinlm.data.renderer import Renderer
from spinlm.errors import DataError
from spinlm.recipe.data import Columns, Data
from spinlm.rundir.records import Example
from tiny import tiny_tokenizer

Row = dict[str, Any]
Splits = dict[str, list[Example]]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer("chatml"))


@pytest.fixture
def select(renderer: Renderer, tmp_path: Path) -> Callable[..., tuple[Selection, Splits]]:
    """Select from rows (written to rows.jsonl) or from the file `path`."""

    def select(
        rows: list[Any] | None = None, sft_prompts: int | None = None, max_length: int = 1000, **data: Any
    ) -> tuple[Selection, Splits]:
        if rows is not None:
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            data["path"] = str(path)
        splits: Splits = defaultdict(list)
        recipe = Data.model_validate({"heldout": 1, **data})
        selection = select_examples(
            recipe, sft_prompts, renderer, max_length, lambda split, example: splits[split].append(example)
        )
        assert selection.counts == {split: len(splits[split]) for split in ("heldout", "sft", "train")}
        return selection, splits

    return select


def rows(count: int) -> list[Row]:
    return [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(count)]


def everything(splits: Splits) -> list[Example]:
    return [example for examples in splits.values() for example in examples]


def by_source(splits: Splits) -> list[tuple[list[Row], str]]:
    """Prompt and response in the order of the file."""
    ordered = sorted(everything(splits), key=lambda example: int(example.source.rpartition(":")[2]))
    return [(example.messages, example.response) for example in ordered]


def test_an_example_is_tokenized_by_the_renderer(select: Any, renderer: Renderer) -> None:
    _, splits = select(rows(3))
    for example in everything(splits):
        encoded = renderer.encode(example.messages, example.response, 1000)
        assert (example.prompt_ids, example.response_ids) == (encoded.prompt_ids, encoded.response_ids)


def test_layouts_are_tried_in_order(select: Any) -> None:
    row = {"messages": [user("m"), assistant("M")], "prompt": "p", "response": "P", "question": "q", "answer": "Q"}
    other = {**row, "messages": [user("n"), assistant("N")], "prompt": "o", "question": "r"}

    def prompts(**columns: str) -> list[str]:
        _, splits = select([row, other], columns=columns)
        return [f"{messages[0]['content']}{response}" for messages, response in by_source(splits)]

    assert prompts() == ["mM", "nN"]
    assert prompts(prompt="question") == ["qP", "rP"]  # a prompt alone goes with the usual response column
    assert prompts(response="answer") == ["pQ", "oQ"]
    assert prompts(prompt="question", response="answer") == ["qQ", "rQ"]


def test_named_columns(select: Any) -> None:
    named = [{"id": n, "ctx": "Be kind", "q": f"q{n}", "a": "A"} for n in range(2)]
    _, splits = select(named, columns={"prompt": "q", "response": "a", "system": "ctx", "id": "id"})
    assert by_source(splits) == [([system("Be kind"), user(f"q{n}")], "A") for n in range(2)]
    assert {example.id for example in everything(splits)} == {"0", "1"}

    talks = [{"talk": [user(f"q{n}"), assistant("A")]} for n in range(2)]
    _, splits = select(talks, columns={"messages": "talk"})
    assert by_source(splits) == [([user("q0")], "A"), ([user("q1")], "A")]

    alpaca = [{"instruction": f"Add {n}", "input": "1", "output": "2"} for n in range(2)]
    _, splits = select(alpaca, columns={"prompt": "instruction", "response": "output"})
    assert by_source(splits)[0] == ([user("Add 0\n\n1")], "2")  # named or not, the input belongs to it


PREFERENCES: dict[str, Row] = {
    "text": {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
    "messages": {"prompt": [user("Hi")], "chosen": [assistant("Yo")], "rejected": [assistant("No")]},
    "whole conversations": {"chosen": [user("Hi"), assistant("Yo")], "rejected": [user("Hi"), assistant("No")]},
    "whole conversations beside the prompt": {
        "prompt": "Hi",
        "chosen": [user("Hi"), assistant("Yo")],
        "rejected": [user("Hi"), assistant("No")],
        "messages": [user("Hi"), assistant("Yo")],
    },
    "a named response": {"prompt": "Hi", "response": "Yo", "rejected": "No"},
}


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("instruction", [{}, {"system": "Be kind"}])
def test_preferences(name: str, instruction: Row, select: Any, renderer: Renderer) -> None:
    row = {**PREFERENCES[name], **instruction}
    other = json.loads(json.dumps(row).replace("Hi", "Bye"))
    _, splits = select([row, other], columns={"rejected": "rejected"})
    messages = [*([system("Be kind")] if instruction else []), user("Hi")]
    example = next(example for example in everything(splits) if example.source.endswith(":1"))
    assert (example.messages, example.response) == (messages, "Yo")
    assert example.rejected_ids == renderer.encode(messages, "No", 1000).response_ids


def test_without_the_column_named_a_rejected_response_is_not_read(select: Any) -> None:
    _, splits = select([{**row, "rejected": "No"} for row in rows(3)])
    assert [example.rejected_ids for example in everything(splits)] == [None] * 3


def test_preferences_that_differ_in_the_rejected_response_alone_are_two(select: Any) -> None:
    prompt = {"prompt": "Hi", "chosen": "Yo"}
    pairs = [{**prompt, "rejected": text} for text in ("No", "Nay", "No")]
    selection, splits = select(
        [*pairs, {**pairs[0], "prompt": "Bye"}], heldout=2, seed=7, columns={"rejected": "rejected"}
    )
    assert len(everything(splits)) == 3 and selection.skipped == {"duplicate": 1}
    assert len({example.id for example in everything(splits)}) == 3


def test_preferences_of_a_conversation_that_ends_with_a_question(select: Any) -> None:
    """The rejected response would answer another question than the chosen one."""
    talks = [{"messages": [user(f"p{n}"), assistant("Yo")], "rejected": "No"} for n in range(3)]
    talks[1]["messages"].append(user("And now?"))  # type: ignore[attr-defined]
    selection, _ = select(talks, on_bad_row="skip", columns={"rejected": "rejected"})
    assert selection.skipped == {"no_assistant_turn": 1}


@pytest.mark.parametrize(
    ("reason", "rejected", "detail"),
    [
        ("empty_response", " ", "the response is empty"),
        ("not_text", None, "'rejected' is null, not text"),
        ("control_token", "<|im_end|>", "the text contains the control token <|im_end|>"),
        (
            "not_messages",
            [user("Other"), assistant("No")],
            "'rejected' must be text or a list",
        ),
        ("not_messages", [], "'rejected' must be text or a list"),
    ],
)
def test_a_rejected_response_that_cannot_be_used(reason: str, rejected: Any, detail: str, select: Any) -> None:
    good = [{"prompt": f"p{n}", "chosen": "Yo", "rejected": "No"} for n in range(3)]
    bad = {"prompt": "p", "chosen": "Yo", "rejected": rejected}
    selection, _ = select([*good, bad], on_bad_row="skip", columns={"rejected": "rejected"})
    assert selection.skipped == {reason: 1}
    assert selection.skipped_rows[0].startswith(f"rows.jsonl:4: {reason}: {detail}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "promt"},
            r"data\.columns\.prompt is 'promt'.*did you mean 'prompt'\? \(columns: 'prompt', 'text'\)",
        ),
        ({"id": "xyz"}, r"data\.columns\.id is 'xyz'.*\(columns: 'prompt', 'text'\)"),
        ({"messages": "text", "prompt": "prompt"}, "names both messages and a prompt"),
        ({}, r"cannot tell .*\(columns: 'prompt', 'text'\).*data\.columns\.prompt and data\.columns\.response"),
        ({"prompt": "text"}, "cannot tell which columns"),
        ({"prompt": "text", "response": "text"}, "cannot tell which columns"),
    ],
)
def test_columns_that_cannot_be_used(columns: dict[str, str], message: str, select: Any) -> None:
    with pytest.raises(DataError, match=message):
        select([{"prompt": "p", "text": "t"}], columns=columns)


def test_a_column_that_only_later_rows_have_is_found(select: Any) -> None:
    with_system = [*rows(2), {"prompt": "p", "response": "r", "system": "Be kind"}]
    _, splits = select(with_system)
    assert by_source(splits)[2] == ([system("Be kind"), user("p")], "r")


CONVERSATION = [system("S"), assistant("Welcome"), user("1"), assistant("A"), user("2"), assistant("B")]


def test_turns(select: Any) -> None:
    talks = [{"messages": CONVERSATION, "prompt_id": "x"}, {"messages": [user("z"), assistant("Z")], "prompt_id": "z"}]

    def first_row(turns: str) -> dict[str, tuple[list[Row], str]]:
        _, splits = select(talks, turns=turns)
        return {e.id: (e.messages, e.response) for e in everything(splits) if e.source == "rows.jsonl:1"}

    # a greeting answers nobody: it is part of the prompt
    assert first_row("first") == {"x": (CONVERSATION[:3], "A")}
    assert first_row("last") == {"x": (CONVERSATION[:5], "B")}


def test_every_turn_of_a_row_goes_to_one_split_and_the_count_is_exact(select: Any) -> None:
    talks = [
        {"messages": [m for turn in range(3) for m in (user(f"{n} {turn}"), assistant("A"))], "prompt_id": str(n)}
        for n in range(10)
    ]
    selection, splits = select(talks, turns="all", heldout=4, sft_prompts=3, prompts=5)
    assert selection.counts == {"heldout": 4, "sft": 3, "train": 5}
    assert selection.not_sampled == 10 - (2 + 1 + 2)
    sources = [{example.source for example in examples} for examples in splits.values()]
    assert len(set.union(*sources)) == sum(map(len, sources)) == 5
    row = splits["heldout"][0].id.partition("-")[0]
    assert [example.id for example in splits["heldout"][:3]] == [f"{row}-0", f"{row}-1", f"{row}-2"]
    assert [len(example.messages) for example in splits["heldout"]] == [1, 3, 5, 1]


def test_turns_leave_a_response_column_alone(select: Any) -> None:
    talks = [{"prompt": [user(n), assistant("A"), user("2")], "response": "B"} for n in "xy"]
    _, splits = select(talks, turns="first")
    assert [example.response for example in everything(splits)] == ["B", "B"]


def test_ids(select: Any) -> None:
    one = [{"prompt": "What is 0?", "response": "It is 0."}, {"prompt": "Other", "response": "It is 0."}]
    _, splits = select(one)
    # sha256 of [[{"content":"What is 0?","role":"user"}],"It is 0."]
    assert {example.id for example in everything(splits) if example.source.endswith(":1")} == {"5bb29fa77ee3296b"}

    same = [{"prompt": f"p{n}", "response": "r", "key": "k"} for n in range(3)]
    _, splits = select(same, columns={"id": "key"})
    first, *others = everything(splits)
    assert first.id == "k"
    assert all(example.id.startswith("k-") and len(example.id) == 18 for example in others)
    assert len({example.id for example in everything(splits)}) == 3

    partly = [{"messages": [user(n), assistant("r")], "prompt_id": i} for n, i in (("a", "A"), ("b", None))]
    _, splits = select(partly)
    assert sorted(len(example.id) for example in everything(splits)) == [1, 16]


def test_selection_is_exact_disjoint_and_depends_on_the_seed_only(select: Any, tmp_path: Path) -> None:
    selection, splits = select(rows(40), heldout=5, sft_prompts=4, prompts=20, seed=3)
    assert selection == Selection(
        counts={"heldout": 5, "sft": 4, "train": 20},
        rows=40,
        skipped={},
        skipped_rows=[],
        truncated=0,
        changed=0,
        changed_responses=[],
        not_sampled=11,
        columns="prompt, response (used)",
    )
    prompts = [example.messages[0]["content"] for example in everything(splits)]
    assert len(set(prompts)) == 29
    assert prompts != sorted(prompts, key=lambda p: int(p[8:-1]))

    again = select(rows(40), heldout=5, sft_prompts=4, prompts=20, seed=3)
    assert again == (selection, splits)
    elsewhere = tmp_path / "other" / "rows.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    assert select(path=str(elsewhere), heldout=5, sft_prompts=4, prompts=20, seed=3) == (selection, splits)

    _, reseeded = select(rows(40), heldout=5, sft_prompts=4, prompts=20, seed=4)
    assert reseeded["heldout"] != splits["heldout"]
    # numpy's default_rng(3).permutation(40) begins so
    assert [example.source for example in splits["heldout"][:3]] == ["rows.jsonl:24", "rows.jsonl:33", "rows.jsonl:31"]


def test_heldout_examples_do_not_depend_on_how_many_train(select: Any) -> None:
    _, few = select(rows(20), heldout=5, prompts=3)
    _, all_that_are_left = select(rows(20), heldout=5)
    assert few["heldout"] == all_that_are_left["heldout"]
    assert few["train"] == all_that_are_left["train"][:3]
    assert len(all_that_are_left["train"]) == 15


def test_duplicates_are_skipped_and_counted_even_where_bad_rows_are_errors(select: Any) -> None:
    selection, splits = select([*rows(10), *rows(10)], heldout=2)
    assert selection.skipped == {"duplicate": 10}
    assert len(everything(splits)) == 10
    assert selection.skipped_rows[0].startswith("rows.jsonl:")
    assert selection.skipped_rows[0].split(": ")[1] == "duplicate"


def test_heldout_prompts_are_never_trained_on(select: Any) -> None:
    several = [{"prompt": f"p{n % 8}", "response": f"r{n}"} for n in range(64)]
    selection, splits = select(several, heldout=4, sft_prompts=4, prompts=20)
    heldout = {example.messages[0]["content"] for example in splits["heldout"]}
    assert heldout.isdisjoint(example.messages[0]["content"] for example in splits["sft"] + splits["train"])
    assert selection.skipped.keys() == {"prompt_in_heldout"}
    numbers = [int(line.split(":")[1]) for line in selection.skipped_rows]
    assert all(several[number - 1]["prompt"] in heldout for number in numbers)
    visited = selection.rows - selection.not_sampled
    assert visited == 28 + selection.skipped["prompt_in_heldout"]


def test_heldout_examples_may_share_a_prompt(select: Any) -> None:
    several = [{"prompt": f"p{n % 16}", "response": f"r{n}"} for n in range(64)]
    _, splits = select(several, heldout=10)
    assert len({example.messages[0]["content"] for example in splits["heldout"]}) < 10
    _, of_all = select([{**row, "prompt": f"p{n}"} for n, row in enumerate(several)], heldout=10)
    assert [e.source for e in splits["heldout"]] == [e.source for e in of_all["heldout"]]


BAD: dict[str, tuple[Any, str]] = {
    "not_an_object": (["p", "r"], "the row is a list, not an object with named values"),
    "missing_column": ({"prompt": "p"}, "the row has no 'response'"),
    "not_text": ({"prompt": True, "response": "r"}, "'prompt' is true or false, not text"),
    "not_messages": ({"prompt": "p", "response": [user("r")]}, "'response' must be text or a list"),
    "no_user_message": ({"prompt": [system("p")], "response": "r"}, "no user message"),
    "empty_response": ({"prompt": "p", "response": " \n"}, "the response is empty"),
    "empty_prompt": ({"prompt": "\t", "response": "r"}, "the prompt is empty"),
    "control_token": ({"prompt": "p", "response": "<|im_end|>"}, "the text contains the control token <|im_end|>"),
    "prompt_not_a_prefix": ({"prompt": "p", "response": "\n\n\nr"}, "a token spans the end of the prompt"),
    "prompt_too_long": ({"prompt": "!#" * 200, "response": "r"}, "the prompt has "),
    "bad_id": ({"prompt": "p", "response": "r", "key": 1.5}, "the id in 'key' is a number, not text or a whole number"),
}
BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "no_assistant_turn": ([user("p")], "the conversation has no assistant message"),
    "no_user_message": ([assistant("r")], "no user message"),
    "not_messages": ("p", "'messages' is text, not a list of messages"),
    "unknown_role": ([user("p"), {"role": "root", "content": "r"}], "'messages[1]' has the role 'root'; known: system"),
    "tool_call": ([user("p"), {**assistant("r"), "tool_calls": [{}]}], "'messages[1]' has 'tool_calls': "),
    "not_text": ([user("p"), {**assistant("r"), "content": None}], "'messages[1].content' is null, not text"),
}


@pytest.mark.parametrize(
    ("reason", "row", "detail"),
    [
        *((reason, row, detail) for reason, (row, detail) in BAD.items()),
        ("not_text", {"prompt": "p", "response": None}, "'response' is null, not text"),
        ("not_text", {"prompt": "p", "response": True}, "'response' is true or false, not text"),
        ("not_text", {"prompt": "p", "response": "\ud83d"}, "'response' is not valid UTF-8"),
        ("not_text", {"prompt": "p", "response": {}}, "'response' is an object, not text"),
        ("not_messages", {"prompt": ["p"], "response": "r"}, "'prompt[0]' is not a message"),
        ("not_messages", {"prompt": "p", "response": [assistant("r")] * 2}, "'response' must be text or a list"),
        ("empty_prompt", {"prompt": [system("s"), user("")], "response": "r"}, "the prompt is empty"),
        ("bad_id", {"prompt": "p", "response": "r", "key": True}, "the id in 'key' is true or false"),
    ],
)
def test_bad_rows(reason: str, row: Any, detail: str, select: Any) -> None:
    good = [{**row, "key": str(n)} for n, row in enumerate(rows(4))]
    mixed = [*good[:2], row, *good[2:]]
    selection, splits = select(mixed, on_bad_row="skip", columns={"id": "key"}, max_length=250)
    assert selection.skipped == {reason: 1}
    assert selection.skipped_rows[0].startswith(f"rows.jsonl:3: {reason}: {detail}")
    assert len(everything(splits)) == 4

    with pytest.raises(DataError) as caught:
        select(mixed, columns={"id": "key"}, max_length=250)
    assert f"rows.jsonl, row 3: {detail}" in str(caught.value)
    assert str(caught.value).endswith(". Correct or remove it, or set data.on_bad_row: skip")


@pytest.mark.parametrize(
    ("reason", "messages", "detail"),
    [
        *((reason, messages, detail) for reason, (messages, detail) in BAD_MESSAGES.items()),
        ("not_messages", ["p"], "'messages[0]' is not a message: an object with role and content"),
        ("not_messages", [{"role": "user"}], "'messages[0]' is not a message"),
        ("not_text", [user([{"type": "image"}]), assistant("r")], "'messages[0]' has a part of the type 'image'"),  # type: ignore[arg-type]
        ("not_text", [user([{"type": "text"}]), assistant("r")], "'messages[0].content' is null, not text"),  # type: ignore[arg-type]
        ("no_assistant_turn", [], "the conversation has no assistant message"),
        ("empty_response", [user("p"), assistant("")], "the response is empty"),
    ],
)
def test_bad_conversations(reason: str, messages: Any, detail: str, select: Any) -> None:
    good = [{"messages": [user(f"p{n}"), assistant("r")]} for n in range(3)]
    selection, _ = select([*good, {"messages": messages}], on_bad_row="skip")
    assert selection.skipped == {reason: 1}
    assert selection.skipped_rows[0].startswith(f"rows.jsonl:4: {reason}: {detail}")


def test_a_template_that_refuses_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    talks = [{"messages": [user(f"{n}"), assistant("r")]} for n in range(3)]
    path.write_text(
        "\n".join(json.dumps(row) for row in [{"messages": [system("s"), user("p"), assistant("r")]}, *talks])
    )
    renderer = Renderer(tiny_tokenizer("mistral"))
    selection = select_examples(
        Data(path=str(path), heldout=1, on_bad_row="skip"), None, renderer, 1000, lambda split, example: None
    )
    assert selection.skipped == {"template_refused": 1}


def test_with_every_turn_only_bad_turns_are_skipped(select: Any) -> None:
    talk = {"messages": [user("1"), assistant("A"), user("2"), assistant(""), user("3"), assistant("C")]}
    selection, splits = select(
        [talk, *({"messages": [user(n), assistant("r")]} for n in "xy")], turns="all", heldout=1, on_bad_row="skip"
    )
    assert selection.skipped == {"empty_response": 1}
    assert {"A", "C"} <= {example.response for example in everything(splits)}


def test_only_the_first_skipped_rows_are_listed(select: Any) -> None:
    empty = [{"prompt": f"p{n}", "response": ""} for n in range(150)]
    selection, _ = select([*rows(2), *empty], on_bad_row="skip")
    assert selection.skipped == {"empty_response": 150}
    assert len(selection.skipped_rows) == 100


def test_truncated_responses_are_counted(select: Any, renderer: Renderer) -> None:
    long = [{"prompt": "p", "response": "one two three four five six seven"}, *rows(2)]
    room = len(renderer.prompt_ids([user("What is 0?")])) + 8
    selection, splits = select(long, max_length=room)
    assert selection.truncated == 1
    cut = next(example for example in everything(splits) if example.messages == [user("p")])
    assert len(cut.prompt_ids) + len(cut.response_ids) == room
    assert cut.response == "one two three four five six seven"
    assert renderer.end_id not in cut.response_ids


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"heldout": 8}, "6 of 8 heldout, 0 of at least 1 train. 8 rows gave 6 examples; skipped: "),
        ({"heldout": 6}, "6 of 6 heldout, 0 of at least 1 train"),
        ({"heldout": 2, "sft_prompts": 3, "prompts": 4}, "2 of 2 heldout, 3 of 3 sft, 1 of 4 train"),
    ],
)
def test_too_few_usable_rows(asked: dict[str, int], message: str, select: Any) -> None:
    few = [*rows(6), {"prompt": "p", "response": ""}, rows(1)[0]]
    with pytest.raises(DataError) as caught:
        select(few, on_bad_row="skip", **asked)
    assert f"rows.jsonl: not enough usable examples: {message}" in str(caught.value)
    assert "duplicate 1" in str(caught.value) or "prompt_in_heldout 1" in str(caught.value)
    assert "empty_response 1" in str(caught.value)


def test_just_enough_rows(select: Any) -> None:
    selection, _ = select(rows(6), heldout=3, sft_prompts=1, prompts=2)
    assert selection.not_sampled == 0


def test_jsonl_numbers_lines_and_takes_what_editors_write(select: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(2)]
    path.write_bytes(
        ("\ufeff\r\n" + lines[0] + "\r\n\r\n   \r\n" + lines[1] + '\r\n{"prompt": "é😀", "response": "日本"}').encode()
    )
    selection, splits = select(path=str(path))
    assert selection.rows == 3
    assert sorted(example.source for example in everything(splits)) == ["rows.jsonl:2", "rows.jsonl:5", "rows.jsonl:6"]
    assert by_source(splits)[2] == ([user("é😀")], "日本")

    path.write_bytes(b"\xef\xbb\xbf" + lines[0].encode() + b"\n" + lines[1].encode())
    assert select(path=str(path))[0].rows == 2


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"prompt": "p", "resp', "not_json", "the line is not JSON: "),
        (b"[" * 100_000, "not_json", "the line is not JSON: "),
        (b'{"prompt": "p\xff", "response": "r"}', "not_text", "the line is not UTF-8: "),
        (b'"p"', "not_an_object", "the row is text, not an object"),
    ],
)
def test_damaged_lines(line: bytes, reason: str, detail: str, select: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line, *(json.dumps(row).encode() for row in rows(2))]))
    selection, _ = select(path=str(path), on_bad_row="skip")
    assert selection.skipped == {reason: 1}
    assert selection.skipped_rows[0].startswith(f"rows.jsonl:1: {reason}: {detail}")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: the (line|row) is"):
        select(path=str(path))

    path.write_bytes(line + b"\n\n" + line)
    with pytest.raises(DataError, match=r"rows\.jsonl: no row can be read; row 1: the (line|row) is"):
        select(path=str(path), on_bad_row="skip")


def test_json(select: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    expected = [([user(f"What is {n}?")], f"It is {n}.") for n in range(3)]
    for content in (rows(3), {"data": rows(3), "version": 1}, {"rows": rows(3), "data": "none"}):
        path.write_text("\ufeff" + json.dumps(content, indent=1), encoding="utf-8")
        selection, splits = select(path=str(path))
        assert by_source(splits) == expected
        assert sorted(example.source for example in everything(splits)) == [f"rows.json:{n}" for n in (1, 2, 3)]
        assert selection.rows == 3

    path.write_text(json.dumps([*rows(2), {"prompt": "", "response": "r"}]))
    with pytest.raises(DataError, match=r"rows\.json, row 3: the prompt is empty"):
        select(path=str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"rows\.json: not JSON: .*line 1.*\.jsonl"),
        ('{"a": 1}\n{"a": 2}', r"rows\.json: cannot tell which columns"),
        ('{"a": []}', r'rows\.json: must hold a list of objects, .*"data" or "rows"'),
        ('{"data": [], "rows": []}', r"must hold a list"),
        ("3", "must hold a list"),
        ("[]", r"rows\.json: is empty: it has no rows"),
        ("", r"rows\.json: is empty"),
        ('["p"]', r"rows\.json: no row can be read; row 1: the row is text, not an object"),
    ],
)
def test_json_that_cannot_be_used(content: str, message: str, select: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        select(path=str(path))


def test_csv(select: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "long " * 50_000
    path.write_text(
        f'\ufeffprompt,response,id\n"two\nlines, ""quoted""",007,1\n\nWhat?,"{long}",2\nshort\n', encoding="utf-8"
    )
    selection, splits = select(path=str(path), on_bad_row="skip")
    assert by_source(splits) == [([user('two\nlines, "quoted"')], "007"), ([user("What?")], long)]
    assert sorted(example.source for example in everything(splits)) == ["rows.csv:2", "rows.csv:5"]
    assert selection.skipped_rows == ["rows.csv:6: wrong_width: the row has 1 values for 3 columns"]
    with pytest.raises(DataError, match=r"rows\.csv, row 6: the row has 1 values for 3 columns"):
        select(path=str(path), heldout=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows\.csv: is empty"),
        (b"prompt,response\n", r"rows\.csv: is empty: it has no rows"),
        (b'prompt,response\na,b\n"c,d\ne,f\n', r"rows\.csv, line 3: not CSV: "),
        (b"prompt,response\na,\xff\n", r"rows\.csv, row 2: 'response' is not valid UTF-8"),
        (b"prompt,prompt\na,b\n", r"rows\.csv: two columns have the same name, 'prompt'"),
    ],
)
def test_csv_that_cannot_be_used(content: bytes, message: str, select: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        select(path=str(path))


def test_parquet(select: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    talks = [{"prompt": f"p{n}", "prompt_id": f"id{n}", "messages": [user(f"p{n}"), assistant("r")]} for n in range(3)]
    pa.parquet.write_table(pa.Table.from_pylist(talks), path, row_group_size=2)
    _, splits = select(path=str(path))
    assert by_source(splits) == [([user(f"p{n}")], "r") for n in range(3)]
    assert {(example.id, example.source) for example in everything(splits)} == {
        (f"id{n}", f"rows.parquet:{n + 1}") for n in range(3)
    }

    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file: "):
        select(path=str(path))
    pa.parquet.write_table(pa.Table.from_pylist(talks[:0], schema=pa.schema([("prompt", pa.string())])), path)
    with pytest.raises(DataError, match=r"rows\.parquet: is empty: it has no rows"):
        select(path=str(path))
    pa.parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    with pytest.raises(DataError, match=r"rows\.parquet: two columns have the same name, 'prompt'"):
        select(path=str(path))


def test_a_parquet_file_is_read_and_nothing_else(select: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the images that a column names nor an older file from a cache are read; nothing is written."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path, features = tmp_path / "rows.parquet", datasets.Features({"cover": datasets.Image()})
    described = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    for answer in ("old", "new"):
        table = pa.table(
            {
                "prompt": [f"p{n}" for n in range(3)],
                "response": [answer] * 3,
                "cover": [{"bytes": None, "path": "http://127.0.0.1:9/x.png"}] * 3,
            }
        )
        pa.parquet.write_table(table.replace_schema_metadata(described), path)
        os.utime(path, (1, 1))
        _, splits = select(path=str(path))
        assert {example.response for example in everything(splits)} == {answer}
    assert not cache.exists()


def test_a_value_of_a_parquet_file_that_cannot_be_read(select: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = pa.array([b"a", b"\xff", b"c", b"d"]).view(pa.string())
    when = pa.array([0, 0, 2**62, 0], pa.timestamp("us"))
    columns = {"prompt": texts, "response": ["r"] * 4, "when": when}
    pa.parquet.write_table(pa.table(columns), path)
    selection, splits = select(path=str(path), on_bad_row="skip")
    assert selection.skipped == {"unreadable": 2}
    assert {example.source for example in everything(splits)} == {"rows.parquet:1", "rows.parquet:4"}
    with pytest.raises(DataError, match=r"rows\.parquet, row [23]: '(prompt|when)' cannot be read: "):
        select(path=str(path))


def test_paths_that_cannot_be_used(select: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path / "missing", "./missing", "~/missing-data", "missing.parquet"):
        with pytest.raises(DataError, match=r"missing.*: no such file$"):
            select(path=str(path))
    for name in ("text", "json", "x" * 300):  # the first two are readers of `datasets`, which take a whole folder
        with pytest.raises(DataError, match=r"no such file here.*OWNER/NAME"):
            select(path=name)
    with pytest.raises(DataError, match=r"is a folder without a data file \(\.jsonl, "):
        select(path=str(tmp_path))
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(DataError, match=r"rows\.txt: unsupported.*\.jsonl, "):
        select(path=str(tmp_path / "rows.txt"))
    for content in ("", "\n \n"):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"rows\.jsonl: is empty"):
            select(path=str(tmp_path / "rows.jsonl"))


def test_a_hub_dataset_without_the_hub(select: Any) -> None:
    with pytest.raises(DataError, match=r"^nobody/nothing: .*HF_HUB_OFFLINE"):
        select(path="nobody/nothing")


def test_examples_are_written_as_they_are_accepted(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows(5), {"prompt": "p", "response": ""}]))
    written: list[str] = []
    with pytest.raises(DataError, match="not enough"):
        select_examples(
            Data(path=str(path), heldout=2, prompts=9, on_bad_row="skip"),
            None,
            renderer,
            1000,
            lambda split, example: written.append(split),
        )
    assert written == ["heldout"] * 2 + ["train"] * 3


def test_prompts_and_examples_are_compared_by_their_tokens(tmp_path: Path) -> None:
    """A template that trims makes the same prompt of different texts: held out is held out."""
    renderer, path = Renderer(tiny_tokenizer("llama3")), tmp_path / "rows.jsonl"
    same = [{"prompt": "same" + " " * n, "response": "one"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*same, *({**row, "response": "two"} for row in same)]))
    selection, splits = drawn(Data(path=str(path), heldout=1), None, renderer)
    assert selection is None and [len(splits[name]) for name in ("heldout", "train")] == [1, 0]


def test_ids_are_of_one_example_each(select: Any) -> None:
    given = [{"prompt": f"p{n}", "response": "r", "id": "x"} for n in range(3)]
    _, splits = select(given, columns={"id": "id"})
    second = next(example.id for example in everything(splits) if example.id != "x")
    _, splits = select(
        [{**given[0], "prompt": "z", "id": second}, *given, {**given[1], "prompt": "q"}], columns={"id": "id"}
    )
    ids = [example.id for example in everything(splits)]
    assert len(set(ids)) == len(ids) == 5


# Whatever the rows are

drawn_rows = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.sampled_from(["a", "b", "c", "d", "e", "f"]), "response": st.sampled_from(["x", "y", "z"])},
        optional={"name": st.sampled_from(["one", "two", 3])},
    ),
    min_size=1,
    max_size=25,
)


def drawn(data: Data, sft_prompts: int | None, renderer: Renderer) -> tuple[Selection | None, Splits]:
    """Select examples. There is no selection if there are not enough rows."""
    splits: Splits = defaultdict(list)
    try:
        return select_examples(
            data, sft_prompts, renderer, 1000, lambda *taken: splits[taken[0]].append(taken[1])
        ), splits
    except DataError as error:
        assert "not enough usable examples" in str(error)
        return None, splits


@given(
    rows=drawn_rows,
    heldout=st.integers(1, 4),
    sft_prompts=st.none() | st.integers(1, 3),
    prompts=st.none() | st.integers(1, 6),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_splits_share_nothing_whatever_the_rows(
    renderer: Renderer, rows: list[Row], heldout: int, sft_prompts: int | None, prompts: int | None, seed: int
) -> None:
    """No held-out prompt is trained on, no example comes twice, ids are unique, a seed fixes the selection."""
    rows = [{"name": None, **row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = Data(path=str(path), heldout=heldout, prompts=prompts, seed=seed, columns=Columns(id="name"))
        first, (selection, splits) = (drawn(data, sft_prompts, renderer) for _ in range(2))
    assert first == (selection, splits)
    found = everything(splits)
    pairs = [(example.messages[-1]["content"], example.response) for example in found]
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) <= {(row["prompt"], row["response"]) for row in rows}
    assert len({example.id for example in found}) == len(found)
    held = {example.messages[-1]["content"] for example in splits["heldout"]}
    assert not held & {example.messages[-1]["content"] for split in ("sft", "train") for example in splits[split]}
    for split, wanted in (("heldout", heldout), ("sft", sft_prompts or 0), ("train", prompts)):
        assert wanted is None or len(splits[split]) <= wanted
        assert selection is None or wanted is None or len(splits[split]) == wanted
    if selection is not None:
        assert selection.rows == len(rows)
        assert len(found) + sum(selection.skipped.values()) + selection.not_sampled == len(rows)
