"""Controls: scores by temperature, runs in one table, and extrapolated players."""

import json
import shlex
import shutil

import pytest
import torch
from runs import contents, read_rows
from safetensors.torch import load_file

SMALL = ("sft=null", "data.prompts=4", "selfplay.iterations=1", "train.epochs=1")


def test_held_out_responses_at_further_temperatures(world, cli, tmp_path):
    """Greedy and sampled responses stay what they are without further temperatures."""
    commands = {"plain": SMALL, "run": (*SMALL, "evaluate.temperatures=[0.2, 1]")}
    for name, changes in commands.items():
        cli("run", world.recipe, *changes, "--run-dir", tmp_path / name, folder=world.folder)
    for player in ("start", "iteration-0"):
        for name in ("heldout_greedy.jsonl", "heldout_sampled.jsonl"):
            ours, plain = ((tmp_path / run / player / name).read_bytes() for run in ("run", "plain"))
            assert ours == plain
        sampled = read_rows(tmp_path / "run" / player / "heldout_sampled.jsonl")
        rows = read_rows(tmp_path / "run" / player / "heldout_temperatures.jsonl")
        assert [row["temperature"] for row in rows] == [0.2] * 10 + [1.0] * 10
        for field in ("id", "token_ids", "task_score"):
            assert [row[field] for row in rows[10:]] == [row[field] for row in sampled]
        assert [row["token_ids"] for row in rows[:10]] != [row["token_ids"] for row in rows[10:]]
        metrics = json.loads((tmp_path / "run" / player / "eval.json").read_text())
        means = {"0.2": sum(row["task_score"] for row in rows[:10]) / 10, "1": metrics["sampled_task_score"]}
        assert metrics["task_score_by_temperature"] == pytest.approx(means)
    assert not (tmp_path / "plain" / "start" / "heldout_temperatures.jsonl").exists()
    values = json.loads(cli("status", "run", "--json", folder=tmp_path).out)
    assert set(values["players"][1]["task_score_by_temperature_se"]) == {"0.2", "1"}
    cli("report", "run", folder=tmp_path)
    assert "Task score by temperature" in (tmp_path / "run" / "report.html").read_text()


def test_runs_in_one_table(world, cli, reference, tmp_path):
    changes = {
        "control": ["objective={name: sft}"],
        "own": ["objective={beta: 1}", "selfplay.guard={max_nll_increase: 9}"],
    }
    for name, settings in changes.items():
        command = ("run", world.recipe, *settings, "selfplay.iterations=1", "train.epochs=1")
        cli(*command, "--run-dir", tmp_path / name, "--start-from", reference, folder=world.folder)
    values = json.loads(cli("compare", reference, "control", "own", "--json", folder=tmp_path).out)
    assert (values["metric"], values["baseline"], values["prompts"]) == ("task_score", "the start", 10)
    settings = [player["settings"] for player in values["players"]]
    shared = "train.epochs=1"
    guard = {"max_nll_increase": 9.0, "max_truncated_increase": 0.2, "max_repetition_increase": 0.1}
    guarded = ", ".join(f"selfplay.guard.{name}={value}" for name, value in guard.items())
    assert settings == ["", "spin", f"sft, {shared}", f"spin, {guarded}, objective.beta=1.0, {shared}"]
    # 24 prompts in steps of 4 pairs, 2 epochs, the second iteration with twice the pairs: 12 + 24. One epoch: 6.
    assert [(row["iteration"], row["steps"]) for row in values["players"]] == [(-1, 0), (1, 36), (0, 6), (0, 6)]
    start = {row["id"]: row["nll"] for row in read_rows(tmp_path / "own" / "start" / "heldout_greedy.jsonl")}
    own = {row["id"]: row["nll"] for row in read_rows(tmp_path / "own" / "iteration-0" / "heldout_greedy.jsonl")}
    gains = [start[key] - own[key] for key in start]
    mean = sum(gains) / 10
    error = (sum((gain - mean) ** 2 for gain in gains) / 9 / 10) ** 0.5
    difference = values["players"][3]["differences"]["heldout_nll"]
    assert difference["mean"] == pytest.approx(mean)
    assert difference["interval"] == pytest.approx([mean - 1.95996 * error, mean + 1.95996 * error], abs=1e-6)
    shown = cli("compare", "own:0", f"{reference}:0", f"{reference}:1", "--baseline", "control", folder=tmp_path).out
    lines = [line.split() for line in shown.splitlines()]
    assert [line[0] for line in lines[2:] if line[0] != "Difference:" and "iteration" in line] == ["own", "run", "run"]
    assert "selfplay.guard=null" in "".join(shown.split())  # of the reference, whose recipe has no guard
    assert "compared with control after iteration 0" in " ".join(shown.split())


def test_runs_of_other_starts_are_refused(world, cli, reference, tmp_path):
    cli("run", world.recipe, *SMALL, "data.prompts=24", "--run-dir", tmp_path / "other", folder=world.folder)
    refused = cli("compare", reference, "other", folder=tmp_path, code=2)
    assert "their starts give other responses" in refused.message
    assert "no run here" in cli("compare", reference, "missing", folder=tmp_path, code=2).message
    assert "has no player 7" in cli("compare", f"{reference}:7", folder=tmp_path, code=2).message


def nlls(player):
    return [row["nll"] for row in read_rows(player / "heldout_greedy.jsonl")]


def test_extrapolated_adapters(world, cli, reference, tmp_path):
    """Factor 0 gives the start and factor 1 the player, by their NLL in nats per token."""
    for factor, player in ((0, "start"), (1, "iteration-1")):
        run = tmp_path / f"by-{factor}"
        said = cli("extrapolate", reference, "--factor", factor, "--run-dir", run, folder=tmp_path)
        assert nlls(run / "iteration-0") == pytest.approx(nlls(reference / player), abs=1e-5)
        assert f"Extrapolation by {factor}" in said.out
        assert (run / "start" / "player" / "adapter_model.safetensors").read_bytes() == (
            reference / "start" / "player" / "adapter_model.safetensors"
        ).read_bytes()
    run = tmp_path / "far"
    cli("extrapolate", reference, "--factor", "2.5", "--iteration", 0, "--run-dir", run, folder=tmp_path)
    marker = json.loads((run / ".spinlm" / "iteration-0" / "train.done").read_text())
    source = json.loads((reference / ".spinlm" / "iteration-0" / "train.done").read_text())
    assert marker["extrapolated_from"] == {
        **{"name": "extrapolate", "run": str(reference), "iteration": 0, "factor": 2.5},
        "player": source["digest"],
    }
    # The run is complete, and a killed one continues from its last complete stage to the same files.
    before = contents(run)
    for name in ("train", "evaluate", "promote"):
        (run / ".spinlm" / "iteration-0" / f"{name}.done").unlink()
    shutil.rmtree(run / "iteration-0" / "player")
    cli("extrapolate", reference, "--factor", "2.5", "--iteration", 0, "--run-dir", run, folder=tmp_path)
    assert contents(run) == before
    said = cli("run", run / "recipe.yaml", "--run-dir", run, folder=tmp_path).out
    line = next(line for line in said.splitlines() if " compare " in line)
    command = shlex.split(line, comments=True)
    assert contents(run) == before
    values = json.loads(cli(*command[command.index("compare") :], "--json", folder=tmp_path).out)
    assert [row["steps"] for row in values["players"]] == [0, 12, 12]
    assert values["players"][2]["settings"].startswith('extrapolate, objective.run="run", ')
    refused = cli("extrapolate", run, "--factor", 2, "--run-dir", tmp_path / "again", folder=tmp_path, code=2)
    assert "--iteration 0 --factor 5" in refused.message
    cli("chat", run, "--prompt", "What is 1?", folder=tmp_path)
    cli("report", run, folder=tmp_path)
    cli("export", run, "--iteration", "0", "--merge", "--output", tmp_path / "merged", folder=tmp_path)


def test_extrapolated_whole_models(world, cli, tmp_path):
    cli("run", world.recipe, *SMALL, "lora=null", "--run-dir", tmp_path / "run", folder=world.folder)
    cli("extrapolate", "run", "--factor", 2, "--run-dir", "far", folder=tmp_path)
    start, trained, far = (
        load_file(tmp_path / player / "player" / "model.safetensors")
        for player in ("run/start", "run/iteration-0", "far/iteration-0")
    )
    moved = [name for name in start if not torch.equal(start[name], trained[name])]
    assert moved and all(torch.allclose(far[name], 2 * trained[name] - start[name], atol=1e-6) for name in start)
