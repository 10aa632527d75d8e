"""Runs that start from a PEFT adapter, and variants of LoRA."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import load_player, naive_logprob, save_adapter, save_tiny_model, tiny_recipe
from spinlm.errors import ModelError, RecipeError
from spinlm.model.base_model import model_fingerprint
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree
from spinlm.plan import make_plan
from spinlm.plan.model_shape import find_shape
from spinlm.recipe.adapter import with_adapter
from spinlm.recipe.load import as_yaml, load_recipe, parse_recipe
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json

TREES = [PrefixTree([5, 6, 7, 8], ([9, 10, 11], [12, 13])), PrefixTree([20, 21], ([22], [23, 24, 25]))]
RESPONSES = [(tree.prompt, response) for tree in TREES for response in tree.responses]

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.1},
    "regular expression": {"target_modules": r".*layers\.[01]\.self_attn\.(q|k)_proj"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 16},
        "layers_to_transform": [0, 2],
    },
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def save(architecture: str = "llama", **changes: Any) -> Path:
        name = f"{architecture}{changes}"
        if name not in folders:
            folders[name] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **changes)
        return folders[name]

    return save


def resolved(adapter: Path, **sections: Any) -> Recipe:
    return with_adapter(tiny_recipe(adapter, **sections))


def own_logprobs(model: Any) -> Tensor:
    """Log-probability of each response by the model's own logits."""
    with torch.no_grad():
        return torch.stack([naive_logprob(model.eval(), prompt, response) for prompt, response in RESPONSES])


def our_logprobs(players: Players, prefix_sharing: bool = True) -> Tensor:
    players.prefix_sharing = prefix_sharing
    return torch.tensor(players.response_logprobs(TREES))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_start_is_the_adapter(base: Any, tmp_path: Path, variant: str, tied: bool) -> None:
    model = base(tie_word_embeddings=tied)
    adapter = save_adapter(model, tmp_path / "adapter", **VARIANTS[variant])
    expected = own_logprobs(load_player(model, adapter))
    assert (own_logprobs(AutoModelForCausalLM.from_pretrained(model)) - expected).abs().max() > 0.1

    recipe = resolved(adapter, lora={})
    players = Players(recipe, RunDir(tmp_path / "run"))
    torch.testing.assert_close(our_logprobs(players), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(our_logprobs(players, False), expected, rtol=0, atol=1e-4)

    with torch.no_grad():  # as training would
        for _, parameter in players.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    trained = our_logprobs(players)
    assert (trained - expected).abs().max() > 0.01
    players.save(0)
    torch.testing.assert_close(
        own_logprobs(load_player(model, tmp_path / "run/iteration-0/player")), trained, rtol=0, atol=1e-4
    )
    start, player = (read_json(path / "adapter_config.json") for path in (adapter, tmp_path / "run/iteration-0/player"))
    kept = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "layers_to_transform",
        "peft_type",
    )
    assert {name: player[name] for name in kept} == {name: start[name] for name in kept}
    assert sorted(player["target_modules"]) == sorted(start["target_modules"])
    assert player["base_model_name_or_path"] == str(model)

    later = Players(recipe, RunDir(tmp_path / "run"))
    later.load(0)
    assert torch.equal(our_logprobs(later), trained)


@pytest.mark.parametrize("lora", [{"r": 2, "create_new_adapter": True}, None], ids=["new adapter", "full"])
@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        ("llama", {"use_dora": True}),
        ("gpt2", {"use_rslora": True, "fan_in_fan_out": True}),  # tied
        ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
        ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 22]}),
        ("qwen2", {"config": IA3Config(task_type="CAUSAL_LM")}),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    ],
)
def test_a_merged_start_equals_the_adapter(
    base: Any, tmp_path: Path, architecture: str, variant: Any, lora: Any
) -> None:
    model = base(architecture, tie_word_embeddings=architecture != "llama")
    adapter = save_adapter(model, tmp_path / "adapter", **variant)
    expected = own_logprobs(load_player(model, adapter))
    players = Players(resolved(adapter, lora=lora), RunDir(tmp_path / "run"))
    torch.testing.assert_close(our_logprobs(players, False), expected, rtol=0, atol=1e-5)
    assert players.base_model == str(tmp_path / "run" / "base")
    players.save(START)
    player = tmp_path / "run" / "start" / "player"
    loaded = load_player(tmp_path / "run" / "base", player) if lora else AutoModelForCausalLM.from_pretrained(player)
    torch.testing.assert_close(own_logprobs(loaded), expected, rtol=0, atol=1e-5)
    if lora:
        assert read_json(player / "adapter_config.json")["r"] == 2


# The recipe and the adapter


def test_the_recipe_takes_the_settings_of_the_adapter(base: Any, tmp_path: Path) -> None:
    adapter = save_adapter(base(), tmp_path / "adapter", r=3, lora_alpha=7, lora_dropout=0.25, use_rslora=True)
    recipe = resolved(adapter, lora={})
    assert recipe.lora is not None and recipe.model.base == str(base())
    layers = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert recipe.lora.model_dump() == {
        "r": 3,
        "alpha": 7,
        "dropout": 0.25,
        "target_modules": layers,
        "use_rslora": True,
        "use_dora": False,
        "create_new_adapter": False,
    }
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe.model_dump(mode="json")))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe == with_adapter(again) == resolved(adapter, lora={"r": 3, "target_modules": layers[::-1]})
    changed = resolved(adapter, lora={"dropout": 0.5}).lora
    assert changed is not None and (changed.dropout, changed.r) == (0.5, 3)
    new = resolved(adapter, lora={"create_new_adapter": True}).lora
    assert new is not None and (new.r, new.target_modules, new.use_rslora) == (16, "all-linear", False)


@pytest.mark.parametrize(
    ("lora", "difference"),
    [
        ({"r": 16}, "lora.r: the recipe has 16, the adapter 4"),
        ({"alpha": 32}, "lora.alpha: the recipe has 32.0, the adapter 12"),
        ({"target_modules": "all-linear"}, "lora.target_modules: the recipe has all-linear, the adapter ['q_proj']"),
        ({"target_modules": ["v_proj"]}, "lora.target_modules: the recipe has ['v_proj'], the adapter ['q_proj']"),
        ({"use_dora": True}, "lora.use_dora: the recipe has True, the adapter False"),
        ({"use_rslora": False}, "lora.use_rslora: the recipe has False, the adapter True"),
    ],
)
def test_a_recipe_that_contradicts_the_adapter(base: Any, tmp_path: Path, lora: Any, difference: str) -> None:
    adapter = save_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"], use_rslora=True)
    with pytest.raises(RecipeError) as error:
        resolved(adapter, lora=lora)
    assert (
        difference in str(error.value) and "create_new_adapter" in str(error.value) and str(adapter) in str(error.value)
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save: lm_head"),
        ({"trainable_token_indices": [3], "target_modules": ["q_proj"]}, "trainable_token_indices"),
        ({"target_modules": ["lm_head"]}, "output head"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
        ({"config": IA3Config(task_type="CAUSAL_LM")}, "IA3"),
    ],
)
def test_an_adapter_that_cannot_be_trained_further(base: Any, tmp_path: Path, options: Any, name: str) -> None:
    adapter = save_adapter(base(), tmp_path / "adapter", **options)
    with pytest.raises(ModelError, match="create_new_adapter: true") as error:
        resolved(adapter, lora={})
    assert name in str(error.value) and str(adapter) in str(error.value)
    assert resolved(adapter).merges_adapter


def test_adapters_that_cannot_be_used(base: Any, tmp_path: Path) -> None:
    prefix = save_adapter(
        base(), tmp_path / "prefix", config=PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    classifier = save_adapter(base(), tmp_path / "classifier")
    edit(classifier, task_type="SEQ_CLS")
    for folder, word in ((prefix, "PREFIX_TUNING"), (classifier, "SEQ_CLS")):
        for lora in ({}, {"create_new_adapter": True}, None):
            with pytest.raises(ModelError, match=word):
                resolved(folder, lora=lora)
    both = save_tiny_model(tmp_path / "both")
    save_adapter(base(), both)
    with pytest.raises(ModelError, match=r"adapter_config\.json.*whole model"):
        resolved(both, lora={})
    for section in ({"model": {"base": "org/base"}}, {"lora": {"create_new_adapter": True}}):
        with pytest.raises(RecipeError, match="whole model, not an adapter"):
            resolved(base(), **section)


def edit(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | values))


def test_the_base_of_an_adapter(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(base(), tmp_path / "adapter")
    shutil.copytree(base(), adapter / "nearby")
    shutil.copytree(base(), tmp_path / "sibling")
    places = (("nearby", str(adapter / "nearby")), ("sibling", str(tmp_path / "sibling")), ("org/base", "org/base"))
    for recorded, expected in places:
        edit(adapter, base_model_name_or_path=recorded, revision="abc")
        model = resolved(adapter, lora={}).model
        assert (model.base_model.path, model.base_model.revision) == (expected, "abc")

    edit(adapter, base_model_name_or_path="/home/someone/base")
    with pytest.raises(ModelError, match=r"adapter: its base model /home/someone/base is not on.*Set model\.base"):
        resolved(adapter, lora={})
    recipe = resolved(adapter, lora={}, model={"base": str(base())})
    assert our_logprobs(Players(recipe, RunDir(tmp_path / "run"))).isfinite().all()

    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base model"):
        resolved(adapter, lora={})

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit(adapter, base_model_name_or_path="someone/no-such-base")
    with pytest.raises(ModelError, match=r"adapter: the base .*: someone/no-such-base: .*set model\.base to its path"):
        Players(resolved(adapter, lora={}), RunDir(tmp_path / "run"))
    with pytest.raises(ModelError, match=r"adapter: the base .*: someone/no-such-base: .*set model\.base to its path"):
        model_fingerprint(resolved(adapter, lora={}).model, {})


def test_an_adapter_and_a_base_on_the_hub(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter = save_adapter(base(), tmp_path / "adapter", tokenizer=True)
    edit(adapter, base_model_name_or_path="org/base", revision="v2")
    recipe = tiny_recipe(Path("org/adapter"), lora={}, model={"revision": "v1"})
    assert with_adapter(recipe) == recipe  # unknown as long as neither file is in the cache
    plan = make_plan(recipe)
    assert "hf download org/adapter --revision v1" in plan.shape_source
    for name, revision, folder in (("adapter", "v1", adapter), ("base", "v2", base())):
        root = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(folder, root / "snapshots" / ("a" * 40))
        (root / "refs").mkdir()
        (root / "refs" / revision).write_text("a" * 40)
    for download in (False, True):
        found = with_adapter(recipe, download=download)
        assert (found.model.base, found.model.base_revision, found.model.revision) == ("org/base", "v2", "v1")
    assert make_plan(recipe).parameters is not None
    players = Players(found, RunDir(tmp_path / "run"))
    torch.testing.assert_close(our_logprobs(players), own_logprobs(load_player(base(), adapter)), rtol=0, atol=1e-4)
    players.save(0)
    config = read_json(tmp_path / "run" / "iteration-0" / "player" / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v2")
    assert model_fingerprint(found.model, {})["base"] == {"id": "org/base", "commit": "a" * 40}


def test_another_models_adapter(base: Any, tmp_path: Path) -> None:
    adapter = save_adapter(base("qwen2"), tmp_path / "adapter", target_modules=["q_proj"], r=4)
    for architecture, word in (("gpt2", "q_proj"), ("llama", "adapter of")):
        model = base(architecture, **({"hidden_size": 16} if architecture == "llama" else {}))
        with pytest.raises(ModelError, match=word):
            our_logprobs(Players(resolved(adapter, lora={}, model={"base": str(model)}), RunDir(tmp_path / "run")))


@pytest.mark.parametrize("layers", [2, 4], ids=["fewer layers", "more layers"])
def test_an_adapter_that_fits_its_base_in_part_is_not_merged(base: Any, tmp_path: Path, layers: int) -> None:
    adapter = save_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    recipe = resolved(adapter, model={"base": str(base(num_hidden_layers=layers))})
    with pytest.raises(ModelError, match=r"cannot be merged into .*: 2 weights missing or unknown \(base_model"):
        Players(recipe, RunDir(tmp_path / "run")).load(START)


@pytest.mark.parametrize("lora", [{}, None], ids=["further", "merged"])
def test_an_adapter_without_weights_or_with_other_shapes(base: Any, tmp_path: Path, lora: Any) -> None:
    adapter = save_adapter(base(), tmp_path / "adapter", target_modules=["q_proj"])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(read_json(config) | {"r": 8}), encoding="utf-8")
    with pytest.raises(ModelError, match="size mismatch for base_model"):
        Players(resolved(adapter, lora=lora), RunDir(tmp_path / "run")).load(START)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        Players(resolved(adapter, lora=lora), RunDir(tmp_path / "run")).load(START)


def test_a_folder_of_checkpoints_or_a_run_folder_as_the_model(base: Any, tmp_path: Path) -> None:
    for name in ("checkpoint-10", "start/player"):
        save_adapter(base(), tmp_path / name)
    with pytest.raises(ModelError, match=r"to a model folder, such as .*/checkpoint-10 or .*/start/player$"):
        Players(tiny_recipe(tmp_path), RunDir(tmp_path / "run")).load(START)


def test_trained_embeddings_in_the_file_are_refused_or_merged(base: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM as Auto

    model = Auto.from_pretrained(base())
    model.resize_token_embeddings(model.config.vocab_size + 2)  # as for new special tokens
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.base_model.model.config._name_or_path = adapted.peft_config["default"].base_model_name_or_path = str(base())
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(ModelError, match=r"trained weights of the base.*create_new_adapter"):
        our_logprobs(Players(resolved(tmp_path / "adapter", lora={}), RunDir(tmp_path / "run")))
    players = Players(resolved(tmp_path / "adapter"), RunDir(tmp_path / "run"))
    torch.testing.assert_close(our_logprobs(players), own_logprobs(adapted), rtol=0, atol=1e-5)


def test_the_tokenizer_and_template_of_the_adapter(base: Any, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    template += "{{ '<|im_start|>' if add_generation_prompt }}"
    plain = save_adapter(base(), tmp_path / "plain")
    own = save_adapter(base(), tmp_path / "own", tokenizer=True)
    (own / "chat_template.jinja").write_text(template)
    bare = save_adapter(base(), tmp_path / "bare", tokenizer=True)
    (bare / "chat_template.jinja").unlink()
    expected = {plain: AutoTokenizer.from_pretrained(base()).chat_template, own: template}
    for adapter in (plain, own, bare):
        for lora in ({}, {"create_new_adapter": True}):
            run = RunDir(tmp_path / f"run-{adapter.name}-{len(lora)}")
            assert Players(resolved(adapter, lora=lora), run).renderer.template == expected.get(
                adapter, expected[plain]
            )


# Engines that load adapters


@pytest.mark.parametrize(
    ("lora", "opponent", "word"),
    [
        ({"use_dora": True}, {"engine": "vllm"}, "vLLM does not support DoRA"),
        ({"use_dora": True}, {"engine": "server", "server": {"urls": ["http://h/v1"]}}, "vLLM does not support DoRA"),
        (
            {"use_rslora": True},
            {"engine": "server", "server": {"urls": ["http://h/v1"], "api": "sglang"}},
            "SGLang would scale",
        ),
        ({"use_rslora": True}, {"engine": "vllm"}, None),
        ({"use_dora": True}, {"engine": "local"}, None),
        ({"use_dora": True}, {"engine": "server", "server": {"launch_command": "serve {merged} {port}"}}, None),
    ],
)
def test_engines_that_load_adapters(lora: Any, opponent: Any, word: str | None) -> None:
    values = {"model": {"path": "org/m"}, "data": {"path": "org/d"}, "lora": lora, "opponent": opponent}
    if word is None:
        parse_recipe(values)
        return
    with pytest.raises(RecipeError, match=word) as error:
        parse_recipe(values)
    assert "{merged}" in str(error.value) and "opponent.engine: local" in str(error.value)


def test_patterns_of_an_adapter_are_refused_where_they_are_ignored(base: Any, tmp_path: Path) -> None:
    adapter = save_adapter(base(), tmp_path / "adapter", rank_pattern={"q_proj": 2})
    with pytest.raises(RecipeError, match="rank_pattern, which vLLM ignores"):
        resolved(adapter, lora={}, opponent={"engine": "vllm"})
    assert resolved(adapter, lora={"create_new_adapter": True}, opponent={"engine": "vllm"}).merges_adapter


# The plan


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "regular expression", "embeddings"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neo"])
def test_the_plan_counts_the_trained_parameters(base: Any, tmp_path: Path, architecture: str, variant: str) -> None:
    options = VARIANTS[variant]
    if architecture != "llama" and "target_modules" in options:
        expression = r"transformer\.h\.1\.(attn|mlp)\.(c_attn|c_proj|attention\.q_proj)"
        options = {"target_modules": expression if variant == "regular expression" else ["c_proj", "c_fc"]}
    adapter = save_adapter(base(architecture), tmp_path / "adapter", **options)
    recipe = resolved(adapter, lora={})
    shape, source = find_shape(recipe.model)
    assert str(base(architecture)) in source
    trained = Players(recipe, RunDir(tmp_path / "run")).parameters()
    assert shape.trained(recipe.lora) == sum(parameter.numel() for _, parameter in trained)


def test_the_plan_names_the_start_and_refuses_what_a_run_refuses(base: Any, tmp_path: Path) -> None:
    adapter = save_adapter(base(), tmp_path / "adapter", use_rslora=True)
    plan = make_plan(tiny_recipe(adapter, lora={}))
    assert plan.model == f"{adapter}, a rsLoRA adapter over {base()} (r 4, alpha 12), trained further"
    assert plan.parameters == sum(
        weight.numel() for weight in AutoModelForCausalLM.from_pretrained(base()).parameters()
    )
    assert make_plan(tiny_recipe(adapter)).model == f"{adapter}, an adapter that is merged into {base()}"
    assert "the adapter 4" in make_plan(tiny_recipe(adapter, lora={"r": 8})).refusals[0]
