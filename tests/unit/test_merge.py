"""Whole models made from players: the same log-probabilities, and the base's own files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import save_adapter, save_tiny_model, tiny_recipe
from spinlm.errors import ModelError, RunError
from spinlm.export.player import export
from spinlm.model.base_files import safetensors_header, stored_dtype, use_legacy_names
from spinlm.model.base_model import model_fingerprint
from spinlm.model.logprobs import plain_logprob
from spinlm.model.merge import merge_to_folder, save_for_serving, save_whole_player
from spinlm.model.players import Players
from spinlm.recipe.model import Lora, Model
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json, write_json

SAMPLES = [([1, 40, 41, 42], [50, 60, 70, 80, 2]), ([1, 90, 91], [100, 44, 45, 46])]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {  # architecture, target modules, changes
    "qwen2, tied, embeddings trained": ("qwen2", ["q_proj", "embed_tokens"], {"tie_word_embeddings": True}),
    "qwen2, tied": ("qwen2", "all-linear", {"tie_word_embeddings": True}),
    "llama": ("llama", "all-linear", {}),
    "gemma3": ("gemma3_text", "all-linear", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
    "mixtral": ("mixtral", "all-linear", {}),
    "gpt2, embeddings trained": ("gpt2", ["c_attn", "wte"], {}),
    "phi3": ("phi3", "all-linear", SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 256}),
}


def randomize(model: Any) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "embedding_" in name:
                parameter.normal_(std=0.1)


def as_version_4(base: Path) -> Path:
    """Rewrite what transformers 5 saved as version 4 does, and add files that it would lose."""
    use_legacy_names(base)
    for name in ("tokenizer.model", "LICENSE", "NOTICE.txt"):
        (base / name).write_text(f"the {name} of the base")
    (base / "preprocessor_config.json").write_text('{"image_size": 8}')
    (base / "train.jsonl").write_text("private")
    config = json.loads((base / "config.json").read_text()) | {"transformers_version": "4.57.6", "own_key": 1}
    (base / "config.json").write_text(json.dumps(config, indent=4))
    return base


def cast(base: Path, dtype: torch.dtype) -> Path:
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    return base


def tensors(folder: Path) -> dict[str, str]:
    """Names and precisions of the weights on disk."""
    header = safetensors_header(folder / "model.safetensors")
    return {name: tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}


def nats_per_token(one: Any, other: Any) -> float:
    """The largest difference between two models."""
    return max(abs(plain_logprob(one, *s) - plain_logprob(other, *s)) / len(s[1]) for s in SAMPLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_equals_base_and_adapter(family: str, tmp_path: Path) -> None:
    architecture, targets, changes = FAMILIES[family]
    base = save_tiny_model(tmp_path / "base", architecture, **changes)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=targets)
    merge_to_folder(Model(path=str(base)), str(base), adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    player = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    assert nats_per_token(merged, player) < 1e-5
    assert nats_per_token(plain, player) > 1e-2
    # The embeddings are untied only where the adapter changes one of them.
    untied = "embeddings trained" in family
    assert set(tensors(tmp_path / "merged")) == set(tensors(base)) | ({"lm_head.weight"} if untied else set())
    config = (tmp_path / "merged" / "config.json").read_bytes()
    assert (config == (base / "config.json").read_bytes()) == (not untied)


@pytest.mark.parametrize("variant", ["use_dora", "use_rslora", "modules_to_save"])
def test_variants_of_adapters(variant: str, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    options = {variant: ["embed_tokens"] if variant == "modules_to_save" else True}
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], **options)
    merge_to_folder(Model(path=str(base)), str(base), adapter, tmp_path / "merged")
    player = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    assert nats_per_token(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), player) < 1e-5


def players(base: Path, run: Path, **sections: Any) -> Players:
    """Players whose player of iteration 0 is saved, and differs from the base."""
    made = Players(tiny_recipe(base, **sections), RunDir(run))
    randomize(made.model)
    if "lora" not in sections:
        with torch.no_grad():
            made.model.get_input_embeddings().weight[40:60] += 0.1
    made.mark_modified()
    made.save(0)
    return made


LORA = {"lora": {"r": 4, "alpha": 8}}


@pytest.mark.parametrize("sections", [LORA, {}], ids=["merged", "full fine-tuning"])
def test_the_files_of_the_base_are_copied(sections: dict[str, Any], tmp_path: Path) -> None:
    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    base = as_version_4(save_tiny_model(tmp_path / "base", "llama", rope_parameters=rope))
    save_whole_player(players(base, tmp_path / "run", **sections), 0, tmp_path / "whole")
    same = {path.name for path in base.iterdir()} - {"model.safetensors", "generation_config.json", "train.jsonl"}
    assert {path.name for path in (tmp_path / "whole").iterdir()} == same | {
        "model.safetensors",
        "generation_config.json",
    }
    for name in same:
        assert (tmp_path / "whole" / name).read_bytes() == (base / name).read_bytes(), name
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["rope_theta"] == 500000 and "rope_parameters" not in config
    assert (
        json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


def test_an_adapter_has_the_tokenizer_files_of_the_base(tmp_path: Path) -> None:
    base = as_version_4(save_tiny_model(tmp_path / "base"))
    player = players(base, tmp_path / "run", **LORA).folder.player(0)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        assert (player / name).read_bytes() == (base / name).read_bytes(), name
    assert not (player / "config.json").exists()


def test_the_chat_template_of_the_recipe_is_read_by_old_and_new_versions(tmp_path: Path) -> None:
    base = as_version_4(save_tiny_model(tmp_path / "base"))
    (base / "chat_template.json").write_text('{"chat_template": "of the base"}')
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    made = players(base, tmp_path / "run", data={"path": "d", "chat_template": template}, **LORA)
    save_whole_player(made, 0, tmp_path / "whole")
    assert (tmp_path / "whole" / "chat_template.jinja").read_text() == template
    assert json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text())["chat_template"] == template
    assert not (tmp_path / "whole" / "chat_template.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template == template


@pytest.mark.parametrize("sections", [LORA, {}], ids=["merged", "full fine-tuning"])
def test_precisions(sections: dict[str, Any], tmp_path: Path) -> None:
    """A merge has the precision of the base's files, also where the run computes in float32."""
    base = cast(save_tiny_model(tmp_path / "base"), torch.bfloat16)
    made = players(base, tmp_path / "run", **sections)
    player = made.folder.player(0)
    if sections:
        player = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(player))
    else:
        assert stored_dtype(player) == "float32"
        player = AutoModelForCausalLM.from_pretrained(player, dtype=torch.float32)
    own = "bfloat16" if sections else "float32"
    for dtype, bound in ((None, 0.05), ("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.05)):
        target = tmp_path / f"whole-{dtype}"
        save_whole_player(made, 0, target, dtype)
        assert set(tensors(target).values()) == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype or own]}
        assert json.loads((target / "config.json").read_text())["dtype"] == (dtype or own)
        merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        assert nats_per_token(merged, player.eval()) < bound
    # Rounded once: the bfloat16 weights are those of the float32 merge, rounded.
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"whole-{dtype}", dtype=torch.float32).state_dict()
        for dtype in ("float32", "bfloat16")
    )
    assert all(torch.equal(exact[name].bfloat16().float(), rounded[name]) for name in exact)


def test_precision_of_a_merge_over_a_merged_start(tmp_path: Path) -> None:
    """The run holds its base in float32; the adapter that it began with belongs to a bfloat16 base."""
    base = cast(save_tiny_model(tmp_path / "base"), torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    lora = {"lora": {"r": 2, "alpha": 4, "create_new_adapter": True}}
    made = players(adapter, tmp_path / "run", model={"base": str(base)}, **lora)
    save_whole_player(made, 0, tmp_path / "whole")
    assert set(tensors(tmp_path / "whole").values()) == {"BF16"}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("sections", [LORA, {}], ids=["merged", "full fine-tuning"])
def test_a_model_that_differs_from_its_player_is_refused(sections: dict[str, Any], tmp_path: Path) -> None:
    """A weight that float16 cannot hold makes every log-probability NaN."""
    base = save_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e6)
    model.save_pretrained(base)
    made = players(base, tmp_path / "run", **sections)
    with pytest.raises(ModelError, match=r"differs from the player by nan nats per token"):
        save_whole_player(made, 0, tmp_path / "whole", "float16")
    assert not (tmp_path / "whole").exists()


def test_files_that_do_not_fit_the_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config in which another rotation of positions is written: a silently different model."""
    base = save_tiny_model(tmp_path / "base")
    made = players(base, tmp_path / "run", **LORA)
    made.load(0)
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10.0
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"differs from the player by 0\.\d+ nats per token; rounding"):
        save_for_serving(made, 0, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_hand_over_to_a_server_has_the_files_of_the_base_and_the_sampling_of_the_recipe(tmp_path: Path) -> None:
    base = as_version_4(save_tiny_model(tmp_path / "base"))
    sampling = {"opponent": {"temperature": 0.7, "top_p": 0.9}}
    for sections in (LORA, {}):
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
        save_for_serving(
            players(base, tmp_path / f"run-{len(sections)}", **sampling, **sections), 0, tmp_path / "whole"
        )
        for name in ("config.json", "tokenizer_config.json", "tokenizer.model"):
            assert (tmp_path / "whole" / name).read_bytes() == (base / name).read_bytes(), name
        defaults = json.loads((tmp_path / "whole" / "generation_config.json").read_text())
        assert (defaults["temperature"], defaults["top_p"], defaults["top_k"]) == (0.7, 0.9, 0)


def test_a_base_whose_generation_config_transformers_refuses_to_save(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 2}')
    for sections in (LORA, {}):
        made = players(base, tmp_path / f"run-{len(sections)}", **sections)
        save_whole_player(made, 0, tmp_path / f"whole-{len(sections)}")
        config = json.loads((tmp_path / f"whole-{len(sections)}" / "generation_config.json").read_text())
        assert config == {"do_sample": False, "temperature": 0.6, "eos_token_id": [2]}


def test_names_of_version_4(tmp_path: Path) -> None:
    """A model that transformers 5 has saved is read by both versions after the renaming."""
    rope = {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}
    base = save_tiny_model(tmp_path / "base", "llama", rope_parameters=rope)
    before = AutoModelForCausalLM.from_pretrained(base).eval()
    use_legacy_names(base)
    config = json.loads((base / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, {"rope_type": "linear", "factor": 2.0})
    assert config["torch_dtype"] == "float32" and not {"dtype", "rope_parameters"} & set(config)
    assert nats_per_token(AutoModelForCausalLM.from_pretrained(base).eval(), before) == 0
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["chat_template"] == AutoTokenizer.from_pretrained(base).chat_template


def test_exports_after_the_run_or_the_base_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinlm.export.player.render_card", lambda *arguments, **options: "")
    model, folder = save_tiny_model(tmp_path / "model"), RunDir(tmp_path / "run")
    players = Players(tiny_recipe(model, lora={"target_modules": ["q_proj"]}), folder)
    players.save(START)
    write_json(folder.provenance, {"inputs": {"model": model_fingerprint(players.recipe.model, {})}})
    export(players.recipe, folder, START, tmp_path / "whole", merge=True)
    merges = players.recipe.model.model_copy(update={"path": str(folder.player(START)), "base": str(model)})
    recipe = players.recipe.model_copy(
        update={"model": merges, "lora": Lora(create_new_adapter=True, target_modules=["v_proj"])}
    )
    Players(recipe, RunDir(tmp_path / "second")).save(START)
    moved = RunDir((tmp_path / "second").rename(tmp_path / "moved"))
    export(recipe, moved, START, tmp_path / "adapter")
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(moved.base)
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] * 1.1}, model / "model.safetensors")
    with pytest.raises(RunError, match=r"base model .* has changed since this run began:\n  model\.safetensors: was"):
        export(players.recipe, folder, START, tmp_path / "other", merge=True)
    export(recipe, moved, START, tmp_path / "base-in-the-run", merge=True)
