"""What is asked of a judge, how its verdicts are read, and what they add up to."""

import json
import subprocess
import sys

import pytest

from spinlm.errors import DataError
from spinlm.evals.mt_bench.games import outcome
from spinlm.evals.mt_bench.judge import Judge, JudgeError, read_choice, read_mark
from spinlm.evals.mt_bench.prompts import FIELDS, OWN_PROMPTS, prompt_name, read_prompts
from spinlm.evals.mt_bench.questions import Question, read_questions, read_references
from spinlm.evals.mt_bench.sitting import mean_and_error

# Verdicts


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("Good. [[7]]", 7.0),
        ("Good. [[7.5]]\n", 7.5),
        ("[[ 10 ]]", 10.0),
        ("[[1]]", 1.0),
        ("Good. [7]", 7.0),
        ("As [2] says, not bad: [[6]]", 6.0),  # one bracket counts only where there are no two
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
def test_marks(reply, mark):
    assert read_mark(reply) == mark


@pytest.mark.parametrize(
    ("reply", "choice"),
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
def test_choices(reply, choice):
    assert read_choice(reply) == choice


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        *(("A", "B", 1.0), ("B", "A", 0.0), ("C", "C", 0.5)),
        *(("A", "A", 0.5), ("B", "B", 0.5), ("A", "C", 0.5), ("C", "A", 0.5), ("B", "C", 0.5)),
        *((None, "B", None), ("A", None, None), (None, None, None)),
    ],
)
def test_a_win_needs_both_orders(first, second, result):
    assert outcome(first, second) == result


def test_mean_and_error_over_questions():
    """Two turns of a question count as one observation, however alike they are."""
    assert mean_and_error([[4.0], [6.0], [8.0]]) == (6.0, pytest.approx(2 / 3**0.5))
    assert mean_and_error([[4.0, 4.0], [6.0, 6.0], [8.0, 8.0]]) == (6.0, pytest.approx(2 / 3**0.5))
    # sums 12, 8, 10 of sizes 2, 2, 1: mean 6, deviations 0, −4, 4, so √(3/2 · 32) / 5
    assert mean_and_error([[4.0, 8.0], [6.0, 2.0], [10.0]]) == (6.0, pytest.approx(48**0.5 / 5))
    assert mean_and_error([[3.0, 5.0]]) == (4.0, None)


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


def test_own_prompts_show_the_judge_all_it_needs():
    """And no verdict that a judge might repeat, or a parser take for its own."""
    assert OWN_PROMPTS.keys() == FIELDS.keys()
    for name, prompt in OWN_PROMPTS.items():
        fields = FIELDS[name] if "multi-turn" in name else FIELDS[name] - {"ref_answer_2"}
        texts = {field: f"<text of {field}>" for field in fields}
        ((message),) = prompt.messages(texts)
        assert message["role"] == "user"
        assert all(message["content"].count(text) == 1 for text in texts.values()), name
        assert "{" not in message["content"]
        assert read_mark(message["content"]) is None
        assert read_choice(message["content"]) is None


def test_texts_with_braces_are_shown_as_they_are():
    (message,) = OWN_PROMPTS["single-v1"].messages({"question": "{answer}", "answer": "{'a': {0}}"})
    assert "{answer}" in message["content"]
    assert "{'a': {0}}" in message["content"]


def prompt_row(**changes):
    row = {"name": "single-v1", "type": "single", "system_prompt": "Be fair.", "prompt_template": "{question}|{answer}"}
    return json.dumps(row | changes)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(prompt_row() + "\n\n" + prompt_row(name="pair-v1", prompt_template="{else}") + "\n")
    prompts = read_prompts(path)
    assert prompts.keys() == {"single-v1"}
    assert prompts["single-v1"].messages({"question": "Q", "answer": "A"}) == [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "Q|A"},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a judge prompt"),
        ("[]", "line 2: not a judge prompt"),
        (json.dumps({"name": "single-v1"}), "line 2: not a judge prompt .*system_prompt"),
        (prompt_row(system_prompt=3), "line 2: system_prompt and prompt_template of single-v1 must be texts"),
        (prompt_row(prompt_template="{answer} {reference}"), "unknown field {reference}; it may use answer, question"),
        (prompt_row(prompt_template="{answer.__class__}"), "unknown field {answer.__class__}"),
        (prompt_row(prompt_template="{answer} {"), "line 2: prompt_template of single-v1: .*brace"),
        (prompt_row(prompt_template="{question}"), "does not show {answer}"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_prompts(path)


# The judge


def test_address_of_a_judge():
    judge = Judge.of("http://127.0.0.1:8000/v1/chat/completions/", "m")
    assert judge.url == "http://127.0.0.1:8000/v1"
    assert judge.host == "127.0.0.1:8000"
    assert judge.prompts == OWN_PROMPTS


@pytest.mark.parametrize(
    ("url", "model", "message"),
    [
        (None, "m", "no judge: .*--judge-url"),
        ("http://a/v1", None, "no judge: .*--judge-model"),
        ("localhost:8000/v1", "m", "begins with http"),
        ("ftp://a/v1", "m", "begins with http"),
        ("http:///v1", "m", "begins with http"),
        ("http://a:b:c", "m", "not an address"),
        ("http://me:secret@a/v1", "m", "without a password"),
        ("http://a/v1?key=secret", "m", "without a password"),
    ],
)
def test_judges_that_cannot_be(url, model, message):
    with pytest.raises(JudgeError, match=message) as caught:
        Judge.of(url, model)
    assert "secret" not in str(caught.value)


def test_a_judge_is_known_without_torch_and_transformers():
    code = (
        "import sys, spinlm.evals.mt_bench.bench\n"
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


def test_questions_come_from_the_categories_in_turn(tmp_path):
    lines = [question_row(number, category) for number, category in enumerate(["a", "a", "a", "b", "b", "c"])]
    questions = read_questions(write(tmp_path / "q.jsonl", *lines))
    assert [(question.category, question.id) for question in questions] == [
        *(("a", 0), ("b", 3), ("c", 5)),
        *(("a", 1), ("b", 4), ("a", 2)),
    ]


def test_temperatures():
    found = {
        name: Question(1, name, ("?",)).temperature for name in ("writing", "roleplay", "math", "stem", "humanities")
    }
    assert found == {"writing": 0.7, "roleplay": 0.7, "math": 0.0, "stem": 0.1, "humanities": 0.1}
    assert [Question(1, name, ("?",)).temperature for name in ("extraction", "coding", "reasoning", "else")] == [
        *(0.0, 0.0, 0.0, 0.7)
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "q.jsonl is empty"),
        (("", " "), "q.jsonl is empty"),
        ((question_row(1), "{"), "q.jsonl, line 2: not JSON"),
        ((question_row(1), "[]"), "q.jsonl, line 2: not a JSON object"),
        ((question_row(1), '{"question_id": 2}'), "q.jsonl, line 2: not a question: category is missing"),
        ((question_row(1), question_row(2, category=3)), "line 2: not a question: category is not a text"),
        ((question_row(1), question_row(2, turns="One?")), "line 2: not a question: turns is not a list of texts"),
        ((question_row(1), question_row(2, turns=[])), "line 2: not a question: turns must be one or two texts"),
        ((question_row(1), question_row(2, turns=["a", " "])), "line 2: not a question: turns must be one or two"),
        ((question_row(1), question_row(2, turns=["a"] * 3)), "line 2: not a question: turns must be one or two"),
        ((question_row(1), question_row(1)), "line 2: question_id 1 is that of .*line 1, too"),
    ],
)
def test_questions_that_cannot_be_used(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", *lines))


def test_references_of_categories_that_want_them(tmp_path):
    questions = [Question(1, "math", ("a", "b")), Question(2, "writing", ("a",)), Question(3, "arena-hard-200", ("a",))]
    rows = [{"question_id": number, "choices": [{"index": 0, "turns": ["x", "y"]}]} for number in (1, 2, 3, 4)]
    path = write(tmp_path / "r.jsonl", *map(json.dumps, rows))
    assert read_references(path, questions) == {1: ("x", "y"), 3: ("x", "y")}
    assert read_references(None, questions) == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1}, "line 1: not a reference answer"),
        ({"question_id": 1, "choices": []}, "line 1: not a reference answer"),
        ({"question_id": 1, "choices": [{"turns": [1, 2]}]}, "line 1: the turns of a reference answer must be texts"),
        ({"question_id": 1, "choices": [{"turns": ["x"]}]}, "line 1: 1 answers to the 2 turns"),
        ({"question_id": "1", "choices": [{"turns": ["x", "y"]}]}, "answers none of these questions"),
    ],
)
def test_references_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_references(write(tmp_path / "r.jsonl", json.dumps(row)), [Question(1, "math", ("a", "b"))])
