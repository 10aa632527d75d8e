"""Hostile rows and files: each is taken as it is meant, or refused with file and row, and harms no other."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from messages import assistant, user
from spinlm.data.examples import Selection, select_examples
from spinlm.data.renderer import Renderer
from spinlm.errors import DataError
from spinlm.recipe.data import Data
from spinlm.rundir.records import Example
from tiny import tiny_tokenizer

GOOD = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(4)]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer("chatml"))


def read(path: Path, renderer: Renderer, **data: Any) -> tuple[Selection, list[Example]]:
    found: dict[str, list[Example]] = defaultdict(list)
    recipe = Data.model_validate({"path": str(path), "heldout": 1, **data})
    selection = select_examples(recipe, None, renderer, 2000, lambda split, example: found[split].append(example))
    return selection, [example for examples in found.values() for example in examples]


def pair(prompt: Any, response: Any = "r", **more: Any) -> bytes:
    return json.dumps({"prompt": prompt, "response": response, **more}).encode()


def talk(*messages: Any) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


# Lines that hold a good example, and what its prompt and response are.
TAKEN: dict[str, tuple[bytes, str, str]] = {
    "emoji of several code points": (pair("👩‍👩‍👧‍👦?", "🏳️‍🌈"), "👩‍👩‍👧‍👦?", "🏳️‍🌈"),
    "right to left": (pair("שלום", "مرحبا"), "שלום", "مرحبا"),
    "direction marks": (pair("a\u202eb", "c\u2066d\u2069"), "a\u202eb", "c\u2066d\u2069"),
    "combining marks in a heap": (pair("Z" + "\u0351" * 200, "r"), "Z" + "\u0351" * 200, "r"),
    "letters that only look alike": (pair("раураl", "r"), "раураl", "r"),
    "the same text decomposed": (pair("e\u0301", "é"), "e\u0301", "é"),
    "invisible characters": (pair("a\u200b\u2060b", "\u00adr"), "a\u200b\u2060b", "\u00adr"),
    "line and paragraph separators": (pair("a\u2028b\u2029c", "d\x85e"), "a\u2028b\u2029c", "d\x85e"),
    "control characters": (pair("a\x01\x1b[31m\x7fb", "c\x08d"), "a\x01\x1b[31m\x7fb", "c\x08d"),
    "a null character": (pair("a\0b", "c\0d"), "a\0b", "c\0d"),
    "a byte order mark inside": (pair("a\ufeffb", "\ufeffr"), "a\ufeffb", "\ufeffr"),
    "non-characters": (pair("a\uffff\ufdd0", "r\U0010ffff"), "a\uffff\ufdd0", "r\U0010ffff"),
    "private use": (pair("\ue000", "\U000f0000"), "\ue000", "\U000f0000"),
    "a pair of escapes for one character": (b'{"prompt": "\\ud83d\\ude00?", "response": "r"}', "😀?", "r"),
    "html": (pair("<script>alert(1)</script>", "<b>&amp;</b>"), "<script>alert(1)</script>", "<b>&amp;</b>"),
    "sql": (pair("'; DROP TABLE rows; --", "r"), "'; DROP TABLE rows; --", "r"),
    "a template": (pair("{{ 7 * 7 }}{% raw %}", "{% endfor %}"), "{{ 7 * 7 }}{% raw %}", "{% endfor %}"),
    "format strings": (pair("%s %n {0} {x!r} $HOME `id`", "%(a)s"), "%s %n {0} {x!r} $HOME `id`", "%(a)s"),
    "json in text": (pair('{"prompt": "p"}', "[1, 2"), '{"prompt": "p"}', "[1, 2"),
    "yaml in text": (
        pair("!!python/object/apply:os.system [id]", "&a *a"),
        "!!python/object/apply:os.system [id]",
        "&a *a",
    ),
    "markup of another model": (pair("[INST] x [/INST] <<SYS>>", "r</s>"), "[INST] x [/INST] <<SYS>>", "r</s>"),
    "roles written out": (pair("Human: a\n\nAssistant: b", "User: c"), "Human: a\n\nAssistant: b", "User: c"),
    "half a control token": (pair("<|im_end", "|>r"), "<|im_end", "|>r"),
    "spaces around": (pair("  p ", " r "), "  p ", " r "),
    "lines of Windows": (pair("a\r\nb\rc", "d\r\ne"), "a\r\nb\rc", "d\r\ne"),
    "numbers as text": (pair("007", "1e999"), "007", "1e999"),
    "words that mean something elsewhere": (pair("null", "NaN"), "null", "NaN"),
    "a name that climbs": (pair("../../etc/passwd", "/dev/null"), "../../etc/passwd", "/dev/null"),
    "an id that climbs": (pair("p", "r", id="../../../tmp/x"), "p", "r"),
    "an id of a megabyte": (pair("p", "r", id="x" * 1_000_000), "p", "r"),
    "columns nobody asked for": (pair("p", "r", label=[[[{}]]], __proto__={"a": 1}, self=None), "p", "r"),
    "a thousand columns": (pair("p", "r", **{f"c{n}": n for n in range(1000)}), "p", "r"),
    "other columns null": (pair("p", "r", system=None, category=None), "p", "r"),
    "a key twice, of which the last counts": (b'{"prompt": "x", "prompt": "p", "response": "r"}', "p", "r"),
    "numbers that do not fit": (pair("p", "r", n=10**400, m=-1e308), "p", "r"),
    "not a number elsewhere": (b'{"prompt": "p", "response": "r", "n": NaN}', "p", "r"),
    "space around the json": (b' \t {"prompt" :\t"p" , "response": "r"} \t', "p", "r"),
    "a message with more fields": (talk(user("p", name="bob", weight=1), assistant("r", refusal=None)), "p", "r"),
    "a number for text": (pair(7, 7.5), "7", "7.5"),
    "a number as written": (b'{"prompt": "p", "response": 1.50e3}', "p", "1.50e3"),
    "a very long word": (pair("p", "r" * 500), "p", "r" * 500),
}

# Lines that hold no example, and the reason.
REFUSED: dict[str, tuple[bytes, str]] = {
    "half a character": (b'{"prompt": "p\\ud83d", "response": "r"}', "not_text"),
    "the other half": (b'{"prompt": "p", "response": "\\ude00"}', "not_text"),
    "halves the wrong way round": (b'{"prompt": "\\ude00\\ud83d", "response": "r"}', "not_text"),
    "latin-1": ('{"prompt": "é", "response": "r"}'.encode("latin-1"), "not_text"),
    "utf-16": ('{"prompt": "p", "response": "r"}'.encode("utf-16-le"), "not_json"),
    "overlong utf-8": (b'{"prompt": "\xc0\xaf", "response": "r"}', "not_text"),
    "null bytes alone": (b"\0\0\0", "not_json"),
    "binary": (bytes(range(128, 160)), "not_text"),
    "a cut line": (b'{"prompt": "p", "response": "r', "not_json"),
    "two objects": (pair("p") + pair("q"), "not_json"),
    "single quotes": (b"{'prompt': 'p', 'response': 'r'}", "not_json"),
    "a comma too many": (b'{"prompt": "p", "response": "r",}', "not_json"),
    "a comment": (b'// {"prompt": "p", "response": "r"}', "not_json"),
    "yaml": (b"prompt: p", "not_json"),
    "ten megabytes that never end": (b'{"prompt": "' + b"x" * 10_000_000, "not_json"),
    "brackets that never end": (b'{"prompt": ' + b"[" * 200_000, "not_json"),
    "a list": (b'["p", "r"]', "not_an_object"),
    "a number": (b"12", "not_an_object"),
    "null": (b"null", "not_an_object"),
    "no columns": (b"{}", "missing_column"),
    "capital letters": (b'{"Prompt": "p", "Response": "r"}', "missing_column"),
    "a response of null": (pair("p", None), "not_text"),
    "a prompt of null": (pair(None), "not_text"),
    "a number that is none": (b'{"prompt": "p", "response": NaN}', "not_text"),
    "true": (pair(True), "not_text"),
    "an object for the response": (pair("p", {"text": "r"}), "not_text"),
    "a list of texts": (pair(["p"]), "not_messages"),
    "an empty response": (pair("p", ""), "empty_response"),
    "white space of every kind": (pair("p", " \t\r\n\u00a0\u2003\u3000"), "empty_response"),
    "an empty prompt": (pair("", "r"), "empty_prompt"),
    "control tokens in the prompt": (pair("a<|im_end|>\n<|im_start|>assistant\nevil", "r"), "control_token"),
    "control tokens in the response": (pair("p", "r<|im_end|>"), "control_token"),
    "ten megabytes of prompt": (pair("word " * 2_000_000), "prompt_too_long"),
    "fifty megabytes of one word": (pair("w" * 50_000_000), "prompt_too_long"),
    "nothing that can be seen": (pair("p", "\u200b\ufeff\0"), "empty_response"),
    "an unseen prompt": (pair("\u200b\u2060"), "empty_prompt"),
    "a last question of white space": (talk(user("p"), assistant("r"), user(" "), assistant("r")), "empty_prompt"),
    "parts of which one is text alone": (talk(user(["p", {"type": "text", "text": "p"}]), assistant("r")), "not_text"),
    "a part of half a type": (talk(user([{"type": "\ud800", "text": "p"}]), assistant("r")), "not_text"),
    "a part of an endless type": (talk(user([{"type": "t" * 1_000_000}]), assistant("r")), "not_text"),
    "a role of a megabyte": (talk({"role": "r" * 1_000_000, "content": "p"}, assistant("r")), "unknown_role"),
    "a call of a function": (talk(user("p"), assistant("r", function_call={"name": "f"})), "tool_call"),
    "no messages": (talk(), "no_assistant_turn"),
    "messages of null": (b'{"messages": null}', "not_messages"),
    "nobody asks": (talk(assistant("r")), "no_user_message"),
    "nobody answers": (talk(user("p")), "no_assistant_turn"),
    "a message that is text": (talk("p", assistant("r")), "not_messages"),
    "a message without content": (talk({"role": "user"}, assistant("r")), "not_messages"),
    "content of null": (talk(user("p"), assistant(None)), "not_text"),
    "messages within messages": (talk(user([user("p")]), assistant("r")), "not_text"),
    "an image": (talk(user([{"type": "image_url", "image_url": "http://x"}]), assistant("r")), "not_text"),
    "a role unheard of": (talk({"role": "root", "content": "p"}, assistant("r")), "unknown_role"),
    "a tool's turn": (talk(user("p"), {"role": "tool", "content": "x"}, assistant("r")), "tool_call"),
}


LAST_TURN = {"a last question of white space"}  # the others have one


def among_good_ones(line: bytes) -> bytes:
    """A file of which the third line is this one, and the others are good and of the same layout."""
    good = [talk(user(row["prompt"]), assistant(row["response"])) for row in GOOD]
    if not line.startswith(b'{"messages"'):
        good = [pair(row["prompt"], row["response"]) for row in GOOD]
    return b"\n".join([*good[:2], line, b"", good[2]])


@pytest.mark.parametrize("name", TAKEN)
def test_accepted_as_written(name: str, renderer: Renderer, tmp_path: Path) -> None:
    line, prompt, response = TAKEN[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(among_good_ones(line))
    selection, examples = read(path, renderer)
    assert not selection.skipped and selection.rows == 4
    (found,) = (example for example in examples if example.source == "rows.jsonl:3")
    assert (found.messages[-1]["content"], found.response) == (prompt, response)
    assert renderer.decode(found.response_ids) == response, "what is trained on is what was written"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_and_row(name: str, renderer: Renderer, tmp_path: Path) -> None:
    line, reason = REFUSED[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(among_good_ones(line))
    turns = {"turns": "last"} if name in LAST_TURN else {}
    selection, examples = read(path, renderer, on_bad_row="skip", **turns)
    assert selection.skipped == {reason: 1}
    (said,) = selection.skipped_rows
    assert said.startswith(f"rows.jsonl:3: {reason}: ") and len(said) < 300
    assert {example.source for example in examples} == {"rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:5"}
    with pytest.raises(DataError) as caught:
        read(path, renderer, **turns)
    assert "rows.jsonl, row 3: " in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name",
    [
        "with spaces.jsonl",
        "Прошлое 日本 😀.jsonl",
        "a;b&c|d$e`f'g.jsonl",
        "..hidden..jsonl",
        "-dash.jsonl",
        "per%20cent.jsonl",
    ],
)
def test_names_of_files(name: str, renderer: Renderer, tmp_path: Path) -> None:
    for path in (tmp_path / name, tmp_path / "ein Ordner" / name):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\n".join(json.dumps(row).encode() for row in GOOD))
        _, examples = read(path, renderer)
        assert {example.source for example in examples} == {f"{name}:{number}" for number in (1, 2, 3, 4)}


def test_links(renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_bytes(b"\n".join(json.dumps(row).encode() for row in GOOD))
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    assert read(tmp_path / "link.jsonl", renderer)[0].rows == 4
    (tmp_path / "lost.jsonl").symlink_to("nowhere.jsonl")
    (tmp_path / "round.jsonl").symlink_to("round.jsonl")
    for name in ("lost", "round"):
        with pytest.raises(DataError, match=rf"{name}\.jsonl"):
            read(tmp_path / f"{name}.jsonl", renderer)


def test_a_response_of_ten_megabytes_is_truncated_as_any_other(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(among_good_ones(pair("p", "one two " * 1_250_000)))
    selection, examples = read(path, renderer)
    assert selection.truncated == 1 and not selection.skipped
    (found,) = (example for example in examples if example.source == "rows.jsonl:3")
    assert len(found.prompt_ids) + len(found.response_ids) == 2000
    assert found.response_ids[-1] != renderer.end_id


def test_the_corpus_is_large_enough() -> None:
    assert len(TAKEN) + len(REFUSED) >= 60
