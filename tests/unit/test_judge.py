"""The judge's settings and prompts, the verdicts in its judgments, and MT-Bench's files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spinlm.errors import DataError
from spinlm.evals.mt_bench.grading import comparison_result, parse_choice, parse_rating
from spinlm.evals.mt_bench.judge import Judge, JudgeError, default_prompts, prompt_name, read_prompts
from spinlm.evals.mt_bench.questions import Question, read_questions, read_references
from spinlm.utils.statistics import clustered_mean

# Verdicts


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("Good. [[7]]", 7.0),
        ("Good. [[7.5]]\n", 7.5),
        ("[[ 10 ]]", 10.0),
        ("[[1]]", 1.0),
        ("Good. [7]", 7.0),
        ("As [2] says, not bad: [[6]]", 6.0),  # single brackets count only without double ones
        ("[[MARK]]: [[6]]", 6.0),
        ("[[6]] … so I say [[6.0]]", 6.0),
        ("[[3]] or rather [[8]]", None),  # it contradicts itself
        ("As [2] says and [3] does not", None),
        ("<think>[[3]]?</think>[[8]]", 8.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-7]]", None),
        ("[[7/10]]", None),
        ("7 of 10", None),
        ("[[]]", None),
        ("", None),
    ],
)
def test_parse_rating(judgment, rating):
    assert parse_rating(judgment) == rating


@pytest.mark.parametrize(
    ("judgment", "choice"),
    [
        ("[[A]]", "A"),
        ("Both fine. [[ C ]]", "C"),
        ("[[B]], I say [[B]]", "B"),
        ("[[A]] when A is better, [[B]] when B is better", None),
        ("<think>[[A]]</think>[[B]]", "B"),
        ("[A]", None),
        ("[[a]]", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_parse_choice(judgment, choice):
    assert parse_choice(judgment) == choice


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        *(("A", "B", 1.0), ("B", "A", 0.0), ("C", "C", 0.5)),
        *(("A", "A", 0.5), ("B", "B", 0.5), ("A", "C", 0.5), ("C", "A", 0.5), ("B", "C", 0.5)),
        *((None, "B", None), ("A", None, None), (None, None, None)),
    ],
)
def test_a_win_needs_both_orders(first, second, result):
    assert comparison_result(first, second) == result


def test_clustered_mean():
    """Two turns of a question count as one observation."""
    assert clustered_mean([[4.0], [6.0], [8.0]]) == (6.0, pytest.approx(2 / 3**0.5))
    assert clustered_mean([[4.0, 4.0], [6.0, 6.0], [8.0, 8.0]]) == (6.0, pytest.approx(2 / 3**0.5))
    # sums 12, 8, 10 of sizes 2, 2, 1: mean 6, deviations 0, −4, 4, so √(3/2 · 32) / 5
    assert clustered_mean([[4.0, 8.0], [6.0, 2.0], [10.0]]) == (6.0, pytest.approx(48**0.5 / 5))
    assert clustered_mean([[3.0, 5.0]]) == (4.0, None)


# Prompts


def test_prompt_names():
    assert prompt_name(pairwise=False, turn=1, reference=False) == "single-v1"
    assert prompt_name(pairwise=False, turn=2, reference=False) == "single-v1-multi-turn"
    assert prompt_name(pairwise=False, turn=1, reference=True) == "single-math-v1"
    assert prompt_name(pairwise=False, turn=2, reference=True) == "single-math-v1-multi-turn"
    assert prompt_name(pairwise=True, turn=1, reference=False) == "pair-v2"
    assert prompt_name(pairwise=True, turn=2, reference=False) == "pair-v2-multi-turn"
    assert prompt_name(pairwise=True, turn=1, reference=True) == "pair-math-v1"
    assert prompt_name(pairwise=True, turn=2, reference=True) == "pair-math-v1-multi-turn"


COMMON = {
    "single-v1": {"question", "answer"},
    "single-v1-multi-turn": {"question_1", "answer_1", "question_2", "answer_2"},
    "pair-v2": {"question", "answer_a", "answer_b"},
    "pair-v2-multi-turn": {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"},
}
FIELDS = COMMON | {
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-math-v1-multi-turn": COMMON["single-v1-multi-turn"] | {"ref_answer_1", "ref_answer_2"},
    "pair-math-v1": {"question", "answer_a", "answer_b", "ref_answer_1"},
    "pair-math-v1-multi-turn": COMMON["pair-v2-multi-turn"] | {"ref_answer_1", "ref_answer_2"},
}


def test_default_prompts_show_every_field_once():
    """And no verdict that a judge may repeat, or that can be parsed."""
    prompts = default_prompts()
    assert prompts.keys() == FIELDS.keys()
    for name, prompt in prompts.items():
        texts = {field: f"<text of {field}>" for field in FIELDS[name]}
        ((message),) = prompt.messages(texts)
        assert message["role"] == "user"
        assert all(message["content"].count(text) == 1 for text in texts.values()), name
        assert "{" not in message["content"]
        assert parse_rating(message["content"]) is None
        assert parse_choice(message["content"]) is None


def test_braces_in_texts_stay():
    (message,) = default_prompts()["single-v1"].messages({"question": "{answer}", "answer": "{'a': {0}}"})
    assert "{answer}" in message["content"]
    assert "{'a': {0}}" in message["content"]


def prompt_row(**changes):
    row = {"name": "single-v1", "type": "single", "system_prompt": "Be fair.", "prompt_template": "{question}|{answer}"}
    return json.dumps(row | changes)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(prompt_row() + "\n\n" + prompt_row(name="pair-v1", prompt_template="{else}") + "\n")
    prompts = read_prompts(path)
    assert prompts.keys() == FIELDS.keys()
    assert prompts["pair-v2"] == default_prompts()["pair-v2"]
    assert prompts["single-v1"].messages({"question": "Q", "answer": "A"}) == [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "Q|A"},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Invalid JSON"),
        ("[]", "line 2: .*object"),
        (json.dumps({"name": "single-v1"}), "line 2: system_prompt: .*; prompt_template: "),
        (prompt_row(system_prompt=3), "line 2: system_prompt: "),
        (prompt_row(prompt_template="{question} {answer} {reference}"), "line 2: .*the fields answer, question"),
        (prompt_row(prompt_template="{question} {answer.__class__}"), "line 2: .*the fields answer, question"),
        (prompt_row(prompt_template="{answer} {"), "line 2: prompt_template: .*brace"),
        (prompt_row(prompt_template="{question}"), "line 2: .*the fields answer, question"),
        (prompt_row(name="single"), "no prompt with a name of single-v1"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_prompts(path)


# The judge


def write_settings(tmp_path, text):
    path = tmp_path / "judge.yaml"
    path.write_text(text)
    return path


def test_settings_of_a_judge(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(prompt_row())
    text = "url: http://127.0.0.1:8000/v1/chat/completions/\nmodel: m\nprompts_file: prompts.jsonl\ntimeout: 60\n"
    judge = Judge.load(write_settings(tmp_path, text + "extra_body: {temperature: null}\n"))
    assert (judge.url, judge.host, judge.timeout) == ("http://127.0.0.1:8000/v1", "127.0.0.1:8000", 60.0)
    assert (judge.max_tokens, judge.max_concurrency, judge.extra_body) == (2048, 4, {"temperature": None})
    assert judge.prompts["single-v1"].system_prompt == "Be fair."
    judge = Judge.load(write_settings(tmp_path, "url: http://a/v1\nmodel: m\n"))
    assert judge.prompts == default_prompts()


def test_every_setting_is_documented(tmp_path):
    assert all(field.description for field in Judge.model_fields.values())
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    example = page.partition('```yaml title="judge.yaml"\n')[2].partition("```")[0]
    judge = Judge.load(write_settings(tmp_path, example))
    assert judge.model_fields_set == Judge.model_fields.keys()
    assert judge == Judge(url=judge.url, model=judge.model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m", "url: Field required"),
        ("url: http://a/v1", "model: Field required"),
        ("url: http://a/v1\nmodel: ''", "model: "),
        ("- url", ".*dictionary"),
        ("url: localhost:8000/v1\nmodel: m", "url: .*begins with http"),
        ("url: ftp://a/v1\nmodel: m", "url: .*begins with http"),
        ("url: http:///v1\nmodel: m", "url: .*begins with http"),
        ("url: http://a:b:c\nmodel: m", "url: .*not a URL"),
        ("url: http://me:secret@a/v1\nmodel: m", "url: .*without a password"),
        ("url: http://a/v1?key=secret\nmodel: m", "url: .*without a password"),
        ("url: http://a/v1\nmodel: m\nkey: secret", "key: .*settings of a judge are url, model"),
        ("url: http://a/v1\nmodel: m\nmax_tokens: 0", "max_tokens: "),
        ("url: http://a/v1\nmodel: m\nextra_body: [1]", "extra_body: "),
        ("url: http://a/v1\nmodel: m\nextra_body: {model: other}", "extra_body: model cannot be set"),
    ],
)
def test_wrong_settings(tmp_path, text, message):
    with pytest.raises(JudgeError, match=f"judge.yaml: {message}") as caught:
        Judge.load(write_settings(tmp_path, text))
    assert "secret" not in str(caught.value)


def test_importing_mt_bench_loads_no_heavy_package():
    code = (
        "import sys, spinlm.evals.mt_bench.run\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'httpx'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"


# Questions and references


def question_row(number, category="writing", turns=("One?", "Two?"), **more):
    return json.dumps({"question_id": number, "category": category, "turns": turns, **more})


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def question(number, category, *turns):
    return Question(question_id=number, category=category, turns=turns)


def test_questions_take_the_categories_in_turn(tmp_path):
    lines = [question_row(number, category) for number, category in enumerate(["a", "a", "a", "b", "b", "c"])]
    questions = read_questions(write(tmp_path / "q.jsonl", *lines))
    assert [(question.category, question.question_id) for question in questions] == [
        *(("a", 0), ("b", 3), ("c", 5)),
        *(("a", 1), ("b", 4), ("a", 2)),
    ]


def test_temperatures():
    temperatures = {"writing": 0.7, "roleplay": 0.7, "math": 0.0, "stem": 0.1, "humanities": 0.1}
    temperatures |= {"extraction": 0.0, "coding": 0.0, "reasoning": 0.0, "other": 0.7}
    assert {name: question(1, name, "?").temperature for name in temperatures} == temperatures


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "q.jsonl is empty"),
        (("", " "), "q.jsonl is empty"),
        ((question_row(1), "{"), "q.jsonl, line 2: Invalid JSON"),
        ((question_row(1), "[]"), "q.jsonl, line 2: .*object"),
        ((question_row(1), '{"question_id": 2}'), "q.jsonl, line 2: category: "),
        ((question_row(1), question_row(None)), "line 2: question_id.*: "),
        ((question_row(1), question_row(2, category=3)), "line 2: category: "),
        ((question_row(1), question_row(2, turns="One?")), "line 2: turns: "),
        ((question_row(1), question_row(2, turns=[])), "line 2: turns: "),
        ((question_row(1), question_row(2, turns=["a", " "])), "line 2: turns.1: "),
        ((question_row(1), question_row(2, turns=["a"] * 3)), "line 2: turns: "),
        ((question_row(1), question_row(1)), "line 2: question_id 1 repeats .*line 1"),
    ],
)
def test_questions_that_cannot_be_used(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", *lines))


def test_references_of_categories_that_use_them(tmp_path):
    questions = [question(1, "math", "a", "b"), question(2, "writing", "a"), question(3, "arena-hard-200", "a")]
    rows = [{"question_id": number, "choices": [{"index": 0, "turns": ["x", "y"]}]} for number in (1, 2, 3, 4)]
    path = write(tmp_path / "r.jsonl", *map(json.dumps, rows))
    assert read_references(path, questions) == {1: ("x", "y"), 3: ("x", "y")}
    assert read_references(None, questions) == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1}, "line 1: choices: "),
        ({"question_id": 1, "choices": []}, "line 1: choices: "),
        ({"question_id": 1, "choices": [{"turns": [1, 2]}]}, "line 1: choices.0.turns.0: "),
        ({"question_id": 1, "choices": [{"turns": ["x"]}]}, "line 1: 1 answers"),
        ({"question_id": "1", "choices": [{"turns": ["x", "y"]}]}, "no answer with a question_id"),
    ],
)
def test_references_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_references(write(tmp_path / "r.jsonl", json.dumps(row)), [question(1, "math", "a", "b")])
