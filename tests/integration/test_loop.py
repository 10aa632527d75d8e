"""The whole loop through the command line, on a tiny model: what a run leaves behind, and that it is what SPIN says."""

import json
import math
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import datasets
import numpy as np
import pytest
import torch
import yaml
from runs import (
    HELDOUT,
    ITERATIONS,
    PROMPTS,
    SHARDS,
    contents,
    read_jsons,
    read_pairs,
    read_rows,
    rows,
    steps,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import load_player, save_tiny_model
from spinlm.evals.probe import probe_auc
from spinlm.recipe.load import load_recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Pair
from spinlm.rundir.stage_graph import START

LN2 = math.log(2)


def naive_logprob(model, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt), as any textbook has it."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    chosen = torch.log_softmax(logits.double(), dim=-1)[torch.arange(len(response)), response]
    return chosen.sum().item()


@pytest.fixture(scope="module")
def theta_0(world, reference):
    return load_player(world.model, reference / "start" / "player")


@pytest.fixture(scope="module")
def theta_1(world, reference):
    return load_player(world.model, reference / "iteration-0" / "player")


@pytest.fixture(scope="module")
def theta_2(world, reference):
    return load_player(world.model, reference / "iteration-1" / "player")


@pytest.fixture(scope="module")
def variant(world, session_cli, tmp_path_factory):
    """Runs the recipe with changes and returns the run folder. One that was run before is not run again."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in done:
            done[overrides] = tmp_path_factory.mktemp("variant") / "run"
            session_cli("run", world.recipe, *overrides, "--run-dir", done[overrides], folder=world.folder)
        return done[overrides]

    return run


# The run folder


def test_run_folder(reference):
    found = {path.relative_to(reference).as_posix() for path in reference.rglob("*") if "player/" not in str(path)}
    player_of = ("start", "iteration-0", "iteration-1")
    expected = {
        "recipe.yaml",
        "provenance.json",
        ".spinlm/lock",
        ".spinlm/prefix_sharing.json",
        "best",
        "train_log.jsonl",
        "examples",
        *(f"examples/{name}" for name in ("train.jsonl", "heldout.jsonl", "skipped_rows.json")),
        *(f"{folder}/{name}" for folder in player_of for name in ("player", "heldout_greedy.jsonl", "eval.json")),
        *(f".spinlm/start/{stage}.done" for stage in ("prepare", "sft", "evaluate")),
        *(
            f".spinlm/iteration-{iteration}/{stage}.done"
            for iteration in range(2)
            for stage in ("generate", "reference_logprobs", "regime", "train", "evaluate", "promote")
        ),
        *(f"iteration-{i}/generations/train-{shard:05d}.jsonl" for i in range(2) for shard in range(SHARDS)),
        *(f"iteration-{i}/pairs/train-{shard:05d}.arrow" for i in range(2) for shard in range(SHARDS)),
        *(f"iteration-{i}/generations/heldout-00002.jsonl" for i in range(2)),
    }
    assert expected <= found
    assert not [name for name in found if "tmp" in name]


def test_run_folder_says_what_it_was_made_from(world, reference):
    assert load_recipe(reference / "recipe.yaml") == load_recipe(world.recipe)
    assert yaml.safe_load((reference / "recipe.yaml").read_text())["train"]["batch_size"] == 4
    provenance = json.loads((reference / "provenance.json").read_text())
    assert {"spinlm", "device", "packages", "inputs"} <= provenance.keys()
    assert provenance["packages"]["torch"] == torch.__version__


def test_adapter_config_is_the_same_from_process_to_process(reference):
    """PEFT writes the order of a set of names, which is another one in every process."""
    for folder in ("start", "iteration-0", "iteration-1"):
        targets = json.loads((reference / folder / "player" / "adapter_config.json").read_text())["target_modules"]
        assert len(targets) == 7
        assert targets == sorted(targets)


def test_best_is_a_link_to_the_chosen_player(reference):
    best = json.loads((reference / ".spinlm" / "iteration-1" / "promote.done").read_text())["best"]
    assert (reference / "best").readlink() == Path("start" if best < 0 else f"iteration-{best}")
    assert (reference / "best" / "player" / "adapter_model.safetensors").is_file()


def test_second_run_changes_nothing(world, cli, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)

    def stamps():
        return {path: path.lstat().st_mtime_ns for path in run.rglob("*") if path.name != "lock" and path != run}

    before, digests = stamps(), contents(run)
    again = cli("run", world.recipe, "--run-dir", run, folder=world.folder)
    assert stamps() == before
    assert contents(run) == digests
    assert "Self-play" in again.out


def test_stages_by_hand_give_what_run_gives(world, cli, reference, rewound):
    run = rewound(iteration=0)
    for iteration in range(2):
        for stage in ("generate", "reference_logprobs", "regime", "train", "evaluate"):
            said = cli(stage.replace("_", "-"), run, "--iteration", str(iteration), folder=world.folder)
            assert said.out == f"{stage} of iteration {iteration}: complete\n"
    again = cli("train", run, "--iteration", "1", folder=world.folder)
    assert again.out == "train of iteration 1: already complete\n"
    assert contents(run).keys() == contents(reference).keys() - {
        "best",
        *(f"iteration-{i}/selection.json" for i in range(2)),
        *(f".spinlm/iteration-{i}/promote.done" for i in range(2)),
    }
    cli("run", world.recipe, "--run-dir", run, folder=world.folder)
    assert contents(run) == contents(reference)


def test_changed_recipe_is_refused_with_the_difference(world, cli, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    before = contents(run)
    changes = ("train.learning_rate=0.5", "lora.r=2")
    refused = cli("run", world.recipe, *changes, "--run-dir", run, folder=world.folder, code=2)
    assert "  lora.r: was 4, is 2\n  train.learning_rate: was 0.002, is 0.5\n" in refused.message
    assert "--overwrite" in refused.message
    assert contents(run) == before


def test_overwrite_starts_again(world, cli, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    cli("run", world.recipe, "selfplay.iterations=1", "--overwrite", "--run-dir", run, folder=world.folder)
    assert not (run / "iteration-1").exists()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["selfplay"]["iterations"] == 1
    first, again = contents(reference), contents(run)
    same = [name for name in again if name.removeprefix(".spinlm/").startswith(("start/", "iteration-0/"))]
    assert len(same) > 30
    assert [name for name in same if again[name] != first[name]] == []


# What the method says


def test_pairs_are_counted_as_in_the_paper(reference):
    real = {row["id"]: row["response_ids"] for row in read_rows(reference / "examples" / "train.jsonl")}
    assert len(real) == PROMPTS
    newest = [read_jsons(reference, f"iteration-{i}/generations/train-*.jsonl") for i in range(2)]
    assert [len(rows) for rows in newest] == [PROMPTS, PROMPTS]
    identical = [sum(row["token_ids"] == real[row["id"]] for row in rows) for rows in newest]
    assert identical[0] > 0, "the test means little when no response equals the real one"
    expected = [PROMPTS - identical[0], 2 * PROMPTS - sum(identical)]
    assert [len(read_pairs(reference, i, "train")) for i in range(2)] == expected
    for iteration in range(2):
        scored, trained = (RunDir(reference).metadata(stage, iteration) for stage in ("reference_logprobs", "train"))
        assert scored["train"]["pairs"] == trained["pairs"] == expected[iteration]
        assert scored["train"]["identical_rate"] == identical[iteration] / PROMPTS
    sources = [pair["source_iteration"] for pair in read_pairs(reference, 1, "train")]
    assert sources.count(0) == PROMPTS - identical[0]
    assert sources.count(1) == PROMPTS - identical[1]


def test_pair_never_holds_two_equal_responses(reference):
    for iteration in range(2):
        for split in ("train", "heldout"):
            assert all(p["real_ids"] != p["synthetic_ids"] for p in read_pairs(reference, iteration, split))


def test_responses_are_those_that_were_sampled(reference):
    """A response that did not end has no end token; one that did has it last, once."""
    end = AutoTokenizer.from_pretrained(reference / "start" / "player").eos_token_id
    generated = read_jsons(reference, "iteration-*/generations/*.jsonl")
    assert {row["finished"] for row in generated} == {True, False}
    for row in generated:
        assert row["token_ids"].count(end) == row["finished"]
        assert row["token_ids"][-1] == end if row["finished"] else len(row["token_ids"]) == 6
    by_key = {(row["id"], row["iteration"], row["sample"]): row["token_ids"] for row in generated}
    for pair in read_pairs(reference, 1, "train"):
        assert by_key[pair["id"], pair["source_iteration"], pair["sample"]] == pair["synthetic_ids"]


@pytest.mark.parametrize("iteration", [0, 1])
def test_opponent_of_an_iteration_is_the_player_before_it(reference, theta_0, theta_1, iteration):
    """The sampler's log-probabilities are those of θ_t, not those of the other player."""
    prompts = {row["id"]: row["prompt_ids"] for row in read_jsons(reference, "examples/*.jsonl")}
    opponent, other = (theta_0, theta_1)[:: 1 if iteration == 0 else -1]
    rows = read_jsons(reference, f"iteration-{iteration}/generations/*.jsonl")
    assert len(rows) == PROMPTS + HELDOUT
    gaps, other_gaps = (
        [abs(naive_logprob(model, prompts[row["id"]], row["token_ids"]) - row["logprob"]) for row in rows]
        for model in (opponent, other)
    )
    assert max(gaps) < 1e-4
    assert min(other_gaps) > 1e-3


def test_generations_change_with_the_opponent(reference):
    first, second = (read_jsons(reference, f"iteration-{i}/generations/train-*.jsonl") for i in range(2))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert sum(a["token_ids"] != b["token_ids"] for a, b in zip(first, second, strict=True)) > PROMPTS / 4


@pytest.mark.parametrize("iteration", [0, 1])
def test_pairs_hold_log_probabilities_of_the_opponent(reference, theta_0, theta_1, iteration):
    """Every pair, a replayed one too, has the log-probabilities of θ_t in iteration t."""
    opponent = (theta_0, theta_1)[iteration]
    pairs = read_pairs(reference, iteration, "train") + read_pairs(reference, iteration, "heldout")
    for pair in pairs:
        real = naive_logprob(opponent, pair["prompt_ids"], pair["real_ids"])
        synthetic = naive_logprob(opponent, pair["prompt_ids"], pair["synthetic_ids"])
        assert pair["opponent_real"] == pytest.approx(real, abs=1e-4)
        assert pair["opponent_synthetic"] == pytest.approx(synthetic, abs=1e-4)


def test_heldout_prompts_are_never_trained_on(reference):
    examples = {split: read_rows(reference / "examples" / f"{split}.jsonl") for split in ("train", "heldout")}
    skipped = json.loads((reference / "examples" / "skipped_rows.json").read_text())["skipped"]
    assert skipped["prompt_in_heldout"] > 0, "the data must tempt"
    heldout = {tuple(row["prompt_ids"]) for row in examples["heldout"]}
    assert len(heldout) >= HELDOUT - 1
    assert not heldout & {tuple(row["prompt_ids"]) for row in examples["train"]}
    for iteration in range(2):
        assert not heldout & {tuple(pair["prompt_ids"]) for pair in read_pairs(reference, iteration, "train")}
        assert {tuple(pair["prompt_ids"]) for pair in read_pairs(reference, iteration, "heldout")} <= heldout


def test_first_loss_is_ln_2_in_every_iteration(variant):
    run = variant("lora.dropout=0.0", "opponent.samples_per_prompt=2")
    first = [line for line in steps(run) if line["stage"] == "train" and line["step"] == 1]
    assert [line["iteration"] for line in first] == [0, 1]
    for line in first:
        assert line["loss"] == pytest.approx(LN2, abs=1e-5)
        assert line["margin"] == pytest.approx(0, abs=1e-4)


def test_training_widens_the_margin(variant):
    run = variant("lora.dropout=0.0", "opponent.samples_per_prompt=2")
    for iteration in range(2):
        lines = [line for line in steps(run) if (line["stage"], line["iteration"]) == ("train", iteration)]
        assert [line["step"] for line in lines] == list(range(1, lines[-1]["steps"] + 1))
        last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
        assert mean(line["loss"] for line in last) < LN2 - 0.01
        assert mean(line["margin"] for line in last) > 0.1


def test_two_samples_for_each_prompt(variant):
    run = variant("lora.dropout=0.0", "opponent.samples_per_prompt=2")
    real = {row["id"]: row["response_ids"] for row in read_rows(run / "examples" / "train.jsonl")}
    counts = []
    for iteration in range(2):
        rows = read_jsons(run, f"iteration-{iteration}/generations/train-*.jsonl")
        assert [(row["id"], row["sample"]) for row in rows] == [(key, sample) for key in real for sample in (0, 1)]
        counts.append(sum(row["token_ids"] != real[row["id"]] for row in rows))
    assert any(a["token_ids"] != b["token_ids"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert len(read_pairs(run, 0, "train")) == counts[0]
    assert len(read_pairs(run, 1, "train")) == sum(counts)


@pytest.mark.parametrize(
    ("overrides", "nll_weight", "expected"),
    [
        (("objective.link=hinge",), 0.0, 1.0),  # max(0, 1 − 0)
        (("objective.link=exponential",), 0.0, 1.0),  # e^−0
        (("objective.nll_weight=0.3",), 0.3, LN2),
        (("objective.length_normalize=true",), 0.0, LN2),
        (("objective.name=dpo-positive", "objective.dpop_lambda=1.0"), 0.0, LN2),
        (("objective.name=space", "objective.mu=1.0", "objective.nll_weight=0.2"), 0.2, 2 * LN2),
    ],
)
def test_objectives(variant, overrides, nll_weight, expected):
    run = variant("lora.dropout=0.0", "selfplay.iterations=1", "sft.epochs=1", *overrides)
    lines = [line for line in steps(run) if line["stage"] == "train"]
    assert lines[0]["loss"] == pytest.approx(expected + nll_weight * lines[0]["real_nll"], abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_correct_responses_make_no_pair_and_keep_their_nll_term(variant, session_cli, tmp_path):
    """Each example has as many rows as in the control, so that both take the same number of steps."""
    run = variant("lora.dropout=0.0", "objective.nll_weight=0.2", "opponent.exclude_correct=true")
    real = {row["id"]: row["response"].split() for row in read_rows(run / "examples" / "train.jsonl")}
    rows = read_jsons(run, "iteration-*/generations/train-*.jsonl")
    correct = {(row["id"], row["iteration"], row["sample"]): row["text"].split() == real[row["id"]] for row in rows}
    for iteration in range(2):
        pairs = read_pairs(run, iteration, "train")
        assert len(pairs) == PROMPTS * (1 + iteration)
        for pair in pairs:
            assert pair["contrast"] != correct[pair["id"], pair["source_iteration"], pair["sample"]]
            assert math.isfinite(pair["opponent_real"]) == math.isfinite(pair["opponent_synthetic"]) == pair["contrast"]
        metadata = RunDir(run).metadata("reference_logprobs", iteration)["train"]
        contrasts = sum(pair["contrast"] for pair in pairs)
        assert 0 < contrasts < len(pairs)
        assert (metadata["pairs"], metadata["nll_only"]) == (contrasts, len(pairs) - contrasts)
        newest = [is_correct for (_, source, _), is_correct in correct.items() if source == iteration]
        assert metadata["correct_rate"] == sum(newest) / PROMPTS
        assert RunDir(run).metadata("train", iteration)["pairs"] == contrasts
        assert all(pair["contrast"] for pair in read_pairs(run, iteration, "heldout"))
    control = variant("lora.dropout=0.0", "objective.name=sft")
    assert len(steps(run)) == len(steps(control))
    first = next(line for line in steps(run) if line["stage"] == "train" and "margin" in line)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    session_cli("export", run, "--pairs", "--output", tmp_path / "new", folder=tmp_path)
    exported = datasets.load_dataset(str(tmp_path / "new"), split="train")
    assert {(row["id"], row["source_iteration"], row["sample"]) for row in exported} <= {
        key for key, is_correct in correct.items() if not is_correct
    }
    assert len(exported) > 0


@pytest.mark.parametrize("samples", [1, 2])
def test_t_spin_keeps_the_starting_players_responses(variant, samples):
    settings = ("selfplay.replay=0", "sft.epochs=1", f"opponent.samples_per_prompt={samples}")
    run = variant("lora.dropout=0.0", "objective.name=t-spin", *settings)
    rows = read_jsons(run, "iteration-0/generations/train-*.jsonl")
    first = {(row["id"], row["sample"]): row["token_ids"] for row in rows}
    for iteration in range(2):
        for pair in read_pairs(run, iteration, "train"):
            initial = first[pair["id"], pair["sample"]]
            assert pair["initial_ids"] == (pair["synthetic_ids"] if initial == pair["real_ids"] else initial)
    pairs = read_pairs(run, 1, "train")
    assert any(pair["initial_ids"] != pair["synthetic_ids"] for pair in pairs)
    assert {pair["initial_ids"] for pair in read_pairs(run, 1, "heldout")} == {None}
    first_epoch, second_epoch = (
        mean(
            line["loss"] for line in steps(run) if (line["stage"], line["iteration"], line["epoch"]) == ("train", 1, n)
        )
        for n in (1, 2)
    )
    assert second_epoch < first_epoch


def test_the_sft_control_learns_from_the_real_responses_alone(variant, reference):
    """It takes as many steps as self-play, and generates no response to a training prompt."""
    run = variant("lora.dropout=0.0", "objective.name=sft")
    for iteration in range(2):
        folder = run / f"iteration-{iteration}"
        files = [*folder.glob("generations/[!.]*"), *folder.glob("pairs/[!.]*")]
        assert {path.name.split("-")[0] for path in files} == {"heldout"}
        ours, theirs = (
            [line for line in steps(folder) if (line["stage"], line["iteration"]) == ("train", iteration)]
            for folder in (run, reference)
        )
        assert abs(ours[-1]["steps"] - theirs[-1]["steps"]) <= 1  # self-play leaves pairs of equals out
        assert ours[-1]["loss"] < ours[0]["loss"]
        assert "margin" in json.loads((run / f"iteration-{iteration}" / "eval.json").read_text())


PREFER = ("data.columns.rejected=rejected", "selfplay.iterations=1")


@pytest.fixture(scope="module")
def preferences(world, tmp_path_factory) -> Path:
    """The tiny data with a rejected response in every row."""
    folder = tmp_path_factory.mktemp("preferences")
    worse = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "blue"} for row in rows()]
    return write_rows(folder / "preferences.jsonl", worse)


def test_preference_data_are_trained_on_as_they_are(variant, preferences):
    """Plain DPO: the data's own pairs, the start as the reference, and nothing generated to train on."""
    run = variant("lora.dropout=0.0", f"data.path={preferences}", *PREFER)
    for split, count in (("train", 24), ("heldout", 10)):
        generations = read_jsons(run, f"iteration-0/generations/{split}-*.jsonl")
        assert len(generations) == count
        assert {(row["text"], row["finished"], row["logprob"]) for row in generations} == {("blue", True, None)}
        assert {tuple(pair["synthetic_ids"]) for pair in read_pairs(run, 0, split)} == {
            tuple(generations[0]["token_ids"])
        }
    lines = [line for line in steps(run) if line["stage"] == "train"]
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert lines[-1]["margin"] > 0.1
    assert json.loads((run / "iteration-0" / "eval.json").read_text())["pair_accuracy"] > 0.5


def test_check_of_preference_data(world, cli, preferences, tmp_path):
    said = cli("check", world.recipe, f"data.path={preferences}", *PREFER, folder=tmp_path).out
    assert "rejected responses of the data: " in said and "synthetic  blue" in said
    assert "log-probabilities differ" not in said and "Ready: " in said


def test_a_collapse_ends_training_after_its_epoch_and_the_run_after_its_iteration(world, cli, tmp_path):
    """The learning rate ruins the model. The best player is then the start."""
    ruin = ("train.learning_rate=5e-2", "train.epochs=3", "selfplay.guard.max_nll_increase=0.5", "objective.beta=5.0")
    run = tmp_path / "run"
    said = cli("run", world.recipe, *ruin, "--run-dir", run, folder=world.folder)
    assert "iteration 0: collapse, training ends after epoch 1: held-out NLL" in said.err
    assert "iteration 0: collapse: held-out NLL" in said.err
    assert "Iteration 0 collapsed and ended the run: held-out NLL" in " ".join(said.out.split())
    lines = [line for line in steps(run) if line["stage"] == "train"]
    assert lines[-1]["epoch"] == 1 and lines[-1]["step"] == len(lines) < lines[-1]["steps"]
    assert (run / "best").readlink().name == "start" and not (run / "iteration-1").exists()
    assert (run / "iteration-0" / "player").is_dir() and (run / "iteration-0" / "eval.json").exists()
    curve = json.loads((run / ".spinlm" / "iteration-0" / "train.done").read_text())["heldout_nll_by_epoch"]
    ended = json.loads((run / "iteration-0" / "eval.json").read_text())["heldout_nll"]
    assert curve == {"1": pytest.approx(ended, rel=1e-4)}
    before = contents(run)
    cli("run", world.recipe, *ruin, "--run-dir", run, folder=world.folder)
    assert contents(run) == before


def test_a_finished_run_keeps_no_checkpoints(reference):
    """Only an interrupted run needs checkpoints, and they take most of the disk."""
    assert not list(reference.glob("*/checkpoints"))
    assert {path.name for path in reference.glob(".spinlm/*/*.begun")} == {"generate.begun", "reference_logprobs.begun"}
    assert len(list(reference.glob("*/player"))) == 4  # of the start, of two iterations, and by the link


# What was measured


def test_a_memorized_response_leaves_nothing_to_learn(world, cli, tmp_path):
    """The opponent repeats the data: there are no pairs, the players do not change, and the start stays the best."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"What is {n}?", "response": "green"} for n in range(60)])
    result = cli(
        *("run", world.recipe, f"data.path={data}", "opponent.temperature=0", "--run-dir", tmp_path / "run"),
        folder=tmp_path,
    )
    assert "iteration 0: every synthetic response equals the real one" in result.err
    assert "did not help" in " ".join(result.out.split())
    run = RunDir(tmp_path / "run")
    start = (run.player(START) / "adapter_model.safetensors").read_bytes()
    for iteration in range(ITERATIONS):
        assert run.metadata("train", iteration)["steps"] == 0
        assert (run.player(iteration) / "adapter_model.safetensors").read_bytes() == start


@pytest.mark.parametrize("name", ["start", "iteration-0", "iteration-1"])
def test_metrics_are_means_over_responses(reference, name):
    metrics = json.loads((reference / name / "eval.json").read_text())
    responses = read_rows(reference / name / "heldout_greedy.jsonl")
    examples = {row["id"]: row for row in read_rows(reference / "examples" / "heldout.jsonl")}
    assert [row["id"] for row in responses] == list(examples)

    def mean(values):
        return pytest.approx(sum(values) / HELDOUT)

    assert metrics["task_score"] == mean([float(row["text"] == examples[row["id"]]["response"]) for row in responses])
    assert metrics["heldout_nll"] == mean([row["nll"] for row in responses])
    assert metrics["heldout_nll_se"] == pytest.approx(np.std([row["nll"] for row in responses], ddof=1) / HELDOUT**0.5)
    assert metrics["mean_tokens"] == mean([len(row["token_ids"]) for row in responses])
    assert metrics["truncated_rate"] == mean([not row["finished"] for row in responses])
    equal = [row["token_ids"] == examples[row["id"]]["response_ids"] for row in responses]
    assert metrics["identical_rate"] == mean(equal)
    assert ("margin" in metrics) == (name != "start")


def test_samples_are_scored_by_the_player_and_by_the_start(reference, theta_0, theta_2):
    """Log-probabilities and features equal those of the plain models, and the metrics follow from them."""
    examples = {row["id"]: row for row in read_rows(reference / "examples" / "heldout.jsonl")}
    samples = read_rows(reference / "iteration-1" / "heldout_sampled.jsonl")
    features: dict[str, list[np.ndarray]] = {"real": [], "own": []}
    for row in samples:
        prompt, real = examples[row["id"]]["prompt_ids"], examples[row["id"]]["response_ids"]
        assert row["logprob"] == pytest.approx(naive_logprob(theta_2, prompt, row["token_ids"]), abs=1e-4)
        assert row["start_logprob"] == pytest.approx(naive_logprob(theta_0, prompt, row["token_ids"]), abs=1e-4)
        for name, response in (("real", real), ("own", row["token_ids"])):
            with torch.no_grad():
                body = theta_0.get_base_model().model(torch.tensor([prompt + response])).last_hidden_state[0]
            features[name].append(body[len(prompt) - 1 : -1].mean(dim=0).numpy())
    metrics = json.loads((reference / "iteration-1" / "eval.json").read_text())
    tokens = sum(len(row["token_ids"]) for row in samples)
    kl = sum(row["logprob"] - row["start_logprob"] for row in samples) / tokens
    assert metrics["kl_from_start"] == pytest.approx(kl, abs=1e-6) and kl > 0
    expected = probe_auc(np.stack(features["real"]), np.stack(features["own"]))
    assert [metrics["probe_auc"], *metrics["intervals"]["probe_auc"]] == pytest.approx(expected, abs=1e-6)
    start = json.loads((reference / "start" / "eval.json").read_text())
    assert start["kl_from_start"] == 0.0


def test_heldout_nll_and_margin_are_those_of_the_plain_model(reference, theta_2):
    examples = {row["id"]: row for row in read_rows(reference / "examples" / "heldout.jsonl")}
    for row in read_rows(reference / "iteration-1" / "heldout_greedy.jsonl"):
        example = examples[row["id"]]
        logprob = naive_logprob(theta_2, example["prompt_ids"], example["response_ids"])
        assert row["nll"] == pytest.approx(-logprob / len(example["response_ids"]), abs=1e-5)
    margins = [
        (naive_logprob(theta_2, pair["prompt_ids"], pair["real_ids"]) - pair["opponent_real"])
        - (naive_logprob(theta_2, pair["prompt_ids"], pair["synthetic_ids"]) - pair["opponent_synthetic"])
        for pair in read_pairs(reference, 1, "heldout")
    ]
    metrics = json.loads((reference / "iteration-1" / "eval.json").read_text())
    assert metrics["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert metrics["pair_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


def test_pairs_open_with_datasets(reference):
    pairs = datasets.Dataset.from_file(str(reference / "iteration-1" / "pairs" / "train-00000.arrow"))
    assert pairs.column_names == list(Pair.__dataclass_fields__)
    assert len(pairs) > 0


# Other kinds of model


def test_full_fine_tuning(world, variant):
    run = variant("lora=null", "sft.learning_rate=2e-3", "train.optimizer=rmsprop", "train.learning_rate=2e-4")
    base = AutoModelForCausalLM.from_pretrained(world.model)
    first = AutoModelForCausalLM.from_pretrained(run / "iteration-0" / "player").eval()
    last = AutoModelForCausalLM.from_pretrained(run / "iteration-1" / "player").eval()
    for before, after in ((base, first), (first, last)):
        weights = dict(before.named_parameters())
        assert all((parameter != weights[name]).any() for name, parameter in after.named_parameters())
    for pair in read_pairs(run, 1, "train"):
        assert pair["opponent_real"] == pytest.approx(
            naive_logprob(first, pair["prompt_ids"], pair["real_ids"]), abs=1e-4
        )
    losses = [line["loss"] for line in steps(run) if line["stage"] == "train" and line["step"] == 1]
    assert losses == pytest.approx([LN2, LN2], abs=1e-5)


@pytest.mark.parametrize(("architecture", "prefix_sharing"), [("gpt_neo", True), ("bloom", False)])
def test_attention_that_transformers_does_not_exchange(world, cli, tmp_path, architecture, prefix_sharing):
    """Log-probabilities equal plain PEFT's: with GPT-Neo's local layers in trees, with ALiBi one response per row."""
    save_tiny_model(tmp_path / "model", architecture, "plain")
    changes = (f"model.path={tmp_path / 'model'}", "lora.dropout=0.0", "selfplay.iterations=1")
    said = cli("run", world.recipe, *changes, "--run-dir", "run", folder=tmp_path)
    run = tmp_path / "run"
    assert f"prefix sharing: {'on' if prefix_sharing else 'off'}" in said.err
    assert json.loads((run / ".spinlm" / "start" / "sft.done").read_text())["prefix_sharing"] is prefix_sharing
    theta = load_player(tmp_path / "model", run / "start" / "player")
    for pair in read_pairs(run, 0, "train"):
        synthetic = naive_logprob(theta, pair["prompt_ids"], pair["synthetic_ids"])
        assert pair["opponent_synthetic"] == pytest.approx(synthetic, abs=1e-4)
    first = next(line for line in steps(run) if line["stage"] == "train")
    assert first["loss"] == pytest.approx(LN2, abs=1e-5)


def test_chat_asks_several_players(world, cli, reference):
    said = cli("chat", reference, "--iteration", "start,1", "--prompt", "What is 4?", folder=world.folder)
    assert re.fullmatch(r"\n\[start.*\]\n.+\n\n\[iteration 1.*\]\n.+\n", said.out, re.DOTALL)
    said = cli("chat", reference, "--prompt", "What is 4?", folder=world.folder)
    best = (reference / "best").readlink().name
    titles = r"\[start \(best\)\]\n.+\n" if best == "start" else r"\[start\]\n.+\n\n\[iteration \d \(best\)\]\n.+\n"
    assert re.fullmatch(r"\n" + titles, said.out, re.DOTALL)
    other = cli("chat", reference, "--prompt", "What is 4?", "--system", "Be brief.", folder=world.folder)
    assert other.out != said.out
    refused = cli("chat", reference, "--prompt", "Hi", "--system", "<|im_end|>", folder=world.folder, code=2)
    assert "contains the control token" in refused.message
    refused = cli("chat", reference, "--prompt", "<|im_end|>", folder=world.folder, code=2)
    assert refused.message == "this prompt cannot be used: the text contains the control token <|im_end|>. Remove it"


def test_run_does_not_depend_on_the_folder_it_was_started_from(world, cli, reference, tmp_path):
    """The recipe names its model and data relative to itself."""
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    cli("chat", run, "--prompt", "What is 4?", folder=tmp_path)
    cli("export", run, "--merge", "--output", "whole", folder=tmp_path)
    cli("run", world.recipe, "--run-dir", run, folder=tmp_path)


# Before a run


@pytest.mark.parametrize(("setting", "checkpointing"), [("true", "on"), ("false", "off")])
def test_check(world, cli, tmp_path, setting, checkpointing):
    said = cli("check", world.recipe, f"train.gradient_checkpointing={setting}", folder=tmp_path)
    assert "the loss is 0.693147 (ln 2 = 0.693147)" in said.out
    assert "prefix sharing: on" in said.out and "prefix sharing" not in said.err
    assert "its log-probabilities differ from ours by" in said.out and "log-probabilities" not in said.err
    assert f"with gradient checkpointing {checkpointing}; peak memory" in said.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["evaluate.scorer=json_fields", "report_to=[nosuch]"])
def test_check_finds_what_would_end_a_run_later(world, cli, tmp_path, override):
    refused = cli("check", world.recipe, override, folder=tmp_path, code=2)
    assert override.partition("=")[2].strip("[]") in refused.message


def plainly(*arguments: str | Path, folder: Path, code: int = 0) -> tuple[str, set[str], float]:
    """Run a command without the server; returns its output, the heavy modules it imported, and its CPU seconds."""
    program = (
        "import atexit, sys; from spinlm.cli.app import main; "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate'}; "
        "atexit.register(lambda: print('imported:', *(heavy & set(sys.modules)))); "
        "main()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == code, done.stderr
    output, _, imported = done.stdout.rpartition("imported:")
    return output + done.stderr, set(imported.split()), seconds


@pytest.mark.parametrize("command", ["--help", "plan"])
def test_light_commands_import_nothing_heavy(world, tmp_path, command):
    arguments = (command,) if command == "--help" else (command, world.recipe)
    output, imported, seconds = plainly(*arguments, folder=tmp_path)
    assert len(output.splitlines()) > 10
    assert imported == set()
    assert seconds < 1


def test_mistake_in_a_recipe_is_shown_before_anything_heavy_is_imported(world, tmp_path):
    output, imported, _ = plainly("run", world.recipe, "train.epoch=1", folder=tmp_path, code=2)
    assert "train.epoch: unknown key; did you mean epochs?" in output
    assert imported == set()
    assert list(tmp_path.iterdir()) == []


def test_init_writes_a_recipe_to_start_from(tmp_path):
    output, imported, _ = plainly("init", folder=tmp_path)
    assert "wrote recipe.yaml" in output
    assert imported == set()
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.lora is not None
    (tmp_path / "recipe.yaml").write_text("mine")
    output, _, _ = plainly("init", folder=tmp_path, code=2)
    assert output.strip() == "spinlm: recipe.yaml: already exists. Choose another file"
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
