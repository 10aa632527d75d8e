"""Self-play from an adapter, through the command line."""

import json
import math
from pathlib import Path

import pytest
import torch
from runs import RECIPE, World, contents, steps
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import load_player, naive_logprob, save_adapter
from spinlm.model.prefix_trees import PrefixTree
from spinlm.model.run import Run
from spinlm.recipe.load import parse_recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json


@pytest.fixture(scope="module")
def adapter_world(world, tmp_path_factory) -> World:
    """A recipe that starts from a DoRA adapter of the model."""
    folder = tmp_path_factory.mktemp("adapter-world")
    lora = {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
    save_adapter(world.model, folder / "adapter", noise=0.02, **lora)
    (folder / "data.jsonl").write_bytes((world.folder / "data.jsonl").read_bytes())
    text = RECIPE.replace("{path: model}", "{path: adapter}").replace("{r: 4, alpha: 8, dropout: 0.1}", "{}")
    (folder / "recipe.yaml").write_text(text.replace("sft: {epochs: 3", "sft: {epochs: 1"), encoding="utf-8")
    return World(folder, folder / "recipe.yaml", folder / "adapter")


@pytest.fixture(scope="module")
def finished(adapter_world, session_cli, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("from-adapter") / "run"
    session_cli("run", adapter_world.recipe, "sft=null", "--run-dir", run, folder=adapter_world.folder)
    return run


def test_every_player_is_that_adapter_over_the_original_base(world, adapter_world, finished):
    losses = [row["loss"] for row in steps(finished) if row["stage"] == "train" and row["step"] == 1]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-5)
    start = read_json(adapter_world.model / "adapter_config.json")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    logits = {}
    for t in (START, 0, 1):
        player = RunDir(finished).player(t)
        config = read_json(player / "adapter_config.json")
        for name in ("r", "lora_alpha", "use_dora", "peft_type"):
            assert config[name] == start[name]
        assert sorted(config["target_modules"]) == sorted(start["target_modules"])
        assert config["base_model_name_or_path"] == str(world.model)
        with torch.no_grad():
            logits[t] = load_player(world.model, player)(ids).logits
    with torch.no_grad():
        expected = load_player(world.model, adapter_world.model)(ids).logits
    torch.testing.assert_close(logits[START], expected, rtol=0, atol=1e-6)
    assert (logits[1] - logits[0]).abs().max() > 1e-4 < (logits[0] - logits[START]).abs().max()


def test_a_rerun_is_a_no_op_and_another_adapter_is_refused(adapter_world, finished, cli):
    before = contents(finished)
    cli("run", finished / "recipe.yaml", "--run-dir", finished, folder=adapter_world.folder)
    assert contents(finished) == before
    result = cli(
        "run",
        adapter_world.recipe,
        "sft=null",
        "lora.r=8",
        "--run-dir",
        finished,
        folder=adapter_world.folder,
        code=2,
    )
    assert "lora.r: the recipe has 8, the adapter 3" in result.err
    file = adapter_world.model / "adapter_model.safetensors"
    weights = file.read_bytes()
    try:
        file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        result = cli(
            "run", adapter_world.recipe, "sft=null", "--run-dir", finished, folder=adapter_world.folder, code=2
        )
        assert "adapter_model.safetensors: was" in result.err
    finally:
        file.write_bytes(weights)


def test_a_killed_run_resumes(adapter_world, finished, cli, tmp_path):
    run = tmp_path / "run"
    command = ("run", adapter_world.recipe, "sft=null", "--run-dir", run)
    process = cli.start(*command, folder=adapter_world.folder)
    process.wait_until(lambda: sum(row["stage"] == "train" for row in steps(run)) > 6)
    process.kill()
    cli(*command, folder=adapter_world.folder)
    assert contents(run) == contents(finished)


def test_exports_load_with_plain_peft_and_transformers(world, adapter_world, finished, cli, tmp_path):
    for option, name in (((), "adapter"), (("--merge",), "whole")):
        output = tmp_path / name
        cli("export", finished, "--iteration", "1", *option, "--output", output, folder=adapter_world.folder)
        card = (output / "README.md").read_text(encoding="utf-8")
        assert "Its training began with the adapter adapter" in card and "base model model" in card
    models = [load_player(world.model, tmp_path / "adapter"), AutoModelForCausalLM.from_pretrained(tmp_path / "whole")]
    run = Run(parse_recipe(read_recipe(RunDir(finished))), RunDir(finished))
    run.players.load(1)
    tree = PrefixTree([5, 6, 7, 8], ([9, 10, 11],))
    (ours,) = run.players.response_logprobs([tree])
    for model in models:
        assert naive_logprob(model.eval(), tree.prompt, tree.responses[0]).item() == pytest.approx(ours, abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert models[0].generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_plan_and_check_name_the_adapter(world, adapter_world, cli):
    line = f"{adapter_world.model}, a DoRA adapter over {world.model} (r 3, alpha 9), trained further"
    plan = cli("plan", adapter_world.recipe, "--json", folder=adapter_world.folder).out
    assert json.loads(plan)["model"] == line
    assert f"start: {line}" in cli("check", adapter_world.recipe, folder=adapter_world.folder).out


def test_a_merged_start_in_4_bits_with_a_new_rslora_adapter(world, adapter_world, cli, tmp_path):
    pytest.importorskip("bitsandbytes", reason="4 bits need the extra `bitsandbytes`")
    run, lora = tmp_path / "run", "lora={r: 2, create_new_adapter: true, use_rslora: true}"
    command = ("run", adapter_world.recipe, "sft=null", "model.load_in_4bit=true", "selfplay.iterations=1", lora)
    cli(*command, "--run-dir", run, folder=adapter_world.folder)
    config = read_json(run / "iteration-0" / "player" / "adapter_config.json")
    assert (config["r"], config["use_rslora"], config["use_dora"]) == (2, True, False)
    assert config["base_model_name_or_path"] == str((run / "base").absolute())
