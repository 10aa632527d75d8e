"""`spinlm benchmark` from end to end: the real command line, the real harness, a tiny run, local data."""

import json
import shutil
from pathlib import Path

import lm_eval
import pytest
from runs import contents, write_rows

CHOICE = """\
task: pick
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/rows.jsonl"}, cache_dir: "FOLDER/cache"}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SAY = """\
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/rows.jsonl"}, cache_dir: "FOLDER/cache"}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["?"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    for name, text in (("pick", CHOICE), ("say", SAY)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    choices = ["Paris", "Yes", "red", "three"]
    write_rows(
        tmp_path / "rows.jsonl", [{"question": f"What is {n}?", "choices": choices, "answer": n % 4} for n in range(12)]
    )
    return tmp_path


def test_players_are_measured_and_shown_side_by_side(cli, reference, tasks):
    run = shutil.copytree(reference, tasks / "run", symlinks=True)
    before = contents(run)
    command = ("benchmark", "run", "--iteration", "start,1", "--tasks", "pick,say", "--num-fewshot", "2")
    command += ("--include-path", "tasks")
    result = cli(*command, folder=tasks)
    kept = {
        name: json.loads((run / name / "benchmarks.json").read_text())["tasks"] for name in ("start", "iteration-1")
    }
    lines = [line.split() for line in result.out.splitlines()]
    assert ["tasks", "metric", "examples", "start", "iteration", "1"] in lines
    for task, metric in (("pick", "acc"), ("say", "exact_match")):
        start, last = kept["start"][task], kept["iteration-1"][task]
        assert start["settings"] == last["settings"] and start["settings"]["num_fewshot"] == 2
        cells = [f"{part:.3f}" for score in (start, last) for part in (score["value"], score["standard_error"])]
        assert [task, metric, "12", cells[0], "±", cells[1], cells[2], "±", cells[3]] in lines
    after = contents(run)
    assert {name: after[name] for name in before} == before  # no stage's files are touched
    assert set(after) - set(before) == {"start/benchmarks.json", "iteration-1/benchmarks.json"}

    again = cli(*command, folder=tasks)
    assert again.err.count("already measured") == 4
    assert again.out == result.out and contents(run) == after


def test_ifeval_on_local_prompts(cli, reference, tasks, punkt):
    """IFEval's own task and code. No response has the word zebra: one of four prompts asks for it."""
    run = shutil.copytree(reference, tasks / "run", symlinks=True)
    without = {"instruction_id_list": ["keywords:forbidden_words"], "kwargs": [{"forbidden_words": ["zebra"]}]}
    with_it = {
        "instruction_id_list": [
            "keywords:existence",
            "keywords:forbidden_words",
            "length_constraints:number_sentences",
        ],
        "kwargs": [
            {"keywords": ["zebra"]},
            {"forbidden_words": ["zebra"]},
            {"num_sentences": 99, "relation": "less than"},
        ],
    }
    rows = [without, without, without, with_it]
    write_rows(tasks / "prompts.jsonl", [{"key": n, "prompt": f"What is {n}?"} | row for n, row in enumerate(rows)])
    config = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"),
        "task": "ifeval",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(tasks / "prompts.jsonl")}, "cache_dir": str(tasks / "cache")},
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 8},
    }
    (tasks / "tasks" / "ifeval.yaml").write_text(json.dumps(config))
    command = ("benchmark", "run", "--iteration", "start,1", "--suite", "ifeval", "--include-path", "tasks")
    result = cli(*command, folder=tasks, NLTK_DATA=str(punkt))
    lines = [line.split() for line in result.out.splitlines() if line.startswith(" ifeval")]
    mean = ["0.750", "±", "0.250"]  # √(0.75 · 0.25 / 3)
    share = f"{5 / 6:.3f}"
    assert lines == [
        ["ifeval", "metric", "examples", "start", "iteration", "1"],
        ["ifeval", "prompt_level_strict_acc", "4", *mean, *mean],
        ["ifeval", "inst_level_strict_acc", "4", share, share],
        ["ifeval", "prompt_level_loose_acc", "4", *mean, *mean],
        ["ifeval", "inst_level_loose_acc", "4", share, share],
    ]
    score = json.loads((run / "start" / "benchmarks.json").read_text())["ifeval"]["ifeval"]
    assert score["settings"]["chat_template"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to measure"),
        (("--suite", "big-bank"), "--suite: there is no suite 'big-bank'. Did you mean big-bench?"),
        (("--suite", "big-bench", "--num-fewshot", "1"), "--num-fewshot"),
        (("--tasks", "pick", "--include-path", "nowhere"), "--include-path nowhere: no such folder"),
    ],
)
def test_one_message_when_something_is_wrong(cli, reference, tasks, options, message):
    refused = cli("benchmark", reference, "--iteration", "start", *options, folder=tasks, code=2)
    assert refused.message.startswith(message)
    assert not (reference / "start" / "benchmarks.json").exists()


def test_player_that_does_not_exist(cli, reference, tasks):
    refused = cli("benchmark", reference, "--iteration", "start,7", "--tasks", "pick", folder=tasks, code=2)
    assert "has no player 7" in refused.message
