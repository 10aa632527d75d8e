"""Data as people have them: layouts, fields that must not be dropped, and files of every kind."""

import bz2
import gzip
import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from messages import assistant, system, user
from spinlm.data.examples import Selection, select_examples
from spinlm.data.renderer import Renderer
from spinlm.data.sources import data_files
from spinlm.errors import DataError, RunError
from spinlm.export.model_card import _public_recipe
from spinlm.plan import make_plan
from spinlm.recipe.data import Data
from spinlm.recipe.load import load_recipe, parse_recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example
from spinlm.rundir.resume import verify_inputs
from spinlm.stages.prepare import _data_fingerprint
from spinlm.utils.atomic import file_digest, write_json
from tiny import tiny_tokenizer

Row = dict[str, Any]

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '[think]' + m.reasoning_content + '[/think]' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that writes tools, and the reasoning of the last response."""


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer("chatml"))


@pytest.fixture(scope="module")
def rich_renderer() -> Renderer:
    return Renderer(tiny_tokenizer("chatml"), TEMPLATE)


def turn(role: str, text: Any) -> Row:
    return {"from": role, "value": text}


def select(path: Any, renderer: Renderer, **data: Any) -> tuple[Selection, list[Example]]:
    """Return the selection and all examples, in the order of the file."""
    found: list[Example] = []
    recipe = Data.model_validate({"path": path, "heldout": 1, **data})
    selection = select_examples(recipe, None, renderer, 1000, lambda _, example: found.append(example))
    return selection, sorted(found, key=lambda example: [int(part) for part in example.source.split(":")[1:]])


@pytest.fixture
def read(tmp_path: Path, renderer: Renderer) -> Callable[..., tuple[Selection, list[Example]]]:
    def read(rows: list[Any], use: Renderer | None = None, **data: Any) -> tuple[Selection, list[Example]]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return select(str(path), use or renderer, **data)

    return read


# Layouts

LAYOUTS: dict[str, tuple[Any, list[Row], str]] = {  # a row, its prompt and its response
    "messages": ({"messages": [user("Hi"), assistant("Yo")]}, [user("Hi")], "Yo"),
    "UltraChat": ({"prompt": "Hi", "prompt_id": "1", "messages": [user("Hi"), assistant("Yo")]}, [user("Hi")], "Yo"),
    "parts": (
        {"messages": [user([{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]), assistant("Yo")]},
        [user("Hi!")],
        "Yo",
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be kind"}, user("Hi"), assistant("Yo")]},
        [system("Be kind"), user("Hi")],
        "Yo",
    ),
    **{
        f"{prompt} and {response}": ({prompt: "Hi", response: "Yo"}, [user("Hi")], "Yo")
        for prompt, response in (
            *(("prompt", response) for response in ("response", "completion", "output", "answer")),
            *(("question", "answer"), ("input", "output"), ("query", "response"), ("instruction", "response")),
        )
    },
    "prompt of messages": (
        {"prompt": [user("Hi"), assistant("Yo"), user("Why?")], "completion": [assistant("So")]},
        [user("Hi"), assistant("Yo"), user("Why?")],
        "So",
    ),
    "system column": ({"system": "Be kind", "prompt": "Hi", "response": "Yo"}, [system("Be kind"), user("Hi")], "Yo"),
    "empty system column": ({"system": " ", "prompt": "Hi", "response": "Yo"}, [user("Hi")], "Yo"),
    "system column and system message": (
        {"system": "Be kind", "messages": [system("Be brief"), user("Hi"), assistant("Yo")]},
        [system("Be brief"), user("Hi")],
        "Yo",
    ),
    "Alpaca": ({"instruction": "Hi", "input": "1 2", "output": "Yo"}, [user("Hi\n\n1 2")], "Yo"),
    "Alpaca without input": ({"instruction": "Hi", "input": " ", "output": "Yo"}, [user("Hi")], "Yo"),
    "ShareGPT": ({"id": 1, "conversations": [turn("human", "Hi"), turn("gpt", "Yo")]}, [user("Hi")], "Yo"),
    "ShareGPT with a system turn": (
        {"conversations": [turn("system", "Be kind"), turn("human", "Hi"), turn("gpt", "Yo"), turn("human", "So?")]},
        [system("Be kind"), user("Hi")],
        "Yo",
    ),
    "ShareGPT with a system column": (
        {"system": "Be kind", "conversation": [turn("user", "Hi"), turn("chatgpt", "Yo")]},
        [system("Be kind"), user("Hi")],
        "Yo",
    ),
    "from and value in messages": ({"messages": [turn("human", "Hi"), turn("bing", "Yo")]}, [user("Hi")], "Yo"),
    "dialog": ({"dialog": [{"role": "User", "content": "Hi"}, turn("bard", "Yo")]}, [user("Hi")], "Yo"),
    "HH": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: So?\n\nAssistant: No.\n\nYes.",
            "rejected": "\n\nHuman: x",
        },
        [user("Hi")],
        "Yo",
    ),
    "lists by role and content": (
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Yo"]}},
        [user("Hi")],
        "Yo",
    ),
    "lists by from and value": (
        {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Yo"]}},
        [user("Hi")],
        "Yo",
    ),
    "JSON text": ({"messages": json.dumps([user("Hi"), assistant("Yo")])}, [user("Hi")], "Yo"),
    "a list of JSON texts": ({"messages": [json.dumps(user("Hi")), json.dumps(assistant("Yo"))]}, [user("Hi")], "Yo"),
    "a bare list": ([user("Hi"), assistant("Yo")], [user("Hi")], "Yo"),
    "Dolly": ({"instruction": "Hi", "context": "Text", "response": "Yo"}, [user("Hi\n\nText")], "Yo"),
    "problem and solution": ({"problem": "Hi", "solution": "Yo", "answer": "Y"}, [user("Hi")], "Yo"),
    "prompt and chosen": ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, [user("Hi")], "Yo"),
    "a whole number": ({"prompt": "Hi", "response": 42}, [user("Hi")], "42"),
    "pairs": ({"conversation": [{"human": "Hi", "assistant": "Yo"}]}, [user("Hi")], "Yo"),
    "a response by role and content": (
        {"prompt": [user("Hi")], "completion": {"role": ["assistant"], "content": ["Yo"]}},
        [user("Hi")],
        "Yo",
    ),
    "a number in a message": ({"messages": [user(1), assistant(0.5)]}, [user("1")], "0.5"),
    "a list of one response": ({"prompt": "Hi", "responses": ["Yo"]}, [user("Hi")], "Yo"),
    "equal responses of SQuAD": (
        {"question": "Hi", "answers": {"text": ["Yo", "Yo"], "answer_start": [1, 9]}},
        [user("Hi")],
        "Yo",
    ),
    "Alpaca with history": (
        {"instruction": "So?", "input": "", "output": "Yo", "history": [["Hi", "Ha"], ["1", "2"]]},
        [user("Hi"), assistant("Ha"), user("1"), assistant("2"), user("So?")],
        "Yo",
    ),
    "an input that the prompt contains": (
        {"prompt": "Add: Hi", "input": "Hi", "response": "Yo"},
        [user("Add: Hi")],
        "Yo",
    ),
    "history of messages": (
        {"query": "So?", "response": "Yo", "history": [user("Hi"), assistant("Ha")]},
        [user("Hi"), assistant("Ha"), user("So?")],
        "Yo",
    ),
    "history without turns": ({"query": "Hi", "response": "Yo", "history": "[]"}, [user("Hi")], "Yo"),
    "nothing in other fields": (
        {"prompt": "Hi", "response": "Yo", "tools": "[]", "images": [], "label": True, "context": " ", "weight": 1},
        [user("Hi")],
        "Yo",
    ),
    "a label that is a class": ({"prompt": "Hi", "response": "Yo", "label": 0, "score": 0.0}, [user("Hi")], "Yo"),
    "nulls of Arrow": (
        {"messages": [user("Hi", tool_calls=None, weight=None), assistant("Yo", tool_calls=None, name="bot")]},
        [user("Hi")],
        "Yo",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, read: Any) -> None:
    row, messages, response = LAYOUTS[name]
    other = json.loads(json.dumps(row).replace("Hi", "Bye").replace('"content": 1}', '"content": 2}'))
    _, (example, *_) = read([row, other], heldout=1)
    assert other != row and (example.messages, example.response) == (messages, response)


def test_preferences_of_hh_and_of_sharegpt(read: Any, renderer: Renderer) -> None:
    prefer: Row = {"columns": {"rejected": "rejected"}}
    talk = "\n\nHuman: {}\n\nAssistant: "
    hh = [{"chosen": talk.format(n) + "Yo", "rejected": talk.format(n) + "No"} for n in "ab"]
    pairs = [
        {"conversations": [turn("human", n)], "chosen": turn("gpt", "Yo"), "rejected": turn("gpt", "No")} for n in "ab"
    ]
    prompts = [{"prompt": talk.format(n), "chosen": "Yo", "rejected": "No"} for n in "ab"]
    for rows in (hh, pairs, prompts):
        _, (example, _) = read(rows, **prefer)
        assert (example.messages, example.response) == ([user("a")], "Yo")
        assert example.rejected_ids == renderer.encode([user("a")], "No", 1000).response_ids


def test_a_column_that_follows_the_prompt_can_be_named(read: Any) -> None:
    rows = [{"question": n, "context": "Text", "answer": "Yo"} for n in "ab"]
    with pytest.raises(DataError, match=r"row 1|row 2.*'context' is not empty: .*data\.columns\.context"):
        read(rows)
    _, (example, _) = read(rows, columns={"context": "context"})
    assert example.messages == [user("a\n\nText")]
    with pytest.raises(DataError, match=r"context needs a prompt"):
        read([{"messages": [user("a"), assistant("Yo")], "context": "Text"}], columns={"context": "context"})


# Fields that must not be dropped without a word

REFUSED: dict[str, tuple[Row, str, str]] = {
    "images": ({"prompt": "p", "response": "r", "images": ["a.png"]}, "unsupported_field", "'images' is not empty"),
    "documents": ({"prompt": "p", "response": "r", "documents": [{}]}, "unsupported_field", "'documents' is not empty"),
    "an input that the prompt lacks": (
        {"prompt": "p", "input": "1 2", "response": "r"},
        "unsupported_field",
        "'input' is not empty: the prompt lacks it. Name it in data.columns.context",
    ),
    "kwargs": (
        {"prompt": "p", "response": "r", "chat_template_kwargs": {"a": 1}},
        "unsupported_field",
        "'chat_template_kwargs' is not empty: the variables of the template are the same for all rows",
    ),
    "history next to messages": (
        {"messages": [user("p"), assistant("r")], "history": [["a", "b"]]},
        "unsupported_field",
        "'history' is not empty",
    ),
    "an image of a message": (
        {"messages": [user("p", images=["x"]), assistant("r")]},
        "unsupported_field",
        "'messages[0]' has 'images'",
    ),
    "parts of a message": (
        {"messages": [user("p"), assistant("r", train_detail=[{"begin_offset": 0}])]},
        "unsupported_field",
        "'messages[1]' has 'train_detail'",
    ),
    "a mask": ({"messages": [user("p"), assistant("r", mask=[0])]}, "unsupported_field", "has 'mask': masks are not"),
    "a weight of a half": ({"messages": [user("p"), assistant("r", weight=0.5)]}, "unsupported_field", "weight 0.5"),
    "tools": ({"prompt": "p", "response": "r", "tools": [{"name": "f"}]}, "field_omitted", "template omits 'tools'"),
    "tools that are none": ({"prompt": "p", "response": "r", "tools": "f"}, "bad_tools", "'tools' must be a list"),
    "reasoning": (
        {"messages": [user("p"), assistant("r", reasoning_content="why")]},
        "field_omitted",
        "the chat template omits 'reasoning_content' of the response",
    ),
    "thoughts in a column": (
        {"prompt": "p", "response": "r", "thinking": "why"},
        "field_omitted",
        "the chat template omits 'thinking'",
    ),
    "several responses": (
        {"prompt": "p", "response": ["r", "s"]},
        "several_responses",
        "'response' has 2 responses. Write a row for each",
    ),
    "true": ({"prompt": "p", "response": True}, "not_text", "'response' is true or false, not text. Write the word"),
    "an observation": (
        {"messages": [user("p"), turn("observation", "x"), assistant("r")]},
        "tool_call",
        "'messages[1]' has the role 'observation'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_refused(name: str, read: Any) -> None:
    row, reason, detail = REFUSED[name]
    good: list[Row] = [{"prompt": n, "response": "r"} for n in "ab"]
    if "messages" in row:
        good = [{"messages": [user(n), assistant("r")]} for n in "ab"]
    selection, examples = read([*good, row], on_bad_row="skip")
    assert (selection.skipped, len(examples)) == ({reason: 1}, 2)
    assert selection.skipped_rows[0].startswith(f"rows.jsonl:3: {reason}: ") and detail in selection.skipped_rows[0]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3: .*set data\.on_bad_row: skip"):
        read([*good, row])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("p"), assistant("r", images=["x"], reasoning_content="y", weight=0)]},
        {"messages": [user("p"), assistant("r")], "tools": [{"name": "f"}], "label": False},
        {"messages": [user("p"), assistant("r")], "system": "Be brief."},
        {"messages": [user("p"), assistant("r")], "system_prompt": "Be brief."},
    ],
)
def test_fields_can_be_ignored(row: Row, read: Any) -> None:
    ignore = ["images", "reasoning_content", "weight", "tools", "label", "system", "system_prompt"]
    selection, examples = read([row, {"messages": [user("q"), assistant("r")]}], columns={"ignore": ignore})
    assert not selection.skipped and [example.messages for example in examples] == [[user("p")], [user("q")]]


def test_columns_that_would_be_recognized_can_be_ignored(read: Any) -> None:
    row = {"instruction": "p", "input": "x", "output": "r"}
    _, examples = read([row, {"instruction": "q", "output": "r"}], columns={"ignore": ["input"]})
    assert [example.messages for example in examples] == [[user("p")], [user("q")]]


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("label_false", {"prompt": "p", "response": "r", "label": False}),
        ("label_false", {"prompt": "p", "response": "r", "kto_tag": "False"}),
        ("not_for_training", {"prompt": "p", "response": "r", "weight": 0.0}),
        ("not_for_training", {"prompt": "p", "response": [assistant("r", weight=0)]}),
        ("not_for_training", {"prompt": [user("p")], "response": "r", "train": False}),
    ],
)
def test_rows_that_the_data_exclude_are_counted_and_are_no_errors(reason: str, row: Row, read: Any) -> None:
    selection, examples = read([{"prompt": n, "response": "r"} for n in "ab"] + [row])
    assert (selection.skipped, len(examples)) == ({reason: 1}, 2)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_turns_that_the_data_exclude_stay_in_the_prompt(flag: Row, read: Any) -> None:
    talk = [user("1"), assistant("A", **flag), user("2"), assistant("B"), user("3"), assistant("C")]
    rows = [{"messages": talk}, {"messages": [user("x"), assistant("y")]}]
    before = [user("1"), assistant("A"), user("2")]
    for turns, expected in (("first", ["B"]), ("last", ["C"]), ("all", ["B", "C"])):
        _, examples = read(rows, turns=turns, heldout=2 if turns == "all" else 1)
        found = [example for example in examples if example.messages[0] == user("1")]
        assert [example.response for example in found] == expected
        assert found[0].messages[:3] == before
    selection, _ = read([*rows, {"messages": [user("p"), assistant("r", **flag)]}])
    assert selection.skipped == {"not_for_training": 1}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("form", ["list", "text", "texts", "nulls"])
def test_tools_reach_the_template(form: str, read: Any, rich_renderer: Renderer) -> None:
    nulls = {**TOOL, "function": {**TOOL["function"], "strict": None}}  # type: ignore[dict-item]
    tools = {"list": [TOOL], "text": json.dumps([TOOL]), "texts": [json.dumps(TOOL)], "nulls": [nulls]}[form]
    _, (example, other) = read(
        [{"prompt": "p", "response": "r", "tools": tools}, {"prompt": "q", "response": "r", "tools": None}],
        rich_renderer,
    )
    tokenizer = tiny_tokenizer("chatml")
    text = tokenizer.apply_chat_template(
        [user("p")], tools=[TOOL], chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert '"look"' in text and example.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (example.tools, other.tools) == ([TOOL], None)
    assert "Tools:" not in tokenizer.decode(other.prompt_ids)


def test_other_tools_make_another_example(read: Any, rich_renderer: Renderer) -> None:
    """The same question with other tools is another example, with another id."""
    rows = [{"prompt": "p", "response": "r", "tools": [{**TOOL, "n": n}]} for n in range(3)]
    selection, examples = read(rows, rich_renderer)
    assert not selection.skipped and len({example.id for example in examples}) == 3


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("p"), assistant("r", reasoning_content="why")]},
        {"prompt": "p", "response": "r", "reasoning_content": "why"},
    ],
)
def test_reasoning_reaches_the_template(row: Row, read: Any, rich_renderer: Renderer) -> None:
    other = json.loads(json.dumps(row).replace('"p"', '"q"'))
    _, (example, _) = read([row, other], rich_renderer)
    assert rich_renderer.decode(example.response_ids) == "[think]why[/think]r"
    assert example.messages == [user("p")]


def test_reasoning_of_earlier_turns_is_left_to_the_template(read: Any, rich_renderer: Renderer) -> None:
    talk = [user("1"), assistant("A", reasoning_content="why"), user("2"), assistant("B", reasoning_content="so")]
    rows = [{"messages": talk}, {"messages": [user("x"), assistant("y")]}]
    _, (example, _) = read(rows, rich_renderer, turns="last")
    assert rich_renderer.decode(example.response_ids) == "[think]so[/think]B"
    assert "why" not in tiny_tokenizer("chatml").decode(example.prompt_ids)


def test_the_columns_used_and_ignored_are_listed(read: Any) -> None:
    rows = [{"messages": [user(n), assistant("r")], "prompt_id": n, "source": "web", "tools": None} for n in "ab"]
    assert read(rows)[0].columns == "messages, prompt_id, tools (used); source (ignored)"


# Turns after the example

UNREADABLE: list[Row] = [
    assistant(None, tool_calls=[{"function": {"name": "f"}}]),
    {"role": "tool", "content": "x"},
    user([{"type": "image_url"}]),
    assistant("r", train_detail=[1]),
    {"role": "root", "content": "x"},
    {"content": "no role"},
]


@pytest.mark.parametrize("later", [*UNREADABLE, None], ids=repr)
def test_turns_after_the_example_do_not_matter(later: Any, read: Any) -> None:
    good = {"messages": [user("x"), assistant("y")]}
    talk = {"messages": [user("1"), assistant("A"), user("2"), assistant("B"), user("3"), later, assistant("C")]}
    selection, (example, _) = read([talk, good])
    assert not selection.skipped and (example.messages, example.response) == ([user("1")], "A")

    selection, examples = read([talk, good], turns="all", on_bad_row="skip", heldout=2)
    assert [example.response for example in examples] == ["A", "B", "y"]
    assert sum(selection.skipped.values()) == 1 and selection.skipped_rows[0].startswith("rows.jsonl:1: ")
    with pytest.raises(DataError, match=r"row 1: 'messages\[5\]"):
        read([talk, good], turns="all")
    with pytest.raises(DataError, match=r"row 1: 'messages\[5\]"):
        read([talk, good], turns="last")

    early = {"messages": [user("1"), later, assistant("A")]}
    with pytest.raises(DataError, match=r"row 1: 'messages\[1\]"):
        read([early, good])


# Files

ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(6)]
EXPECTED = {(row["prompt"], row["response"]) for row in ROWS}


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[Row], separator: str) -> bytes:
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(separator.join(row) + "\n" for row in cells).encode()


def compressed(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[Row], stream: bool) -> bytes:
    sink = pa.BufferOutputStream()
    data = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def damaged_arrow() -> bytes:
    """Return a file whose offsets of texts point outside of the file."""
    content = arrow([{"prompt": "p" * 4321, "response": "r"}], stream=True)
    offsets = (4321 << 32).to_bytes(8, "little")  # 0 and 4321
    assert offsets in content
    return content.replace(offsets, (0x7F000000 << 32).to_bytes(8, "little"))


FILES: dict[str, bytes] = {
    "rows.jsonl.gz": gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:])),
    "rows.jsonl.zst": compressed(lines(ROWS), "zstd"),
    "rows.JSONL.BZ2": bz2.compress(lines(ROWS)),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.gz": gzip.compress(table(ROWS, ",")),
    "rows.tsv": table(ROWS, "\t"),
    "rows.ndjson": lines(ROWS),
    "rows.json": lines(ROWS),  # objects line by line
    "rows.arrow": arrow(ROWS, stream=False),
    "stream.arrow": arrow(ROWS, stream=True),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds_of_files(name: str, renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    _, examples = select(str(path), renderer)
    assert {(example.messages[0]["content"], example.response) for example in examples} == EXPECTED
    first = 2 if name.startswith(("rows.csv", "rows.tsv")) else 1
    assert [example.source for example in examples] == [f"{name}:{number}" for number in range(first, first + 6)]


def shards(folder: Path, suffix: str = "jsonl") -> Path:
    """Write three shards with two rows each."""
    folder.mkdir(parents=True)
    for n in range(3):
        part = ROWS[2 * n : 2 * n + 2]
        if suffix == "jsonl":
            (folder / f"part-{n}.jsonl").write_bytes(lines(part))
        else:
            pa.parquet.write_table(pa.Table.from_pylist(part), folder / f"part-{n}.parquet")
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_folders_globs_and_lists(suffix: str, renderer: Renderer, tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", suffix)
    (folder / "README.md").write_text("about")
    (folder / "dataset_infos.json").write_text("{}")
    part = [str(folder / f"part-{n}.{suffix}") for n in range(3)]
    for path in (str(folder), str(folder / f"part-*.{suffix}"), part, [part[0], f"{folder}/part-[12]*", part[2]]):
        selection, examples = select(path, renderer)
        assert selection.rows == 6
        assert {(example.messages[0]["content"], example.response) for example in examples} == EXPECTED
        expected = {f"part-{n}.{suffix}:{row}": ROWS[2 * n + row - 1]["prompt"] for n in range(3) for row in (1, 2)}
        assert {example.source: example.messages[0]["content"] for example in examples} == expected
    assert data_files(Data(path=[part[2], part[0]])) == [Path(part[2]), Path(part[0])], "the order of the list"


def test_a_bad_row_of_a_shard_is_named_by_its_file(renderer: Renderer, tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    (folder / "part-1.jsonl").write_bytes(lines([ROWS[2]]) + b"\n{\n")
    with pytest.raises(DataError, match=r"shards/part-1\.jsonl, row 3: the line is not JSON"):
        select(str(folder), renderer, prompts=5)
    selection, _ = select(str(folder), renderer, on_bad_row="skip")
    assert selection.skipped_rows[0].startswith("part-1.jsonl:3: not_json: ")


def test_files_of_the_same_name_in_several_folders(renderer: Renderer, tmp_path: Path) -> None:
    for n, name in enumerate("ba"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_bytes(lines(ROWS[3 * n : 3 * n + 3]))
    _, examples = select(f"{tmp_path}/**/*.jsonl", renderer)
    assert {example.source.split(":")[0] for example in examples} == {"a/rows.jsonl", "b/rows.jsonl"}
    with pytest.raises(DataError, match=r"data in several folders \(a, b\)"):  # perhaps two data sets
        select(str(tmp_path), renderer)


def test_folders_that_are_splits(renderer: Renderer, tmp_path: Path) -> None:
    for name, part in (("train", ROWS[:4]), ("test", ROWS[4:])):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "rows.jsonl").write_bytes(lines(part))
    _, examples = select(str(tmp_path), renderer)
    assert [example.source for example in examples] == [f"rows.jsonl:{row}" for row in (1, 2, 3, 4)]


def test_splits_of_a_folder(renderer: Renderer, tmp_path: Path) -> None:
    """A test split is never trained on by accident."""
    for n in range(2):
        (tmp_path / f"train-0000{n}-of-00002.jsonl").write_bytes(lines(ROWS[2 * n : 2 * n + 2]))
    (tmp_path / "test-00000-of-00001.jsonl").write_bytes(lines(ROWS[4:]))
    assert {example.response for example in select(str(tmp_path), renderer)[1]} == {f"It is {n}." for n in range(4)}
    assert len(select(str(tmp_path), renderer, split="test")[1]) == 2
    with pytest.raises(DataError, match=r"has no split 'dev'\. Set data\.split to one of test, train"):
        select(str(tmp_path), renderer, split="dev")
    (tmp_path / "extra.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(DataError, match=r"extra\.jsonl names no split.*as a list or with \*"):
        select(str(tmp_path), renderer)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jsonl", "b.csv"], r"holds \.csv and \.jsonl files\. Name those to read"),
        (["validation.jsonl"], r"has no split 'train'\. Set data\.split to one of validation"),
        (["a.txt"], r"is a folder without a data file \(\.jsonl, "),
        (["state.json"], r"state\.json cannot be read"),
    ],
)
def test_folders_that_cannot_be_used(files: list[str], message: str, renderer: Renderer, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(lines(ROWS[:1]))
    with pytest.raises(DataError, match=message):
        select(str(tmp_path), renderer)


def test_save_to_disk(renderer: Renderer, tmp_path: Path) -> None:
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    talks = [{"messages": [user(row["prompt"]), assistant(row["response"])]} for row in ROWS]
    given = datasets.Dataset.from_list(talks, features=features)
    given.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(arrow(ROWS, stream=True))
    _, examples = select(str(tmp_path / "one"), renderer)
    assert {(example.messages[0]["content"], example.response) for example in examples} == EXPECTED
    assert "data-00000-of-00002.arrow:1" in [example.source for example in examples]

    plain = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=plain.select([5, 0, 1]), test=plain.select([2, 3])).save_to_disk(tmp_path / "two")
    for split, responses in (("train", {"It is 5.", "It is 0.", "It is 1."}), ("test", {"It is 2.", "It is 3."})):
        _, examples = select(str(tmp_path / "two"), renderer, split=split)
        assert {example.response for example in examples} == responses
    with pytest.raises(DataError, match=r"has no split 'dev'\. Set data\.split to one of test, train"):
        select(str(tmp_path / "two"), renderer, split="dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(lines(ROWS) * 50)[:-20], "cannot be read: Truncated"),
        ("a.jsonl.zst", lines(ROWS), "cannot be read: ZSTD"),
        ("a.parquet.gz", b"x", "unsupported kind of file"),
        ("a.arrow", b"ARROW1 no", "not a readable Arrow file"),
        ("a.arrow", damaged_arrow(), "not a readable Arrow file"),
        ("a.jsonl", lines(ROWS).decode().encode("utf-16"), r"is UTF-16\. Save it as UTF-8"),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode(), r"row 1: .*If the file is one list, name it \.json"),
    ],
)
def test_damaged_files(name: str, content: bytes, message: str, renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        select(str(tmp_path / name), renderer)


def test_names_that_match_nothing(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none-\*\.jsonl: no file matches"):
        select(f"{tmp_path}/none-*.jsonl", renderer)
    with pytest.raises(DataError, match=r"some/dataset: no such file\. A list holds files only"):
        select(["some/dataset"], renderer)


def test_columns_of_arrow(renderer: Renderer, tmp_path: Path) -> None:
    """Binary and dictionary columns are text; dates and missing numbers are ids; 1.0 may have been 1."""
    path = tmp_path / "rows.parquet"
    columns = {
        "prompt": pa.array([b"a", b"b", b"c"], pa.binary()),
        "response": pa.array(["x", "y", "x"]).dictionary_encode(),
        "day": [date(2024, 1, n) for n in (1, 2, 3)],
        "number": [1.5, float("nan"), None],
    }
    pa.parquet.write_table(pa.table(columns), path)
    _, examples = select(str(path), renderer, columns={"id": "day"})
    assert [example.messages[0]["content"] + example.response for example in examples] == ["ax", "by", "cx"]
    assert [example.id for example in examples] == ["2024-01-01", "2024-01-02", "2024-01-03"]
    selection, _ = select(str(path), renderer, columns={"id": "number"}, on_bad_row="skip")
    assert selection.skipped == {"bad_id": 1}

    numbers = pa.table({"prompt": ["a", "b", "c"], "response": [7.25, 42.0, 0.5]})
    pa.parquet.write_table(numbers, path)
    selection, examples = select(str(path), renderer, on_bad_row="skip")
    assert [example.response for example in examples] == ["7.25", "0.5"]
    assert "'response' is 42.0: where a value is missing" in selection.skipped_rows[0]


# What else reads the data


def test_a_changed_added_or_removed_shard_is_noticed(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    recipe = parse_recipe({"model": {"path": "m"}, "data": {"path": str(folder)}})
    before = _data_fingerprint(recipe, None)
    assert before == {f"part-{n}.jsonl": file_digest(folder / f"part-{n}.jsonl") for n in range(3)}
    run = RunDir(tmp_path / "run")
    write_json(run.provenance, {"inputs": {"data": before}})
    run.marker("prepare", None).parent.mkdir(parents=True, exist_ok=True)

    def refused() -> str:
        done = SimpleNamespace(root=run.root, provenance=run.provenance, has_results=lambda: True)
        with pytest.raises(RunError) as caught:
            verify_inputs(done, {"data": _data_fingerprint(recipe, None)})  # type: ignore[arg-type]
        return str(caught.value)

    (folder / "part-3.jsonl").write_bytes(lines(ROWS[:1]))
    assert "data.part-3.jsonl: was null, is " in refused()
    (folder / "part-3.jsonl").unlink()
    (folder / "part-1.jsonl").write_bytes(lines(ROWS[:1]))
    assert "data.part-1.jsonl: was " in refused()
    (folder / "part-1.jsonl").unlink()
    assert "data.part-1.jsonl: was " in refused()

    single = parse_recipe({"model": {"path": "m"}, "data": {"path": str(folder / "part-0.jsonl")}})
    assert _data_fingerprint(single, None) == {"sha256": file_digest(folder / "part-0.jsonl")}


def test_a_plan_reads_shards(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    whole = tmp_path / "rows.jsonl"
    whole.write_bytes(lines(ROWS))

    def lengths(path: Any) -> Any:
        recipe = parse_recipe({"model": {"path": "gpt2"}, "data": {"path": path, "heldout": 1, "prompts": 2}})
        plan = make_plan(recipe)
        return plan.lengths.examples, plan.lengths.prompt, plan.lengths.real

    one = lengths(str(whole))
    assert one[0] == 6
    for path in (str(folder), f"{folder}/*.jsonl", [f"{folder}/part-0.jsonl", f"{folder}/part-[12].jsonl"]):
        assert lengths(path) == one


def test_paths_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists and patterns are found next to the recipe, in a folder of any name, and a card names no folder."""
    home = tmp_path / "a [1]*"
    shards(home / "shards")
    shutil.copy(home / "shards" / "part-0.jsonl", home / "own.jsonl")
    (home / "recipe.yaml").write_text("model: {path: m}\ndata: {path: [own.jsonl, 'shards/part-*.jsonl']}\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(home / "recipe.yaml")
    files = data_files(recipe.data)
    assert files is not None
    assert [file.relative_to(home).as_posix() for file in files] == [
        "own.jsonl",
        *(f"shards/part-{n}.jsonl" for n in range(3)),
    ]
    assert _public_recipe(recipe)["data"]["path"] == ["own.jsonl", "part-*.jsonl"]
