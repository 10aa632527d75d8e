"""The suite `leaderboard-v2` from end to end: the harness's own tasks, with miniature data sets of a stand-in hub."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from commands import Cli, Request, Result, serving
from hub import TOKEN, Hub
from runs import RECIPE, rows, write_rows
from safetensors.torch import load_file, save_file

from models import save_tiny_model

TASKS = Path(lm_eval.__file__).parent / "tasks" / "leaderboard"
INCORRECT = {f"Incorrect Answer {n}": text for n, text in ((1, "red"), (2, "green"), (3, "blue"))}


def configurations(folder: str) -> list[str]:
    """Return the configurations of a data set that the tasks in a folder name."""
    lines = [line for path in sorted((TASKS / folder).glob("*.yaml")) for line in path.read_text().splitlines()]
    return [line.split(": ")[1] for line in lines if line.startswith("dataset_name: ")]


def commit(hub: Hub, name: str, rows: dict[tuple[str, str], list[dict[str, Any]]], form: str = "jsonl") -> None:
    """Add a data set to the hub: rows by configuration and split, with the card that names the files."""
    files, configs = {}, {}
    for (config, split), content in rows.items():
        text = io.StringIO()
        if form == "csv":
            writer = csv.DictWriter(text, content[0])
            writer.writeheader()
            writer.writerows(content)
        else:
            text.writelines(json.dumps(row) + "\n" for row in content)
        files[f"{config}/{split}.{form}"] = text.getvalue().encode()
        configs.setdefault(config, []).append({"split": split, "path": f"{config}/{split}.{form}"})
    card = yaml.safe_dump({"configs": [{"config_name": key, "data_files": value} for key, value in configs.items()]})
    hub.commit(f"datasets/{name}", files | {"README.md": f"---\n{card}---\n".encode()})


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    prompt = {"instruction_id_list": ["keywords:forbidden_words"], "kwargs": [{"forbidden_words": ["zebra"]}]}
    prompts = [{"key": n, "prompt": f"What is {n}?"} | prompt for n in range(2)]
    commit(hub, "wis-k/instruction-following-eval", {("default", "train"): prompts})
    question = {"input": "What is it?", "target": "(A)"}
    targets = {"boolean_expressions": "True", "formal_fallacies": "valid", "object_counting": "3"}
    targets |= dict.fromkeys(("causal_judgement", "navigate", "web_of_lies"), "Yes") | {"sports_understanding": "yes"}
    names = configurations("bbh_mc")
    commit(hub, "SaylorTwift/bbh", {(n, "test"): [question | {"target": targets.get(n, "(A)")}] * 2 for n in names})
    problem = {"problem": "Half of 2?", "level": "Level 5", "solution": "It is $\\boxed{1}$.", "type": "Algebra"}
    splits = [(name, split) for name in configurations("math") for split in ("train", "test")]
    commit(hub, "DigitalLearningGmbH/MATH-lighteval", {split: [problem] * 2 for split in splits})
    science = {"Question": "Which?", "Correct Answer": "white", **INCORRECT}
    commit(hub, "Idavidrein/gpqa", {(n, "train"): [science] * 2 for n in configurations("gpqa")}, "csv")
    hub.repos["datasets/Idavidrein/gpqa"].gated = True
    story = {"narrative": "It rains.", "question": "Who?", "choices": "['Ann', 'Bob']", "answer_choice": "Ann"}
    stories = ("murder_mysteries", "object_placements", "team_allocation")
    commit(hub, "TAUR-Lab/MuSR", {("default", split): [story] * 2 for split in stories}, "csv")
    choice = {"question": "What?", "options": ["a", "b", "c"], "answer": "B", "answer_index": 1, "category": "math"}
    commit(hub, "TIGER-Lab/MMLU-Pro", {("default", "validation"): [choice] * 6, ("default", "test"): [choice] * 2})
    yield hub


@pytest.fixture(scope="module")
def online(hub: Hub, punkt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Request]:
    with serving(**hub.environment(tmp_path_factory.mktemp("cache"), NLTK_DATA=str(punkt))) as ask:
        yield ask


@pytest.fixture(scope="module")
def run(online: Request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a model with room for the suite's prompts, whose responses end soon."""
    folder = tmp_path_factory.mktemp("run")
    model = save_tiny_model(folder / "model", "phi", max_position_embeddings=8192)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.bias"][2] += 4.0  # the token that ends a response
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    write_rows(folder / "data.jsonl", rows())
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    small = ("data.prompts=4", "data.heldout=4", "sft=null", "selfplay.iterations=1", "train.epochs=1")
    Cli(online, folder / "streams")("run", "recipe.yaml", *small, "--run-dir", "run", folder=folder)
    return folder / "run"


@pytest.fixture
def benchmark(online: Request, tmp_path: Path) -> Callable[..., Result]:
    """Measure the suite on a run."""
    return partial(Cli(online, tmp_path), "benchmark", "--suite", "leaderboard-v2", folder=tmp_path)


def test_gated_data_set(benchmark, reference):
    """This test comes first: a data set that was loaded is in the cache."""
    refused = benchmark(reference, "--tasks", "leaderboard_gpqa", code=2)
    assert refused.message.startswith("leaderboard_gpqa: Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.")
    assert "hf auth login" in refused.message and "--tasks" in refused.message


@pytest.mark.slow
def test_whole_suite(benchmark, run):
    result = benchmark(run, "--iteration", "start,0", HF_TOKEN=TOKEN)
    lines = [line.split()[:3] for line in result.out.splitlines() if line.startswith(" leaderboard_")]
    assert lines == [
        *(
            ["leaderboard_ifeval", f"{level}_level_{kind}_acc", "2"]
            for kind in ("strict", "loose")
            for level in ("prompt", "inst")
        ),
        ["leaderboard_bbh", "acc_norm", "48"],
        ["leaderboard_math_hard", "exact_match", "14"],
        ["leaderboard_gpqa", "acc_norm", "6"],
        ["leaderboard_musr", "acc_norm", "6"],
        ["leaderboard_mmlu_pro", "acc", "2"],
    ]
    assert "Raw scores of lm-eval." in result.out
    kept = json.loads((run / "start" / "benchmarks.json").read_text())
    assert {
        name: score["settings"]["num_fewshot"] for name, score in kept["leaderboard-v2"].items() if " " not in name
    } == {
        "leaderboard_ifeval": 0,
        "leaderboard_bbh": 3,
        "leaderboard_math_hard": 4,
        "leaderboard_gpqa": 0,
        "leaderboard_musr": 0,
        "leaderboard_mmlu_pro": 5,
    }
    assert len(kept["leaderboard-v2/leaderboard_bbh"]) == 24
    assert all(score["settings"]["chat_template"] for score in kept["leaderboard-v2"].values())
