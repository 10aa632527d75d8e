"""Model folders that cannot be played with: the message says what they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from models import save_tiny_model, tiny_recipe
from spinlm.errors import ModelError
from spinlm.model.run import Run
from spinlm.rundir.layout import RunDir
from tiny import tiny_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def loading_error(folder: Path) -> str:
    """The message of loading the tokenizer and the model, which names the folder."""
    with pytest.raises(ModelError) as caught, Run(tiny_recipe(folder, lora={}), RunDir(folder.parent / "run")) as run:
        assert run.players.tokenizer is not None and run.players.renderer.stop_ids
        assert run.players.model is not None
    assert str(caught.value).startswith(f"{folder}")
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda n: LlamaForSequenceClassification(LlamaConfig(vocab_size=n, **SMALL)),
            "a classifier or a reward model",
        ),
        (lambda n: BertForMaskedLM(BertConfig(vocab_size=n, **SMALL)), "BertForMaskedLM is an encoder"),
        (
            lambda n: T5ForConditionalGeneration(
                T5Config(vocab_size=n, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=8)
            ),
            "an encoder with a decoder",
        ),
        (
            lambda n: CLIPModel(
                CLIPConfig(text_config={"vocab_size": n, **SMALL}, vision_config={**SMALL, "image_size": 32})
            ),
            "without a language model head",
        ),
    ],
)
def test_other_kinds_of_models(tmp_path: Path, make: Any, words: str) -> None:
    tokenizer = tiny_tokenizer()
    make(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    message = loading_error(tmp_path / "model")
    assert words in message and "not a causal language model" in message


def test_a_checkpoint_that_lacks_weights(folder: Path) -> None:
    """transformers would fill in random ones: here the output head."""
    model = LlamaForCausalLM.from_pretrained(folder)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "lack 1 weights of the model (lm_head.weight)" in loading_error(folder)


def test_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 9\n")
    assert "git lfs pull" in loading_error(folder)


def test_weights_that_are_cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "damaged or incomplete" in loading_error(folder)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        path.unlink()
    assert "the folder has none" in loading_error(folder)


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "weights.safetensors")
    assert "Set model.path to the folder" in loading_error(folder.parent / "weights.safetensors")
    assert "Set model.path to the folder" in loading_error(folder / "config.json")


def test_a_model_that_this_transformers_does_not_know(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama9"}))
    assert "`llama9`" in loading_error(folder)
