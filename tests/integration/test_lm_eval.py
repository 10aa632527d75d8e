"""`spinlm benchmark --tasks …` from end to end: the real command line, the real harness, a tiny run."""

import json
import shutil
from pathlib import Path

import pytest
from runs import contents, write_rows

CHOICE = """\
task: pick
dataset_path: nobody/nowhere
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SAY = """\
task: say
dataset_path: nobody/nowhere
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["?"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pick.yaml").write_text(CHOICE)
    (tmp_path / "tasks" / "say.yaml").write_text(SAY)
    choices = ["Paris", "Yes", "red", "three"]
    write_rows(
        tmp_path / "rows.jsonl", [{"question": f"What is {n}?", "choices": choices, "answer": n % 4} for n in range(12)]
    )
    return tmp_path


def test_players_are_measured_and_shown_side_by_side(cli, reference, tasks):
    run = shutil.copytree(reference, tasks / "run", symlinks=True)
    before = contents(run)
    data = ("--task-data", "pick=rows.jsonl", "--task-data", "say=rows.jsonl")
    command = ("benchmark", "run", "--iteration", "start,1", "--tasks", "pick,say:2", "--include-path", "tasks", *data)
    said = cli(*command, folder=tasks)
    kept = {
        name: json.loads((run / name / "benchmarks.json").read_text())["tasks"] for name in ("start", "iteration-1")
    }
    lines = [line.split() for line in said.out.splitlines()]
    assert ["tasks", "metric", "examples", "start", "iteration", "1"] in lines
    for task, metric in (("pick", "acc"), ("say", "exact_match")):
        start, last = kept["start"][task], kept["iteration-1"][task]
        assert start["settings"] == last["settings"]
        shown = [f"{part:.3f}" for score in (start, last) for part in (score["value"], score["standard_error"])]
        assert [task, metric, "12", shown[0], "±", shown[1], shown[2], "±", shown[3]] in lines
    assert kept["start"]["say"]["settings"]["few_shots"] == 2
    after = contents(run)
    assert {name: after[name] for name in before} == before  # no stage's files are touched
    assert set(after) - set(before) == {"start/benchmarks.json", "iteration-1/benchmarks.json"}

    again = cli(*command, folder=tasks)
    assert again.err.count("measured before with the same settings, not measured again") == 4
    assert again.out == said.out and contents(run) == after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "big-bank"), "--suite: there is no suite 'big-bank'. Did you mean big-bench?"),
        (("--tasks", "pick", "--task-data", "pick"), "--task-data: 'pick' cannot be read. Write NAME=FILE.jsonl"),
        (("--tasks", "pick", "--include-path", "tasks"), "pick: its dataset cannot be fetched ("),
        (("--tasks", "arc_challenge"), "arc_challenge: its dataset cannot be fetched ("),
    ],
)
def test_one_message_when_something_is_wrong(cli, reference, tasks, options, message):
    refused = cli("benchmark", reference, "--iteration", "start", *options, folder=tasks, code=2)
    assert refused.message.startswith(message)
    assert not (reference / "start" / "benchmarks.json").exists()
