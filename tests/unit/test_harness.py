"""lm-evaluation-harness on the players of a run: the real harness, a tiny model, tasks and data of our own."""

import json
import logging
import math
import multiprocessing
import shutil
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models import save_tiny_model, tiny_recipe
from spinlm.errors import DataError, MissingPackageError, RunError
from spinlm.evals.lm_harness import index
from spinlm.evals.lm_harness import tasks as harness_tasks
from spinlm.evals.lm_harness.data import local_data
from spinlm.evals.lm_harness.measure import harness
from spinlm.evals.lm_harness.tasks import SUITES, Unit, open_units, wanted_tasks
from spinlm.evals.scores import Score, read_scores
from spinlm.model.players import Players, seat
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START

CHOICE = """\
task: choice
dataset_path: nobody/nowhere
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
OTHER = CHOICE.replace("task: choice", "task: other").replace("num_fewshot: 0", "num_fewshot: 2")
SAY = """\
task: say
dataset_path: nobody/nowhere
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
"""
FIXED = """\
include: say.yaml
task: fixed
num_fewshot: 1
fewshot_config: {sampler: first_n, samples: [{question: "Is it fixed?", choices: [It is], answer: 0}]}
"""
BOTH = """\
group: both
task: [choice, other]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 3.0}
"""
WORDS = ("Paris", "red", "three", "the answer")
ROWS = [{"question": f"What is {n}?", "choices": WORDS, "answer": n % 4} for n in range(9)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("other", OTHER), ("say", SAY), ("fixed", FIXED), ("both", BOTH)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A recipe, and a folder with the players θ_0 and θ_1."""
    folder = tmp_path_factory.mktemp("world")
    recipe = tiny_recipe(save_tiny_model(folder / "model", max_position_embeddings=1024), lora={"r": 4, "alpha": 8.0})
    players = Players(recipe, RunDir(folder / "run"))
    for iteration in (START, 0):
        torch.manual_seed(iteration + 2)
        with torch.no_grad():
            for _, parameter in players.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        players.save(iteration)
    return recipe, folder


@pytest.fixture
def measure(world: Any, tasks: Path, tmp_path: Path) -> Callable[..., dict[str, dict[str, Score]]]:
    """Measures in a folder of the test's own; returns the scores of a player."""
    recipe, folder = world
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    for iteration in (START, 0):
        run.iteration(iteration).mkdir()
        run.player(iteration).symlink_to(RunDir(folder / "run").player(iteration))
    for stage, iteration in (
        ("prepare", START),
        ("sft", START),
        ("generate", 0),
        ("reference_logprobs", 0),
        ("train", 0),
    ):
        run.complete(stage, iteration, [run.player(iteration)] if stage in ("sft", "train") else [])

    def measure(names: str, *data: str, players: tuple[int, ...] = (0,), **options: Any) -> dict[str, dict[str, Score]]:
        harness(recipe, run, players, options.pop("suite", None), names, data=data, folder=tasks, **options)
        return read_scores(run, players[-1])

    return measure


def plain(world: Any, iteration: int) -> Any:
    """A player as PEFT loads it, without anything of ours."""
    _, folder = world
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    return PeftModel.from_pretrained(base, str(RunDir(folder / "run").player(iteration))).eval()


def logprob(model: Any, context: list[int], target: list[int]) -> float:
    """log p(target | context), as any textbook has it."""
    with torch.no_grad():
        logits = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
    return torch.log_softmax(logits.double(), dim=-1)[torch.arange(len(target)), target].sum().item()


# The player


def test_seated_player_is_the_one_that_peft_loads(world: Any) -> None:
    """The same log-probabilities and the same greedy text, though our layers are fused and nothing is merged."""
    from lm_eval.api.instance import Instance

    from spinlm.evals.lm_harness.model import SeatedModel

    recipe, folder = world
    players = seat(recipe, RunDir(folder / "run"))
    model = SeatedModel(players, batch_size=3)
    questions = [f"What is {'one two three ' * n}?" for n in range(4)]
    found = {}
    for iteration in (START, 0):
        players.become(iteration)
        theirs = plain(world, iteration)
        asked = [(question, f" {word}") for question in questions for word in WORDS]
        ours = model.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(asked)])
        for (question, word), (value, _) in zip(asked, ours, strict=True):
            context = players.tokenizer(question)["input_ids"]
            target = players.tokenizer(question + word)["input_ids"][len(context) :]
            assert value == pytest.approx(logprob(theirs, context, target), abs=1e-4)
        options = {"until": ["never"], "max_gen_toks": 6, "do_sample": False}
        said = model.generate_until(
            [Instance("generate_until", {}, (question, dict(options)), n) for n, question in enumerate(questions)]
        )
        for question, text in zip(questions, said, strict=True):
            ids = players.tokenizer(question, return_tensors="pt").input_ids
            whole = theirs.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            assert text == players.tokenizer.decode(whole, skip_special_tokens=True)
        found[iteration] = [value for value, _ in ours]
    assert max(abs(a - b) for a, b in zip(found[START], found[0], strict=True)) > 0.1


@pytest.mark.parametrize("iteration", [START, 0])
def test_multiple_choice_score_is_that_of_the_plain_model(world: Any, measure: Any, rows: Path, iteration: int) -> None:
    model, tokenizer = plain(world, iteration), seat(*_recipe_and_run(world)).tokenizer
    right = []
    for row in ROWS:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        words = [
            tokenizer(f"Question: {row['question']}\nAnswer: {word}")["input_ids"][len(prompt) :] for word in WORDS
        ]
        values = [logprob(model, prompt, word) for word in words]
        right.append(values.index(max(values)) == row["answer"])
    share = sum(right) / 9
    score = measure("choice", f"choice={rows}", players=(iteration,))["tasks"]["choice"]
    assert (score.value, score.metric, score.examples) == (pytest.approx(share), "acc", 9)
    assert score.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 8))


def _recipe_and_run(world: Any) -> tuple[Any, RunDir]:
    recipe, folder = world
    return recipe, RunDir(folder / "run")


def test_generated_answers_are_scored(world: Any, measure: Any, tmp_path: Path) -> None:
    """Half of the targets are what the plain player says."""
    model, tokenizer = plain(world, 0), seat(*_recipe_and_run(world)).tokenizer
    data = []
    for row in ROWS[:8]:
        ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        said = tokenizer.decode(whole, skip_special_tokens=True).split("\n\n")[0]
        data.append(row | {"choices": [said, "no"], "answer": int(len(data) % 2)})
    score = measure("say", f"say={write(tmp_path / 'said.jsonl', data)}")["tasks"]["say"]
    assert (score.value, score.metric, score.examples) == (0.5, "exact_match", 8)


def test_chat_template_is_applied_when_asked_for_and_noted(measure: Any, rows: Path) -> None:
    scores = [measure("choice", f"choice={rows}", chat_template=asked)["tasks"]["choice"] for asked in (False, True)]
    assert [score.settings["chat_template"] for score in scores] == [False, True]


def test_prompt_that_is_too_long_is_told(measure: Any, tmp_path: Path, caplog: Any) -> None:
    """The tiny model takes 1024 tokens."""
    caplog.set_level(logging.INFO, "spinlm")
    long = [row | {"question": "one two " * 600} for row in ROWS]
    measure("choice", f"choice={write(tmp_path / 'long.jsonl', long)}", limit=2)
    assert "some prompts of choice are longer than the 1024 tokens this model takes" in caplog.text


# Scores


def test_scores_say_how_they_were_measured(measure: Any, rows: Path) -> None:
    scores = measure("choice,other:1", f"choice={rows}", f"other={rows}", limit=4)["tasks"]
    assert list(scores) == ["choice", "choice acc_norm", "other", "other acc_norm"]
    about = scores["other"].settings
    assert {key: about[key] for key in ("few_shots", "limit", "chat_template", "precision", "task_version")} == {
        "few_shots": 1,
        "limit": 4,
        "chat_template": False,
        "precision": "float32",
        "task_version": 1.0,
    }
    assert scores["other"].examples == 4
    assert about["lm_eval"] == harness_tasks.harness_version()
    assert set(about["data"]) == {"questions"} and len(about["data"]["questions"]) == 64


def test_the_same_is_not_measured_again(measure: Any, tasks: Path, rows: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "spinlm")
    first = measure("choice", f"choice={rows}")
    assert "not measured again" not in caplog.text
    assert measure("choice", f"choice={rows}", batch_size=2) == first
    assert "iteration 0: choice measured before with the same settings, not measured again" in caplog.text
    caplog.clear()
    changed = measure("choice", f"choice={rows}", limit=3)["tasks"]["choice"]
    assert changed.examples == 3 and "not measured again" not in caplog.text
    (tasks / "choice.yaml").write_text(CHOICE.replace("Question: ", "Q: "))
    other = measure("choice", f"choice={rows}", limit=3)["tasks"]["choice"]
    assert other.settings != changed.settings and "not measured again" not in caplog.text
    write(rows, ROWS[1:])
    assert measure("choice", f"choice={rows}", limit=3)["tasks"]["choice"].settings != other.settings
    assert "not measured again" not in caplog.text


def test_what_is_finished_is_kept_when_a_later_task_fails(measure: Any, world: Any, tasks: Path, rows: Path) -> None:
    (tasks / "bad.yaml").write_text(SAY.replace("task: say", "task: bad").replace("{{choices[answer]}}", "{{odd[1]}}"))
    uneven = write(
        tasks.parent / "uneven.jsonl", [row | {"odd": ["a", "b"][: 2 - (n > 3)]} for n, row in enumerate(ROWS)]
    )
    with pytest.raises(RunError, match="bad: lm-evaluation-harness cannot measure it: "):
        measure("choice,bad", f"choice={rows}", f"bad={uneven}")
    assert set(read_scores(RunDir(tasks.parent / "run"), 0)["tasks"]) == {"choice", "choice acc_norm"}


def test_group_is_the_mean_of_its_tasks(measure: Any, tasks: Path, rows: Path, caplog: Any) -> None:
    """Weighed by their size, as the group's file says. Its tasks are kept apart, and resumed one by one."""
    caplog.set_level(logging.INFO, "spinlm")
    fewer = write(tasks.parent / "fewer.jsonl", ROWS[:5])
    scores = measure("both", f"choice={rows}", f"other={fewer}")
    one, other = (scores["tasks/both"][name] for name in ("choice", "other"))
    assert (one.examples, other.examples) == (9, 5)
    whole = scores["tasks"]["both"]
    assert whole.value == pytest.approx((9 * one.value + 5 * other.value) / 14)
    assert (whole.examples, whole.settings["task_version"]) == (14, "3.0")
    assert list(scores["tasks"]) == ["both"]
    assert measure("both", f"choice={rows}", f"other={fewer}") == scores
    assert "iteration 0: both measured before with the same settings, not measured again" in caplog.text


def test_suite_has_the_papers_tasks() -> None:
    known = index.shipped_names()
    assert [one.name for suite in SUITES.values() for one in suite if one.name not in known] == []
    assert {one.name: one.shots for one in SUITES["open-llm-leaderboard"]} == {
        "arc_challenge": 25,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
        "hellaswag": 10,
        "mmlu": 5,
    }


def test_gsm8k_of_the_harness_on_a_local_file(measure: Any, tmp_path: Path) -> None:
    """Part of a suite: its shots, and the metric that counts."""
    sums = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(9)]
    tests, shots = write(tmp_path / "test.jsonl", sums[:2]), write(tmp_path / "train.jsonl", sums[2:])
    data = (f"gsm8k={tests}", f"gsm8k:fewshot={shots}")
    scores = measure("gsm8k", *data, suite="open-llm-leaderboard", limit=1)["open-llm-leaderboard"]
    assert (scores["gsm8k"].metric, scores["gsm8k"].settings["few_shots"]) == ("exact_match,strict-match", 5)
    assert set(scores["gsm8k"].settings["data"]) == {"questions", "fewshot"}


# Few-shots


def units(names: str, tasks: Path, scratch: Path, *data: str) -> list[Unit]:
    return open_units(wanted_tasks(None, names), local_data(data), tasks, scratch)


@pytest.mark.parametrize("sampler", ["default", "first_n"])
@pytest.mark.parametrize("own_split", [False, True])
def test_question_is_never_among_its_own_examples(
    tasks: Path, rows: Path, tmp_path: Path, sampler: str, own_split: bool
) -> None:
    split = ", split: train" if own_split else ""
    (tasks / "say.yaml").write_text(SAY + f"fewshot_config: {{sampler: {sampler}{split}}}\n")
    (unit,) = units("say:8", tasks, tmp_path / "scratch", f"say={rows}")
    task = unit.tasks["say"]
    task.set_fewshot_seed(0)
    assert len(task.eval_docs) == 9
    for doc in task.eval_docs:
        asked = [line for line in task.fewshot_context(doc, 8).splitlines() if line.startswith("Question: ")]
        assert asked[-1] == f"Question: {doc['question']}"
        assert sorted(asked) == sorted(f"Question: {row['question']}" for row in ROWS)


@pytest.fixture
def read(tasks: Path) -> str:
    """A task that tells the slightest difference between two prompts, by name."""
    lines = [line for line in SAY.replace("task: say", "task: read").splitlines() if "generation" not in line]
    text = "\n".join(lines).replace("generate_until", "loglikelihood").replace("exact_match", "perplexity")
    (tasks / "read.yaml").write_text(text.replace("aggregation: mean", "aggregation: perplexity"))
    return "read"


def test_every_player_sees_the_same_examples(measure: Any, read: str, rows: Path, tmp_path: Path) -> None:
    """Measured one after the other, or alone."""
    both = measure(f"{read}:3", f"read={rows}", players=(START, 0))["tasks"]["read"]
    (tmp_path / "run" / "iteration-0" / "benchmarks.json").unlink()
    assert measure(f"{read}:3", f"read={rows}")["tasks"]["read"].value == pytest.approx(both.value, rel=1e-6)


def test_bootstrap_starts_no_processes(measure: Any, read: str, rows: Path, monkeypatch: Any) -> None:
    """They would take over how spinlm treats SIGTERM, by which their pool ends them."""

    def forbidden(*_: Any) -> Any:
        raise AssertionError("a pool of processes")

    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    monkeypatch.setattr(multiprocessing, "Pool", forbidden)
    score = measure(read, f"read={rows}")["tasks"]["read"]
    assert score.metric == "perplexity" and score.standard_error is not None and score.standard_error > 0


def test_examples_come_from_their_own_file(tasks: Path, rows: Path, tmp_path: Path) -> None:
    shots = write(tmp_path / "shots.jsonl", [row | {"question": f"Which is {n}?"} for n, row in enumerate(ROWS)])
    (unit,) = units("say:9", tasks, tmp_path / "scratch", f"say={rows}", f"say:fewshot={shots}")
    task = unit.tasks["say"]
    task.set_fewshot_seed(0)
    text = task.fewshot_context(task.eval_docs[0], 9)
    assert text.count("Which is ") == 9 and text.count("What is ") == 1


def test_fixed_examples_stay(tasks: Path, rows: Path, tmp_path: Path) -> None:
    (unit,) = units("fixed", tasks, tmp_path / "scratch", f"fixed={rows}")
    task = unit.tasks["fixed"]
    assert task.fewshot_context(task.eval_docs[0], 1).startswith(
        "Question: Is it fixed?\nAnswer: It is\n\nQuestion: What"
    )


# What can be wrong


def test_package_is_missing(monkeypatch: Any) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness_tasks, "version", missing)
    with pytest.raises(MissingPackageError, match=r"Run: pip install 'lm-eval>=0\.4\.13'$"):
        harness_tasks.harness_version()


@pytest.mark.parametrize(
    ("suite", "tasks", "message"),
    [
        ("open-llm", None, "there is no suite 'open-llm'. Did you mean open-llm-leaderboard?"),
        (None, "gsm8k,", "'' is no task. Write NAME or NAME:FEWSHOTS"),
        (None, "gsm8k:", "'gsm8k:' is no task"),
        (None, "gsm8k:5,gsm8k", "gsm8k is named twice"),
        ("big-bench", "gsm8k", "big-bench has no task 'gsm8k'; it has bbh_cot_fewshot_causal_judgement, "),
        ("open-llm-leaderboard", "gsm8k:1", "sets the few-shots itself. Leave :1 out"),
    ],
)
def test_what_is_asked_for_is_wrong(suite: str | None, tasks: str | None, message: str) -> None:
    with pytest.raises(RunError) as caught:
        wanted_tasks(suite, tasks)
    assert message in str(caught.value)


@pytest.mark.parametrize("given", ["choice", "=rows.jsonl", "choice=", "choice:train", "a choice=rows.jsonl"])
def test_task_data_is_malformed(given: str) -> None:
    with pytest.raises(RunError, match=r"cannot be read\. Write NAME=FILE\.jsonl"):
        local_data([given])


def test_task_data_files_that_cannot_be_used(rows: Path, tmp_path: Path) -> None:
    def message(*data: str) -> str:
        with pytest.raises((DataError, RunError)) as caught:
            local_data(data)
        return str(caught.value)

    empty, broken, table = (tmp_path / name for name in ("empty.jsonl", "broken.jsonl", "rows.csv"))
    empty.touch()
    broken.write_text('{"question": "What?"}\n{"quest\n')
    table.write_text("question\nWhat?\n")
    nothing = tmp_path / "nothing.jsonl"
    assert message(f"choice={nothing}") == f"{nothing}: no such file"
    assert message(f"choice={empty}") == f"{empty}: is empty"
    assert message(f"choice={broken}").startswith(f"{broken}, row 2: the line is not JSON: ")
    assert message(f"choice={write(broken, [3])}").startswith(f"{broken}, row 1: the row is a number, not an object")
    assert message(f"choice={table}").startswith(f"{table}: --task-data takes .jsonl files")
    assert "choice has two files for its questions" in message(f"choice={rows}", f"choice={rows}")
    assert "has few-shot examples and no questions. Add choice=" in message(f"choice:fewshot={rows}")
    some = write(tmp_path / "some.jsonl", [{"question": "New?"}, dict(reversed(ROWS[3].items()))])
    assert message(f"choice={rows}", f"choice:fewshot={some}").startswith(f"{some}: 1 of its rows are also questions")


def refused(names: str, tasks: Path | None, scratch: Path, *data: str) -> str:
    shutil.rmtree(scratch, ignore_errors=True)
    with pytest.raises((DataError, RunError)) as caught:
        open_units(wanted_tasks(None, names), local_data(data), tasks, scratch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tasks_that_cannot_be_loaded(tasks: Path, rows: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    unknown = "lm-evaluation-harness has no such task. Did you mean"
    assert refused("gsm8kk", None, scratch) == (
        f"gsm8kk: {unknown} gsm8k? Tasks of your own are found with --include-path"
    )
    assert refused("choise", tasks, scratch) == f"choise: {unknown} choice?"
    assert refused("choice", tasks, scratch, f"choice={rows}", f"other={rows}").startswith(
        "--task-data: other is not among what is measured (choice)."
    )
    message = refused("choice", tasks, scratch)
    assert message.startswith("choice: its dataset cannot be fetched (")
    assert message.endswith("give its examples: --task-data choice=FILE.jsonl")
    wrong = write(tmp_path / "wrong.jsonl", [{"problem": "What?"}])
    assert refused("choice", tasks, scratch, f"choice={wrong}").startswith(f"{wrong}: does not fit choice: ")


def test_few_shots_that_cannot_be_had(tasks: Path, rows: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    assert "choice: has no few-shots, its prompt is complete as it is. Leave :2 out" in refused(
        "choice:2", tasks, scratch, f"choice={rows}"
    )
    assert refused("say:9", tasks, scratch, f"say={rows}") == (
        "say: 9 few-shots cannot be drawn from 9 examples, of which one is the question itself"
    )
    assert refused("fixed:2", tasks, scratch, f"fixed={rows}") == "fixed: 2 few-shots cannot be drawn from 1 examples"
    local = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}"
    (tasks / "other.yaml").write_text(OTHER.replace("dataset_path: nobody/nowhere", local))
    message = refused("other", tasks, scratch)
    assert "would not keep a question out of its own examples. Set fewshot_split: test" in message
    assert "measure it without few-shots (other:0)" in message
    assert units("other:0", tasks, scratch)[0].name == "other"


def test_task_folders_that_cannot_be_used(tmp_path: Path, tasks: Path) -> None:
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    scratch = tmp_path / "scratch"
    assert refused("choice", nowhere, scratch) == f"--include-path {nowhere}: no such folder"
    assert refused("choice", empty, scratch) == f"--include-path {empty}: has no task files (*.yaml)"
    (tasks / "choice.yaml").write_text("task: [choice\nmetric: 3")
    assert refused("choice", tasks, scratch).startswith(f"{tasks / 'choice.yaml'}: not YAML: ")
    (tasks / "choice.yaml").write_text("- task: choice")
    assert refused("choice", tasks, scratch).startswith(f"{tasks / 'choice.yaml'}: not a task file")
    (tasks / "choice.yaml").write_text("task: choice\ninclude: nothing.yaml")
    assert refused("choice", tasks, scratch).startswith(f"{tasks / 'choice.yaml'}: lm-evaluation-harness cannot read")


def test_hub_that_is_not_there_is_given_up_at_once(monkeypatch: Any) -> None:
    import datasets
    from huggingface_hub import constants

    from spinlm.evals.lm_harness.measure import _give_up_on_a_hub_that_is_not_there

    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", here)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(proxy, raising=False)
        _give_up_on_a_hub_that_is_not_there()
        assert not constants.HF_HUB_OFFLINE
    _give_up_on_a_hub_that_is_not_there()
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
