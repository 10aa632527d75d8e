"""Families of models that differ from a plain decoder: in what they keep between tokens, and in what is adapted."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from models import ROW_DEPENDENT, STATEFUL, naive_logprob, save_tiny_model, tiny_model, tiny_recipe
from spinlm.errors import ModelError
from spinlm.export.model_card import _auto_class
from spinlm.generation import LocalEngine
from spinlm.generation.base import Response, Sampling
from spinlm.model.attention import register_tree_attention
from spinlm.model.families import row_limit
from spinlm.model.fused import fuse_layers
from spinlm.model.loading import add_adapter, load_model
from spinlm.model.logprobs import LogProbs, max_logprob_error
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, micro_batches, pack_batch
from spinlm.model.run import Run
from spinlm.model.trained_layers import describe_trained
from spinlm.plan import make_plan
from spinlm.recipe.model import Lora, Model
from spinlm.rundir.layout import RunDir
from spinlm.stages.prepare import prepare
from spinlm.stages.reference_logprobs import _check_mismatch, _Tally
from spinlm.utils.atomic import write_json
from tiny import tiny_tokenizer

V = 97

register_tree_attention()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(length, seed) for seed, length in enumerate((11, 1, 23, 5, 11, 6, 3, 17))]


def generate(model: Any, sampling: Sampling, batch_size: int = 8) -> list[list[Response]]:
    return LocalEngine(LogProbs(model), batch_size, prefix_sharing=False).generate(
        PROMPTS, sampling, 0, lambda completed, tokens: None
    )


# Models that keep a state


TOLERANCE = {"zamba2": 1e-3, "nemotron_h": 1e-3}
"""transformers limits their time step from below when it reads a prompt, and does not when it decodes."""


@pytest.mark.parametrize("family", STATEFUL)
def test_responses_of_a_stateful_model_have_the_log_probabilities_of_the_scorer(family: str) -> None:
    """Eight responses at once, to prompts of different lengths, that end at different times."""
    model = tiny_model(family, vocabulary=V)
    logprobs = LogProbs(model)
    assert max_logprob_error(logprobs, [PrefixTree(PROMPTS[2], (ids(9, 8), ids(4, 9)))], False) < 1e-5
    stops = tuple(range(2, V, 7))
    generated = generate(model, Sampling(1.0, 1.0, 12, 1000, 2, stops))
    assert len({len(response.token_ids) for row in generated for response in row}) > 4
    for prompt, responses in zip(PROMPTS, generated, strict=True):
        for response in responses:
            expected = naive_logprob(model, prompt, response.token_ids).item()
            assert abs(response.logprob - expected) / len(response.token_ids) < TOLERANCE.get(family, 1e-4)
    with pytest.raises(ModelError, match="keeps a state"):
        logprobs.use_tree_attention(True)


@pytest.mark.parametrize("family", ["mamba", "lfm2", "qwen3_5_text"])
def test_a_response_of_a_stateful_model_does_not_depend_on_its_batch(family: str) -> None:
    model = tiny_model(family, vocabulary=V)
    sampling = Sampling(1.0, 1.0, 12, 1000, 2, tuple(range(2, V, 7)))
    together, alone = generate(model, sampling), generate(model, sampling, batch_size=1)
    assert [[r.token_ids for r in row] for row in together] == [[r.token_ids for r in row] for row in alone]


def mismatch_tally(mismatch: float) -> _Tally:
    tally = _Tally()
    counts = {"pairs": 4, "nll_only": 0, "responses": 4, "identical": 0, "truncated": 0, "tokens": 40, "scored": 0}
    tally.counts["train"] = counts | {"mismatch": 4 * mismatch, "mismatches": 4, "mismatch_max": 2 * mismatch}
    return tally


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.01), ("bfloat16", 0.1)])
def test_a_gap_between_sampler_and_scorer_is_an_error_with_the_local_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, bound: float
) -> None:
    recipe = tiny_recipe(save_tiny_model(tmp_path / "model"), lora={"r": 4}, model={"dtype": dtype})
    run = Run(recipe, RunDir(tmp_path / "run"))
    _check_mismatch(run, 0, mismatch_tally(0.99 * bound))
    with pytest.raises(ModelError, match=rf"model: .* by {1.01 * bound:.2g} nats .*LlamaForCausalLM.*opponent\.engine"):
        _check_mismatch(run, 0, mismatch_tally(1.01 * bound))
    server = {"engine": "server", "server": {"urls": ["http://localhost:1"], "api": "vllm"}}
    other = Run(tiny_recipe(tmp_path / "model", lora={"r": 4}, opponent=server), RunDir(tmp_path / "run"))
    _check_mismatch(other, 0, mismatch_tally(0.11))
    assert "the server engine differ from ours by 0.11 nats" in caplog.text


# What an adapter changes

TREES = [PrefixTree(ids(9, 1), (ids(9, 2), ids(14, 3), ids(1, 4))), PrefixTree(ids(4, 5), (ids(6, 6),))]
ATTENTION = "q_proj, k_proj, v_proj, o_proj"
MLP = "gate_proj, up_proj, down_proj"
ADAPTED = {
    "mixtral": f"{ATTENTION} in 3 blocks (; frozen: router, experts",
    "qwen2_moe": f"{ATTENTION}, {MLP} in 2 blocks (; frozen: router, experts",
    "deepseek_v3": "q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj in 2 blocks (; frozen: "
    f"{MLP}, experts, router",
    "gpt_oss": f"{ATTENTION} in 2 blocks (; frozen: router, experts",
    "phimoe": f"{ATTENTION} in 2 blocks (; frozen: router, experts",
    "llama4_text": f"{ATTENTION}, {MLP} in 2 blocks (; frozen: experts, router",
    "jetmoe": "kv_proj in 2 blocks (; frozen: input_linear, output_linear, router, experts",
    "gemma3": f"{ATTENTION}, {MLP} in 2 blocks (; frozen: vision_tower, multi_modal_projector",
    "mistral3": f"{ATTENTION}, {MLP} in 2 blocks (; frozen: vision_tower, multi_modal_projector",
    "qwen2_5_vl": f"{ATTENTION}, {MLP} in 2 blocks (; frozen: visual",
    "mamba": "in_proj in 2 blocks (; frozen: A_log, conv1d, x_proj, dt_proj, out_proj",
    "llama": f"{ATTENTION}, {MLP} in 3 blocks (",
}


def test_an_adapter_on_the_embedding_is_named() -> None:
    model = add_adapter(tiny_model("llama"), Lora(r=4, target_modules=["embed_tokens", "v_proj"]), seed=0)
    # 4 · (512 + 32) for the embedding, and 3 · 4 · (32 + 16) for v_proj.
    assert describe_trained(model).startswith(
        "adapted: embed_tokens, v_proj in 3 blocks (2,752 parameters); frozen: q_"
    )


def trained_layers(model: Any) -> set[str]:
    return {name.partition(".lora_")[0] for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("family", ADAPTED)
def test_all_linear_adapts_the_language_model_without_routers_and_experts(family: str, tmp_path: Path) -> None:
    """The adapter has an effect in every layer that it names, and plain PEFT loads it from its folder."""
    model = add_adapter(tiny_model(family), Lora(r=4), seed=0)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert describe_trained(model) == "adapted: " + ADAPTED[family].replace("(", f"({trained:,} parameters)")
    assert not [name for name in trained_layers(model) if "vis" in name or "router" in name or ".gate" in name[-5:]]
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    fuse_layers(model)
    logprobs = LogProbs(model)
    assert max_logprob_error(logprobs, TREES, False) < 1e-5
    logprobs(pack_batch(TREES, False)).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters() if weight.requires_grad)
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path), is_trainable=True)
    assert trained_layers(loaded) == trained_layers(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "qwen3_5_text"])
def test_adapters_of_plain_models_are_those_of_peft(family: str, tmp_path: Path) -> None:
    """Bit for bit, and with the same names in the adapter's configuration."""
    ours = add_adapter(tiny_model(family), Lora(r=4), seed=3)
    base, settings = tiny_model(family), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(3)
    plain = get_peft_model(base, settings)
    assert ours.peft_config["default"].target_modules == plain.peft_config["default"].target_modules
    weights = []
    for name, model in (("ours", ours), ("plain", plain)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_named_layers_of_a_multimodal_model_are_those_of_its_language_model() -> None:
    model = add_adapter(tiny_model("gemma3"), Lora(r=4, target_modules=["q_proj"]), seed=0)
    assert trained_layers(model) == {
        f"base_model.model.model.language_model.layers.{n}.self_attn.q_proj" for n in range(2)
    }
    with pytest.raises(ModelError, match="language model"):
        add_adapter(tiny_model("gemma3"), Lora(target_modules=["patch_embedding"]), seed=0)


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_full_fine_tuning_of_a_multimodal_model_leaves_its_towers_alone(family: str, tmp_path: Path) -> None:
    players = Players(tiny_recipe(save_tiny_model(tmp_path / "model", family)), RunDir(tmp_path / "run"))
    names = {name.split(".")[1] for name, _ in players.parameters()}
    assert names <= {"language_model", "weight"}  # lm_head.weight
    assert describe_trained(players.model).endswith("frozen: vision_tower, multi_modal_projector")
    assert max_logprob_error(players.logprobs, TREES, True) < 1e-5


def test_a_checkpoint_whose_text_model_alone_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen3_5_text")
    text = json.loads((folder / "config.json").read_text())
    CONFIG_MAPPING["qwen3_5"](text_config=text).save_pretrained(folder)
    load_model(Model(path=str(folder)), str(folder), torch.float32)
    assert "a merged player has no vision or audio tower" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral3"])
def test_the_model_card_names_a_class_that_loads_the_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, family)
    name = _auto_class(Model(path=str(folder)))
    assert name == ("AutoModelForImageTextToText" if family == "mistral3" else "AutoModelForCausalLM")
    assert type(getattr(transformers, name).from_pretrained(folder)) is type(tiny_model(family))


# Position encodings that depend on the length of a row

ROWS = [PrefixTree(ids(length - 12, length), (ids(12, 2), ids(12, 3))) for length in (30, 36, 41, 44, 50, 57)]


def logprobs_in_batches(players: Players, trees: Sequence[PrefixTree], budget: int) -> list[float]:
    values: dict[int, list[float]] = {}
    for chosen in micro_batches(trees, budget, players.prefix_sharing):
        found = iter(players.response_logprobs([trees[index] for index in chosen]))
        values |= {index: [next(found) for _ in trees[index].responses] for index in chosen}
    return [value for index in range(len(trees)) for value in values[index]]


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize(("family", "kind"), [("phi3", "longrope"), ("llama", "dynamic NTK")])
def test_log_probabilities_do_not_depend_on_the_micro_batch(
    tmp_path: Path, family: str, kind: str, prefix_sharing: bool
) -> None:
    """A recipe whose rows can pass the threshold of 40 tokens is refused. Below it the micro-batch has no influence."""
    folder = save_tiny_model(tmp_path / "model", family, **ROW_DEPENDENT[family])
    long = Players(tiny_recipe(folder, lora={"r": 4}, train={"max_length": 57}), RunDir(tmp_path / "long"))
    with pytest.raises(ModelError, match=rf"model: .*{kind}.* 40 .*train\.max_length is 57"):
        long.logprobs  # noqa: B018
    players = Players(tiny_recipe(folder, lora={"r": 4}, train={"max_length": 40}), RunDir(tmp_path / "run"))
    players.prefix_sharing = prefix_sharing
    assert players.max_positions == 40
    below = [tree for tree in ROWS if len(tree.prompt) + 12 <= 41]  # the last token of a response is not fed in
    small, large = (logprobs_in_batches(players, below, budget) for budget in (64, 4096))
    assert small == pytest.approx(large, abs=1e-4)
    # Beyond the threshold there is an influence, of more than 0.01 nats per token.
    small, large = (logprobs_in_batches(players, ROWS, budget) for budget in (64, 4096))
    assert max(abs(a - b) / 12 for a, b in zip(small, large, strict=True)) > 0.01


PHI_4_MINI = {"model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (PHI_4_MINI | {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, ("longrope", 4096)),
        (PHI_4_MINI | {"rope_scaling": {"type": "su", "long_factor": [1.0]}}, ("longrope", 4096)),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2}}, ("dynamic NTK", 2048)),
        (
            {"text_config": {"max_position_embeddings": 64, "rope_parameters": {"full": {"rope_type": "dynamic"}}}},
            ("dynamic NTK", 64),
        ),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, None),
        ({}, None),
    ],
)
def test_longest_row_before_the_position_encoding_changes(
    config: dict[str, Any], limit: tuple[str, int] | None
) -> None:
    assert row_limit(config) == limit


def test_plan_refuses_rows_that_are_too_long_and_says_what_is_adapted(tmp_path: Path) -> None:
    """Without loading the model."""
    write_json(tmp_path / "config.json", PHI_4_MINI | {"rope_scaling": {"type": "longrope"}, "num_local_experts": 16})
    refusals = [
        make_plan(tiny_recipe(tmp_path, lora={}, train={"max_length": length})).refusals for length in (4096, 4097)
    ]
    assert [any("longrope" in refusal for refusal in part) for part in refusals] == [False, True]
    assert make_plan(tiny_recipe(tmp_path, lora={})).trained == "adapted: linear layers; frozen: router, experts"
    write_json(tmp_path / "config.json", {"text_config": {}, "vision_config": {"hidden_size": 8}})
    assert make_plan(tiny_recipe(tmp_path)).trained == "trained: all weights; frozen: vision tower"
    save_tiny_model(tmp_path / "llama")
    plan = make_plan(tiny_recipe(tmp_path / "llama", lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}))
    # Inputs and outputs of q_proj are 32 and 32, those of v_proj 32 and 16.
    assert plan.trained == "adapted: q_proj, v_proj in 3 blocks (1,344 parameters)"


@pytest.mark.parametrize(("max_length", "expected"), [(8, True), (64, False)])
def test_chunks_of_attention_shorter_than_a_row_leave_no_prefix_sharing(
    tmp_path: Path, max_length: int, expected: bool
) -> None:
    """As in Llama 4. The rows of the measurement may be too short to show it."""
    folder = save_tiny_model(tmp_path / "model", "llama4_text", attention_chunk_size=8)
    players = Players(tiny_recipe(folder, lora={"r": 4}, train={"max_length": max_length}), RunDir(tmp_path / "run"))
    assert players.measure_prefix_sharing([PrefixTree([5, 6], ([7, 8], [9]))]) is expected


# A tokenizer with more tokens than the embedding has rows


@pytest.mark.parametrize("response", ["It is blue.", "It is <extra_7>."])
def test_a_token_without_a_row_is_refused_when_it_occurs(tmp_path: Path, response: str) -> None:
    folder = tmp_path / "model"
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    tiny_model("llama", rows).save_pretrained(folder)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(30)])
    tokenizer.save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "response": response if n == 3 else "Yes"}) + "\n" for n in range(6))
    )
    recipe = tiny_recipe(folder, lora={"r": 4}, data={"path": str(data), "heldout": 1})
    with Run(recipe, RunDir(tmp_path / "run")) as run:
        prepare(run)
        if "extra" not in response:
            assert run.players.logprobs
            return
        with pytest.raises(
            ModelError, match=rf"has {rows + 30} tokens.* only {rows} rows.*'<extra_7>', token {rows + 7}"
        ):
            run.players.logprobs  # noqa: B018
