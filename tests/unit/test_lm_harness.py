"""lm-evaluation-harness on the players of a run: the real harness, a tiny model, task YAMLs over local files."""

import json
import logging
import math
import multiprocessing
import random
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models import save_tiny_model, tiny_recipe
from spinlm.errors import MissingPackageError, RunError
from spinlm.evals.lm_harness import tasks as harness_tasks
from spinlm.evals.lm_harness.measure import HarnessOptions, run_lm_harness
from spinlm.evals.lm_harness.tasks import SUITES, TaskGroup, load_tasks, select_tasks
from spinlm.evals.scores import Score, read_scores, score_table
from spinlm.model.players import Players
from spinlm.model.run import Run
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START

# {folder} holds NAME.jsonl, the questions of the task.
CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: "{folder}/choice.jsonl"}, cache_dir: "{folder}/cache"}
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
OTHER = (
    CHOICE.replace("task: choice", "task: other")
    .replace("choice.jsonl", "other.jsonl")
    .replace("num_fewshot: 0", "num_fewshot: 2\nfewshot_split: test")
)
SAY = """\
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: "{folder}/say.jsonl"}, cache_dir: "{folder}/cache"}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
"""
FIXED = """\
include: say.yaml
task: fixed
fewshot_split: null
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
        (folder / f"{name}.yaml").write_text(text.replace("{folder}", str(folder)))
        write(folder / f"{name}.jsonl", ROWS)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


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

    def measure(names: str, players: tuple[int, ...] = (0,), **options: Any) -> dict[str, dict[str, Score]]:
        run_lm_harness(Run(recipe, run), players, HarnessOptions(tasks=names, include_path=tasks, **options))
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


def test_player_is_the_one_that_peft_loads(world: Any) -> None:
    """The same log-probabilities and the same greedy text, though our layers are fused and nothing is merged."""
    from lm_eval.api.instance import Instance

    from spinlm.evals.lm_harness.model import PlayerLM

    recipe, folder = world
    players = Players(recipe, RunDir(folder / "run"))
    model = PlayerLM(players, batch_size=3)
    questions = [f"What is {'one two three ' * n}?" for n in range(4)]
    found = {}
    for iteration in (START, 0):
        players.load(iteration)
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
def test_multiple_choice_score_is_that_of_the_plain_model(world: Any, measure: Any, iteration: int) -> None:
    model, tokenizer = plain(world, iteration), Players(*_recipe_and_run(world)).tokenizer
    right = []
    for row in ROWS:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        words = [
            tokenizer(f"Question: {row['question']}\nAnswer: {word}")["input_ids"][len(prompt) :] for word in WORDS
        ]
        values = [logprob(model, prompt, word) for word in words]
        right.append(values.index(max(values)) == row["answer"])
    share = sum(right) / 9
    score = measure("choice", players=(iteration,))["tasks"]["choice"]
    assert (score.value, score.metric, score.examples) == (pytest.approx(share), "acc", 9)
    assert score.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 8))


def _recipe_and_run(world: Any) -> tuple[Any, RunDir]:
    recipe, folder = world
    return recipe, RunDir(folder / "run")


def test_generated_responses_are_scored(world: Any, measure: Any, tasks: Path) -> None:
    """Half of the targets are what the plain player says."""
    model, tokenizer = plain(world, 0), Players(*_recipe_and_run(world)).tokenizer
    data = []
    for row in ROWS[:8]:
        ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        said = tokenizer.decode(whole, skip_special_tokens=True).split("\n\n")[0]
        data.append(row | {"choices": [said, "no"], "answer": int(len(data) % 2)})
    write(tasks / "say.jsonl", data)
    score = measure("say")["tasks"]["say"]
    assert (score.value, score.metric, score.examples) == (0.5, "exact_match", 8)


def test_response_ends_where_the_turn_ends(tmp_path: Path) -> None:
    """The token that ends a turn in Llama 3's template is not the tokenizer's EOS."""
    from lm_eval.api.instance import Instance

    from spinlm.evals.lm_harness.model import PlayerLM
    from spinlm.generation.base import Sampling
    from spinlm.generation.local import LocalEngine

    folder = save_tiny_model(tmp_path / "model", "phi", "llama3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.bias.data[4] = 4.0  # <|eot_id|>, after some tokens
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    recipe = tiny_recipe(folder)
    players = Players(recipe, RunDir(tmp_path / "run"))
    questions = [f"What is {n}?" for n in range(6)]
    rendered = [[{"role": "user", "content": question}] for question in questions]
    prompts = [players.renderer.prompt_ids(messages) for messages in rendered]
    sampling = Sampling.from_recipe(recipe, players.renderer.stop_ids, temperature=0.0, samples=1, max_new_tokens=10)
    engine = LocalEngine(players.logprobs, 6, False)
    expected = [response for (response,) in engine.generate(prompts, sampling, 0, lambda ended, tokens: None)]
    assert {response.finished for response in expected} == {True, False}
    harness = PlayerLM(players, batch_size=6)
    asked = [harness.apply_chat_template(messages) for messages in rendered]
    options = {"until": [], "max_gen_toks": 10, "do_sample": False}
    texts = harness.generate_until(
        [Instance("generate_until", {}, (text, dict(options)), n) for n, text in enumerate(asked)]
    )
    assert texts == [players.renderer.decode(response.token_ids) for response in expected]


def test_chat_template_is_applied_when_asked_for_and_noted(measure: Any) -> None:
    scores = [measure("choice", apply_chat_template=asked)["tasks"]["choice"] for asked in (False, True)]
    assert [score.settings["chat_template"] for score in scores] == [False, True]


def test_truncated_prompts_are_reported(measure: Any, tasks: Path, caplog: Any) -> None:
    """The tiny model takes 1024 tokens."""
    caplog.set_level(logging.INFO, "spinlm")
    write(tasks / "choice.jsonl", [row | {"question": "one two " * 600} for row in ROWS])
    measure("choice", limit=2)
    assert "some prompts of choice exceed the 1024 tokens" in caplog.text


# Scores


def test_scores_hold_their_settings(measure: Any) -> None:
    scores = measure("other", num_fewshot=1, limit=4)["tasks"]
    assert list(scores) == ["other", "other acc_norm"]
    settings = scores["other"].settings
    assert {key: settings[key] for key in ("num_fewshot", "limit", "chat_template", "precision", "task_version")} == {
        "num_fewshot": 1,
        "limit": 4,
        "chat_template": False,
        "precision": "float32",
        "task_version": 1.0,
    }
    assert scores["other"].examples == 4
    assert settings["lm_eval"] == harness_tasks.harness_version()


def test_the_same_is_not_measured_again(measure: Any, tasks: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "spinlm")
    first = measure("choice")
    assert "already measured" not in caplog.text
    assert measure("choice", batch_size=2) == first
    assert "iteration 0: choice was already measured with the same settings" in caplog.text
    caplog.clear()
    limited = measure("choice", limit=3)["tasks"]["choice"]
    assert limited.examples == 3
    edit(tasks / "choice.yaml", "Question: ", "Q: ")
    other = measure("choice", limit=3)["tasks"]["choice"]
    assert other.settings["definition"] != limited.settings["definition"]
    write(tasks / "choice.jsonl", ROWS[1:])
    changed = measure("choice", limit=3)["tasks"]["choice"]
    assert changed.settings["data"] != other.settings["data"]
    assert "already measured" not in caplog.text


def test_moved_data_is_the_same_data(measure: Any, tasks: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "spinlm")
    measure("choice")
    (tasks / "choice.jsonl").rename(tasks / "moved.jsonl")
    edit(tasks / "choice.yaml", "choice.jsonl", "moved.jsonl")
    measure("choice")
    assert "already measured" in caplog.text


def test_changed_fewshot_examples_are_other_data(measure: Any, tasks: Path) -> None:
    edit(tasks / "say.yaml", "{test: ", '{train: "' + str(tasks / "other.jsonl") + '", test: ')
    edit(tasks / "say.yaml", "fewshot_split: test", "fewshot_split: train")
    before = measure("say", num_fewshot=1, limit=1)["tasks"]["say"].settings["data"]
    write(tasks / "other.jsonl", [row | {"answer": 0} for row in ROWS])
    assert measure("say", num_fewshot=1, limit=1)["tasks"]["say"].settings["data"] != before
    without = measure("say", num_fewshot=0, limit=1)["tasks"]["say"].settings["data"]
    write(tasks / "other.jsonl", ROWS)
    assert measure("say", num_fewshot=0, limit=1)["tasks"]["say"].settings["data"] == without


def test_finished_scores_are_kept_when_a_later_task_fails(measure: Any, tasks: Path) -> None:
    (tasks / "bad.yaml").write_text((tasks / "say.yaml").read_text().replace("say", "bad"))
    edit(tasks / "bad.yaml", "{{choices[answer]}}", "{{odd[1]}}")
    write(tasks / "bad.jsonl", [row | {"odd": ["a", "b"][: 2 - (n > 3)]} for n, row in enumerate(ROWS)])
    with pytest.raises(RunError, match="bad: lm-evaluation-harness cannot measure it: "):
        measure("choice,bad")
    assert set(read_scores(RunDir(tasks.parent / "run"), 0)["tasks"]) == {"choice", "choice acc_norm"}


def test_group_is_the_mean_of_its_tasks(measure: Any, tasks: Path, caplog: Any) -> None:
    """Weighted by size, as the group's YAML says."""
    caplog.set_level(logging.INFO, "spinlm")
    write(tasks / "other.jsonl", ROWS[:5])
    scores = measure("both")
    first, second = (scores["tasks/both"][name] for name in ("choice", "other"))
    assert (first.examples, second.examples) == (9, 5)
    both = scores["tasks"]["both"]
    assert both.value == pytest.approx((9 * first.value + 5 * second.value) / 14)
    assert (both.examples, both.settings["task_version"]) == (14, "3.0")
    assert list(scores["tasks"]) == ["both"]
    assert measure("both") == scores
    assert "iteration 0: both was already measured with the same settings" in caplog.text


def test_examples_are_those_that_have_the_metric(measure: Any, tasks: Path) -> None:
    """A group of tasks with different metrics and few-shot numbers."""
    (tasks / "mixed.yaml").write_text(
        "group: mixed\ntask: [choice, fixed]\n"
        "aggregate_metric_list: [{metric: acc}, {metric: exact_match}]\nmetadata: {version: 1.0}\n"
    )
    write(tasks / "say.jsonl", ROWS[:4])
    scores = measure("mixed")
    acc, exact = scores["tasks"]["mixed"], scores["tasks"]["mixed exact_match"]
    assert (acc.metric, acc.value, acc.examples) == ("acc", scores["tasks/mixed"]["choice"].value, 9)
    assert (exact.metric, exact.value, exact.examples) == ("exact_match", scores["tasks/mixed"]["fixed"].value, 4)
    assert acc.settings["num_fewshot"] == [0, 1]


def test_choices_that_are_shuffled_when_loaded_have_one_order(tasks: Path) -> None:
    """As those of GPQA: two players may be measured by two commands."""
    (tasks / "shuffle.py").write_text(
        "import random\n\n\ndef process_docs(dataset):\n"
        "    return dataset.map(lambda row: {'answer': random.randrange(4)}, load_from_cache_file=False)\n"
    )
    with (tasks / "choice.yaml").open("a") as file:
        file.write("process_docs: !function shuffle.process_docs\n")
    orders = []
    for seed in (1, 2):
        random.seed(seed)
        (group,) = load("choice", tasks)
        orders.append([doc["answer"] for doc in group.tasks["choice"].eval_docs])
    assert orders[0] == orders[1]


def test_suites_are_those_of_the_paper() -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager().task_index
    assert [spec.name for suite in SUITES.values() for spec in suite.tasks if spec.name not in known] == []
    assert {spec.name: spec.num_fewshot for spec in SUITES["open-llm-leaderboard"].tasks} == {
        "arc_challenge": 25,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
        "hellaswag": 10,
        "mmlu": 5,
    }
    assert {spec.name for spec in SUITES["leaderboard-v2"].tasks} == set(known["leaderboard"].cfg["task"])


def local_task(name: str, path: str, files: dict[str, Path], **changes: Any) -> None:
    """Write a YAML that includes the harness's own and names local files."""
    import lm_eval

    folder = next(iter(files.values())).parent
    config = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file) for split, file in files.items()},
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config | changes))


def test_gsm8k_of_the_harness_on_local_files(measure: Any, tasks: Path) -> None:
    """Without a network. The suite measures it."""
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(9)]
    files = {"test": write(tasks / "test.jsonl", rows[:2]), "train": write(tasks / "train.jsonl", rows[2:])}
    local_task("gsm8k", "gsm8k/gsm8k.yaml", files)
    score = measure("gsm8k", suite="open-llm-leaderboard", limit=1)["open-llm-leaderboard"]["gsm8k"]
    assert (score.metric, score.examples, score.settings["num_fewshot"]) == ("exact_match,strict-match", 1, 5)


# IFEval and MATH


@pytest.fixture
def ifeval(tasks: Path, punkt: Path, monkeypatch: Any) -> None:
    """IFEval's own task over four prompts with six instructions."""
    monkeypatch.setattr("nltk.data.path", [str(punkt)])
    no_comma, lowercase = ("punctuation:no_comma", {}), ("change_case:english_lowercase", {})
    words = ("length_constraints:number_words", {"relation": "at least", "num_words": 3})
    sentences = ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3})
    json_format = ("detectable_format:json_format", {})
    rows = [
        {"key": key, "prompt": f"Task {key}", "instruction_id_list": list(names), "kwargs": list(kwargs)}
        for key, (names, kwargs) in enumerate(
            zip(*instructions, strict=True)
            for instructions in ([no_comma], [lowercase, words], [sentences, no_comma], [json_format])
        )
    ]
    local_task("ifeval", "ifeval/ifeval.yaml", {"train": write(tasks / "prompts.jsonl", rows)})


def say(monkeypatch: Any, *responses: str) -> list[str]:
    """Let players give these responses, in turn; return the list that will hold the prompts."""
    from spinlm.evals.lm_harness.model import PlayerLM

    prompts: list[str] = []
    left = iter(responses)

    def generate_until(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        return [next(left) for _ in requests]

    monkeypatch.setattr(PlayerLM, "generate_until", generate_until)
    return prompts


def test_ifeval_reports_four_accuracies(measure: Any, ifeval: None, monkeypatch: Any, tmp_path: Path) -> None:
    """Strict: the prompts 1 and 2; of the instructions all but `no_comma` of the third and `json_format`.

    Loose: the last response is JSON without its first line. The standard error of a mean of n zeros and ones is
    √(p (1 − p) / (n − 1)). The harness has none for the accuracies of instructions.
    """
    good = ("No commas here.", "all lower case", "One, two. Three.", 'Sure:\n{"a": 1}')
    prompts = say(monkeypatch, *good, *["Yes, A"] * 3, "{}")
    measure("ifeval", suite="ifeval", players=(START, 0))
    table = score_table(RunDir(tmp_path / "run"), (START, 0), "ifeval")
    assert table.titles == ["ifeval", "metric", "examples", "start", "iteration 0"]
    assert table.rows == [
        ["ifeval", "prompt_level_strict_acc", "4", "0.500 ± 0.289", "0.250 ± 0.250"],
        ["ifeval", "inst_level_strict_acc", "4", "0.667", "0.333"],
        ["ifeval", "prompt_level_loose_acc", "4", "0.750 ± 0.250", "0.250 ± 0.250"],
        ["ifeval", "inst_level_loose_acc", "4", "0.833", "0.333"],
    ]
    assert table.caption == ""
    assert prompts[0].endswith("user\nTask 0<|im_end|>\n<|im_start|>assistant\n")


def test_suites_of_the_second_leaderboard_use_the_chat_template(measure: Any, ifeval: None, monkeypatch: Any) -> None:
    prompts = say(monkeypatch, *["No."] * 8)
    kept = measure("ifeval", suite="ifeval")["ifeval"]["ifeval"]
    assert kept.settings["chat_template"] is True
    plain = measure("ifeval", suite="ifeval", apply_chat_template=False)["ifeval"]["ifeval"]
    assert plain.settings["chat_template"] is False
    assert prompts[4:] == ["Task 0", "Task 1", "Task 2", "Task 3"]


def test_data_of_nltk_is_missing(tasks: Path, ifeval: None, monkeypatch: Any) -> None:
    """Found out before any response is generated."""
    monkeypatch.setattr("nltk.data.path", [str(tasks)])
    message = refused("ifeval", tasks)
    assert message.startswith("ifeval: IFEval needs NLTK's data punkt_tab") and "NLTK_DATA" in message


def test_package_of_a_task_is_missing(tasks: Path, ifeval: None, monkeypatch: Any) -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(MissingPackageError, match=r"^ifeval: .*langdetect.*pip install 'lm-eval\[ifeval,math\]>=0"):
        load("ifeval", tasks)


def test_math_of_the_harness_on_local_files(measure: Any, tasks: Path, monkeypatch: Any) -> None:
    """Two problems of level 5; the answers are compared as mathematics. A third problem is too easy to count."""
    rows = [
        {"problem": "Half of 1?", "level": "Level 5", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        {"problem": "Twice 3?", "level": "Level 5", "solution": "It is $\\boxed{6}$."},
        {"problem": "1 + 1?", "level": "Level 1", "solution": "It is $\\boxed{2}$."},
    ]
    files = {"test": write(tasks / "test.jsonl", rows), "train": write(tasks / "train.jsonl", rows)}
    name = "leaderboard_math_algebra_hard"
    local_task(name, "leaderboard/math/math_algebra.yaml", files)
    prompts = say(monkeypatch, " Final Answer: The final answer is $0.5$. I hope it is correct.", " It is 7.")
    scores = measure(name)["tasks"]
    assert (scores[name].value, scores[name].metric, scores[name].examples) == (0.5, "exact_match", 2)
    assert scores[name].settings["num_fewshot"] == 4
    assert prompts[0].count("Problem:") == 5


# Few-shot examples


def load(names: str, tasks: Path | None, num_fewshot: int | None = None) -> list[TaskGroup]:
    return load_tasks(select_tasks(None, names, num_fewshot), tasks)


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_question_is_never_among_its_own_examples(tasks: Path, sampler: str) -> None:
    with (tasks / "say.yaml").open("a") as file:
        file.write(f"fewshot_config: {{sampler: {sampler}}}\n")
    (group,) = load("say", tasks, 8)
    task = group.tasks["say"]
    task.set_fewshot_seed(0)
    assert len(task.eval_docs) == 9
    for doc in task.eval_docs:
        lines = [line for line in task.fewshot_context(doc, 8).splitlines() if line.startswith("Question: ")]
        assert lines[-1] == f"Question: {doc['question']}"
        assert sorted(lines) == sorted(f"Question: {row['question']}" for row in ROWS)


@pytest.fixture
def read(tasks: Path) -> str:
    """The name of a task whose score shows the slightest difference between two prompts."""
    lines = [line for line in SAY.replace("say", "read").splitlines() if "generation" not in line]
    text = "\n".join(lines).replace("generate_until", "loglikelihood").replace("exact_match", "perplexity")
    text = text.replace("aggregation: mean", "aggregation: perplexity").replace("{folder}", str(tasks))
    (tasks / "read.yaml").write_text(text)
    write(tasks / "read.jsonl", ROWS)
    return "read"


def test_every_player_sees_the_same_examples(measure: Any, read: str, tmp_path: Path) -> None:
    """Measured one after the other, or alone."""
    both = measure(read, num_fewshot=3, players=(START, 0))["tasks"]["read"]
    (tmp_path / "run" / "iteration-0" / "benchmarks.json").unlink()
    assert measure(read, num_fewshot=3)["tasks"]["read"].value == pytest.approx(both.value, rel=1e-6)


def test_bootstrap_starts_no_processes(measure: Any, read: str, monkeypatch: Any) -> None:
    """A process pool would inherit the SIGTERM handler of spinlm, and would not end."""

    def forbidden(*_: Any) -> Any:
        raise AssertionError("a pool of processes")

    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    monkeypatch.setattr(multiprocessing, "Pool", forbidden)
    score = measure(read)["tasks"]["read"]
    assert score.metric == "perplexity" and score.standard_error is not None and score.standard_error > 0


def test_fixed_examples_are_used(tasks: Path) -> None:
    (group,) = load("fixed", tasks)
    task = group.tasks["fixed"]
    assert task.fewshot_context(task.eval_docs[0], 1).startswith(
        "Question: Is it fixed?\nAnswer: It is\n\nQuestion: What"
    )


# Errors


def test_package_is_missing(monkeypatch: Any) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness_tasks, "version", missing)
    with pytest.raises(MissingPackageError, match=r"pip install 'lm-eval\[ifeval,math\]>=0\.4\.13'$"):
        harness_tasks.harness_version()


@pytest.mark.parametrize(
    ("suite", "tasks", "num_fewshot", "message"),
    [
        (None, None, None, "--suite"),
        ("open-llm", None, None, "Did you mean open-llm-leaderboard?"),
        (None, "gsm8k,", None, "empty"),
        (None, "gsm8k, gsm8k", None, "repeated"),
        ("big-bench", "gsm8k", None, "no task 'gsm8k'. Its tasks: bbh_cot_fewshot_causal_judgement, "),
        ("open-llm-leaderboard", "gsm8k", 1, "--num-fewshot"),
    ],
)
def test_selection_is_wrong(suite: str | None, tasks: str | None, num_fewshot: int | None, message: str) -> None:
    with pytest.raises(RunError) as caught:
        select_tasks(suite, tasks, num_fewshot)
    assert message in str(caught.value)


def refused(names: str, tasks: Path | None, num_fewshot: int | None = None) -> str:
    with pytest.raises(RunError) as caught:
        load(names, tasks, num_fewshot)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tasks_that_cannot_be_loaded(tasks: Path, monkeypatch: Any) -> None:
    message = refused("gsm8kk,choice", tasks)
    assert message.startswith("gsm8kk: ") and "Did you mean gsm8k?" in message and str(tasks) in message
    write(tasks / "choice.jsonl", [])
    assert refused("choice", tasks).startswith("choice: ")
    (tasks / "choice.jsonl").unlink()
    message = refused("choice", tasks)
    assert message.startswith("choice: cannot load the dataset (") and "--include-path" in message


def test_dataset_of_the_hub_without_a_network(tasks: Path, monkeypatch: Any) -> None:
    """The offline mode of the hub's libraries."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    edit(tasks / "choice.yaml", "dataset_path: json", "dataset_path: nobody/nowhere")
    assert refused("choice", tasks).startswith("choice: cannot load the dataset (")


def test_numbers_of_examples_that_are_impossible(tasks: Path, measure: Any) -> None:
    assert refused("choice", tasks, 2).startswith("choice: this task takes no few-shot examples")
    with pytest.raises(RunError, match=r"^say: "):
        measure("say", num_fewshot=9)  # of 9 rows, one is the question
    edit(tasks / "other.yaml", "fewshot_split: test", "")
    message = refused("other", tasks)
    assert message.startswith("other: ") and "fewshot_split: test" in message and "--num-fewshot 0" in message
    assert load("other", tasks, 0)[0].name == "other"


def test_include_path_that_cannot_be_used(tmp_path: Path, tasks: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert refused("choice", nowhere) == f"--include-path {nowhere}: no such folder"
    (tasks / "choice.yaml").write_text("task: [choice\nmetric: 3")
    assert refused("choice", tasks).startswith("choice: lm-evaluation-harness has no such task")
