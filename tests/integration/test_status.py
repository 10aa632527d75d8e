"""The state of runs, for people and for programs."""

import fcntl
import json
import shutil

import pytest
from runs import change_marker, change_recipe, contents, read_jsons


def test_a_finished_run(reference, cli, tmp_path):
    output = cli("status", reference, folder=tmp_path).out
    assert output.startswith("The run is finished.\n") and "Last step" not in output
    assert "iteration 1" in output and "Self-play" in output
    values = json.loads(cli("status", reference, "--json", folder=tmp_path).out)
    assert (values["state"], values["stage"], values["iteration"]) == ("finished", None, None)
    assert values["last_step"] == read_jsons(reference, "train_log.jsonl")[-1]
    assert [player["name"] for player in values["players"]] == ["start", "iteration 0", "iteration 1"]
    metrics = json.loads((reference / "iteration-1" / "eval.json").read_text())
    assert metrics.items() <= values["players"][-1].items()
    markers = [json.loads(path.read_text()) for path in reference.rglob("*.done")]
    assert values["seconds"] == pytest.approx(sum(marker["seconds"] for marker in markers))


@pytest.mark.parametrize("stage", ["generate", "reference_logprobs", "regime", "train", "evaluate", "promote"])
def test_a_run_that_stopped(rewound, cli, tmp_path, stage):
    run = rewound(1, stage)
    assert f"{stage} of iteration 1 is not complete" in cli("status", run, folder=tmp_path).out
    values = json.loads(cli("status", run, "--json", folder=tmp_path).out)
    assert (values["state"], values["stage"], values["iteration"]) == ("stopped", stage, 1)


def test_progress_of_training(stopped_in_training, cli, tmp_path):
    step = read_jsons(stopped_in_training, "train_log.jsonl")[-1]
    assert (
        f"\nLast step: {step['step']}/{step['steps']}, loss " in cli("status", stopped_in_training, folder=tmp_path).out
    )


def test_progress_of_a_stage_without_training(rewound, cli, tmp_path):
    """Progress counts the files of the stage. 24 prompts, 10 held-out prompts, shard size 4."""
    run = rewound(1)
    for folder, kind, stage in (("generations", "jsonl", "generate"), ("pairs", "arrow", "reference_logprobs")):
        assert "\n0/34 prompts done (shard size 4).\n" in cli("status", run, folder=tmp_path).out
        (run / "iteration-1" / folder).mkdir(exist_ok=True)
        # Ten prompts in shards of 4, 4 and 2; and files with other names.
        for shard in ("train-00000", "heldout-00000", "heldout-00002", ".train-00001", "train-00000.copy-2", "a-b-c"):
            (run / "iteration-1" / folder / f"{shard}.{kind}").write_text("")
        assert "\n10/34 prompts done" in cli("status", run, folder=tmp_path).out
        (run / ".spinlm" / "iteration-1" / f"{stage}.done").write_text("{}")
    assert "Last step" not in cli("status", run, folder=tmp_path).out


def test_a_run_without_players(reference, cli, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    for folder in ("iteration-0", "iteration-1", "start"):
        shutil.rmtree(run / folder)
        shutil.rmtree(run / ".spinlm" / folder)
    (run / "best").unlink()
    for command in (("chat", run, "--prompt", "p"), ("export", run, "--output", "new")):
        refused = cli(*command, folder=tmp_path, code=2)
        assert "has no player yet" in refused.message
    output = cli("report", run, folder=tmp_path).out
    assert "No player has been evaluated yet" in output and (run / "report.html").exists()


def test_the_last_error_is_kept_until_the_next_attempt(world, cli, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "response": ""}\n' * 60)
    run = tmp_path / "run"
    refused = cli("run", world.recipe, f"data.path={bad}", "--run-dir", run, folder=world.folder, code=2)
    values = cli("status", run, folder=tmp_path).out
    assert "prepare is not complete" in values and f"The last attempt ended with: {refused.message}" in " ".join(
        values.split()
    )
    assert json.loads(cli("status", run, "--json", folder=tmp_path).out)["error"] == refused.message
    other = cli("run", world.recipe, "evaluate.scorer=none:f", "--run-dir", run, folder=world.folder, code=2)
    assert json.loads(cli("status", run, "--json", folder=tmp_path).out)["error"] == other.message


def test_unreadable_first_rows_are_skipped_on_request(world, cli, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{\n" * 120 + (world.folder / "data.jsonl").read_text())
    few = ("sft=null", "selfplay.iterations=1", "data.prompts=4", "data.heldout=2", "data.on_bad_row=skip")
    for command in ("plan", "run"):
        cli(command, world.recipe, f"data.path={data}", *few, "--run-dir", tmp_path / "run", folder=world.folder)


def test_a_successful_run_removes_the_error(world, rewound, cli, tmp_path):
    run = rewound(1)
    (run / "error.txt").write_text("what was wrong before\n")
    assert "what was wrong before" in cli("status", run, folder=tmp_path).out
    cli("run", world.recipe, "--run-dir", run, folder=world.folder)
    assert not (run / "error.txt").exists()
    assert json.loads(cli("status", run, "--json", folder=tmp_path).out)["error"] is None


def test_a_run_under_way(rewound, cli, tmp_path):
    run = rewound(1, "train")
    complete = read_jsons(run, "train_log.jsonl")[-1]
    with (run / "train_log.jsonl").open("a") as file:
        file.write('{"stage": "tra')  # a line that is still being written
    with (run / ".spinlm" / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        values = json.loads(cli("status", run, "--json", folder=tmp_path).out)
    assert (values["state"], values["stage"]) == ("running", "train")
    assert values["last_step"] == complete


def test_a_run_that_promote_ended(reference, cli, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    change_marker(run / ".spinlm" / "iteration-1" / "promote.done", go_on=False)
    change_recipe(run, selfplay={"iterations": 4})
    assert cli("status", run, folder=tmp_path).out.startswith("The run is finished.")


def test_a_list_of_runs(reference, rewound, cli, tmp_path):
    assert cli("list", folder=tmp_path).out == "no runs in runs\n"
    (tmp_path / "runs" / "something else").mkdir(parents=True)
    shutil.copytree(reference, tmp_path / "runs" / "whole", symlinks=True)
    rewound(0, "reference_logprobs").rename(tmp_path / "runs" / "part")
    output = cli("list", folder=tmp_path).out
    assert (
        "whole" in output and "part" in output and "stopped, reference_logprobs" in output and "something" not in output
    )
    assert "Self-play" not in output and max(map(len, output.splitlines())) > 40
    narrow = cli("list", folder=tmp_path, COLUMNS="40").out
    assert max(map(len, narrow.splitlines())) <= 40
    for odd in ("", "0", "wide"):
        assert cli("list", folder=tmp_path, COLUMNS=odd).out == output
    values = [json.loads(line) for line in cli("list", "--json", folder=tmp_path).out.splitlines()]
    assert [(run["run"], run["state"]) for run in values] == [("runs/part", "stopped"), ("runs/whole", "finished")]


def test_regimes(reference, world, cli, tmp_path):
    """Status and report show the regime of each iteration, and so does check, which writes nothing into the run."""
    (first, second) = json.loads(cli("status", reference, "--json", folder=tmp_path).out)["regimes"]
    stored = json.loads((reference / "iteration-0" / "regime.json").read_text())
    assert stored.items() <= first.items() and second["iteration"] == 1
    marker = json.loads((reference / ".spinlm" / "iteration-0" / "train.done").read_text())
    assert first["measured"]["beta_margin_by_epoch"] == pytest.approx(
        [0.1 * margin for margin in marker["margin_by_epoch"]]
    )
    assert len(first["forecast"]["beta_margin_by_epoch"]) == 2
    text = " ".join(cli("status", reference, folder=tmp_path).out.split())
    assert f"Iteration 1: {second['sentences'][0]}" in text
    before = contents(reference)
    checked = cli("check", world.recipe, "--start-from", reference, folder=world.folder)
    assert "regime: β = 0.1 on responses of" in checked.out and "Forecast" in checked.out
    assert contents(reference) == before
