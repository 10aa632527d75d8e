import subprocess
import sys
from pathlib import Path

import pytest

from spinlm.errors import DataError, RecipeError
from spinlm.evals.scorers import exact_match, get_scorer, gsm8k, json_fields


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        ("Paris", "Paris", 1.0),
        ("  two\n words ", "two words", 1.0),
        ("paris", "Paris", 0.0),
        ("twowords", "two words", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_exact_match(response, reference, score):
    assert exact_match(response, reference) == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"item":"blue mug","quantity":3,"price":4.5}', 1.0),
        ('{"price": 4.50, "quantity": 3.0, "item": " blue mug "}', 1.0),
        ('```json\n{"item":"blue mug","quantity":3,"price":4.5}\n```', 1.0),
        ('```\n{"item":"blue mug","quantity":3,"price":4.5}```\n', 1.0),
        ('{"item":"Blue mug","quantity":3,"price":4.5}', 2 / 3),
        ('{"item":"blue mug","quantity":3}', 2 / 3),
        ('{"item":"blue mug","quantity":3,"price":4.5,"colour":"blue"}', 3 / 4),
        ('{"item":"blue mug","quantity":"3","cost":4.5}', 1 / 4),
        ('{"item":"blue mug","quantity":3,"price":4.5,"price":4.5}', 0.0),  # duplicate key
        ('{"item":"blue mug","quantity":3,"price":4.5', 0.0),
        ('{"item":"blue mug","quantity":3,"price":4.5} Anything else?', 0.0),
        ('Sure: {"item":"blue mug","quantity":3,"price":4.5}', 0.0),
        ('{"item":"blue mug","quantity":3,"price":4.5}{"item":"blue mug"}', 0.0),
        ('[{"item":"blue mug","quantity":3,"price":4.5}]', 0.0),
        ('{"item":"blue mug","quantity":3,"price":NaN}', 0.0),
        ("{}", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ('{"quantity":' + "9" * 10_000 + "}", 0.0),
    ],
)
def test_json_fields(response, score):
    assert json_fields(response, '{"item":"blue mug","quantity":3,"price":4.5}') == score


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        ('{"to":{"name":"Ada","age":3.0}}', '{"to":{"name":"Ada","age":3}}', 1.0),
        ('{"to":{"name":"Ada","age":4}}', '{"to":{"name":"Ada","age":3}}', 0.0),  # nested objects compare as a whole
        ('{"tags":["a","b"]}', '{"tags":["a","b"]}', 1.0),
        ('{"tags":["b","a"]}', '{"tags":["a","b"]}', 0.0),
        ('{"paid":1}', '{"paid":true}', 0.0),
        ('{"paid":true}', '{"paid":true}', 1.0),
        ('{"note":null}', '{"note":null}', 1.0),
        ("{}", "{}", 1.0),
    ],
)
def test_json_fields_of_other_types(response, reference, score):
    assert json_fields(response, reference) == score


def test_json_fields_refuses_a_reference_that_is_not_an_object():
    with pytest.raises(DataError, match=r"json_fields needs a JSON object .*'forty two'"):
        json_fields("{}", "forty two")


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("so 7 * 2 is 14 and some.\n#### 1234", 1.0),
        ("#### $1,234.", 1.0),
        ("####1234.00", 1.0),
        ("#### 1234\n\nQuestion: what is 2 + 2?\n#### 4", 1.0),  # the first marker counts: another question follows
        ("#### 14, or is it 1234", 0.0),
        ("The answer is 1,234 dollars.", 1.0),
        ("It is 1234, and not 14", 0.0),
        ("#### unknown, but about 1234", 1.0),
        ("#### -1234", 0.0),
        ("2468-1234", 1.0),
        ("no idea", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k(response, score):
    assert gsm8k(response, "She sells 1200 + 34.\n#### 1,234") == score


def test_gsm8k_of_small_and_negative_numbers():
    assert gsm8k("#### -5", "#### -5") == 1.0
    assert gsm8k("it fell by -$5", "#### -5") == 1.0
    assert gsm8k(".5", "#### 0.50") == 1.0


def test_gsm8k_refuses_a_reference_without_a_number():
    with pytest.raises(DataError, match=r"gsm8k needs a number .*'none'"):
        gsm8k("#### 1", "none")


@pytest.mark.parametrize(
    "reasoned",
    [
        "<think>\nIs it 7, or <b>?\n</think>\n\n{}",
        "\n<think></think>{}",
        "Is it 7?\n</think>\n\n{}",  # the prompt opened the reasoning
    ],
)
@pytest.mark.parametrize(("scorer", "answer"), [(exact_match, "Yes."), (json_fields, '{"a": 1}'), (gsm8k, "So 8")])
def test_reasoning_is_not_scored(scorer, answer, reasoned):
    both = reasoned.replace("{}", answer)
    assert scorer(both, answer) == scorer(answer, both) == scorer(both, both) == 1.0


def test_reasoning_that_does_not_end_is_no_answer():
    assert exact_match("<think>Yes.", "Yes.") == json_fields('<think>{"a": 1}', '{"a": 1}') == 0.0
    # A text about the markers does not begin with reasoning.
    assert exact_match("Write <think> and </think>", "Write") == 0.0
    assert exact_match("Write <think> and </think>", "</think>") == 0.0


def test_known_scorers_by_name():
    assert get_scorer("exact_match")("a ", "a") == 1.0
    assert get_scorer("json_fields")('{"a":1}', '{"a":1,"b":2}') == 0.5
    assert get_scorer("gsm8k")("3", "#### 3") == 1.0


def test_unknown_name_shows_all_known():
    with pytest.raises(RecipeError) as error:
        get_scorer("json_field")
    message = str(error.value)
    assert message.startswith("evaluate.scorer: no scorer 'json_field'. Known: ")
    assert all(name in message for name in ("exact_match", "gsm8k", "module:function"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder; modules imported from it are removed afterwards."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_own_scorer_from_the_current_folder(folder):
    (folder / "my_scorers.py").write_text(
        "import my_words\ndef score(response, reference): return my_words.share(response)"
    )
    (folder / "my_words.py").write_text("def share(text): return len(text.split()) / 4")
    scorer = get_scorer("my_scorers:score")
    assert scorer("three words here", "") == 0.75
    assert scorer.__name__ == "score"


def test_own_scorer_may_return_a_bool(folder):
    (folder / "my_scorers.py").write_text("def same(response, reference): return response == reference")
    assert get_scorer("my_scorers:same")("a", "a") == 1.0


@pytest.mark.parametrize("value", ["1.01", "-0.1", "float('nan')", "float('inf')", "None", "'1'", "1j"])
def test_own_scorer_is_checked_on_every_call(folder, value):
    (folder / "my_scorers.py").write_text(f"def score(response, reference): return {value} if response else 1")
    scorer = get_scorer("my_scorers:score")
    assert scorer("", "") == 1.0
    with pytest.raises(RecipeError, match=r"my_scorers:score returned .* for the response 'text'"):
        scorer("text", "")


def test_missing_module_names_the_folder(folder):
    with pytest.raises(RecipeError) as error:
        get_scorer("no_such_scorers:score")
    message = str(error.value)
    assert message.startswith(
        "evaluate.scorer: no_such_scorers:score: cannot import no_such_scorers (ModuleNotFoundError"
    )
    assert str(folder) in message


def test_module_that_fails_to_import_shows_its_own_error(folder):
    (folder / "my_scorers.py").write_text("def score(response, reference)")
    with pytest.raises(RecipeError, match=r"cannot import my_scorers \(SyntaxError: expected ':'"):
        get_scorer("my_scorers:score")


def test_missing_function_shows_what_to_define(folder):
    (folder / "my_scorers.py").write_text("def score(response, reference): return 1\nlimit = 3")
    with pytest.raises(RecipeError, match=r"has no function limit\. Define limit\(response, reference\) there"):
        get_scorer("my_scorers:limit")


def test_wrong_signature_is_refused_before_a_call(folder):
    (folder / "my_scorers.py").write_text("def score(response): return 1")
    with pytest.raises(RecipeError, match=r"score\(response, reference\): too many"):
        get_scorer("my_scorers:score")


@pytest.mark.parametrize("name", [":score", "my_scorers:"])
def test_incomplete_name(name):
    with pytest.raises(RecipeError, match="write module:function"):
        get_scorer(name)


def test_importing_scorers_loads_no_heavy_package():
    code = (
        "import sys, spinlm.evals.scorers\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"


@pytest.mark.parametrize("name", ["os:popen", "timeit:timeit", "builtins:exec", "subprocess:run"])
def test_functions_of_the_standard_library_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="standard library"):
        get_scorer(name)


def test_partial_function_as_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "import functools\ndef close(a, b, by): return float(abs(len(a) - len(b)) <= by)\n"
    text += "score = functools.partial(close, by=1)\n"
    (tmp_path / "partly.py").write_text(text)
    assert [get_scorer("partly:score")("abc", other) for other in ("ab", "a")] == [1.0, 0.0]
