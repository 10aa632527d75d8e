"""How far runs have come: for people, and for programs."""

import fcntl
import json
import shutil

import pytest
from runs import change_marker, read_jsons

from spinlm.rundir import RunDir


def test_a_finished_run(reference, cli, tmp_path):
    said = cli("status", reference, folder=tmp_path).out
    assert said.startswith("The run is finished.\nLast step: train of iteration 1, ")
    assert "iteration 1" in said and "Self-play" in said
    told = json.loads(cli("status", reference, "--json", folder=tmp_path).out)
    assert (told["state"], told["stage"], told["iteration"]) == ("finished", None, None)
    assert told["last_step"] == read_jsons(reference, "metrics.jsonl")[-1]
    assert [player["name"] for player in told["players"]] == ["start", "iteration 0", "iteration 1"]
    metrics = json.loads((reference / "iteration-1" / "metrics.json").read_text())
    assert metrics.items() <= told["players"][-1].items()
    markers = [json.loads(path.read_text()) for path in reference.rglob("*.done")]
    assert told["seconds"] == pytest.approx(sum(marker["seconds"] for marker in markers))


@pytest.mark.parametrize("stage", ["generate", "score", "train", "evaluate", "promote"])
def test_a_run_that_stopped(rewound, cli, tmp_path, stage):
    run = rewound(1, stage)
    assert f"{stage} of iteration 1 is not complete" in cli("status", run, folder=tmp_path).out
    told = json.loads(cli("status", run, "--json", folder=tmp_path).out)
    assert (told["state"], told["stage"], told["iteration"]) == ("stopped", stage, 1)


def test_a_run_under_way(rewound, cli, tmp_path):
    run = rewound(1, "train")
    complete = read_jsons(run, "metrics.jsonl")[-1]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tra')  # being written
    with (run / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        told = json.loads(cli("status", run, "--json", folder=tmp_path).out)
    assert (told["state"], told["stage"]) == ("under way", "train")
    assert told["last_step"] == complete


def test_a_run_that_promotion_ended(reference, cli, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    change_marker(run / "iteration-1" / "promote.done", go_on=False)
    recipe = json.loads((run / "recipe.resolved.json").read_text())
    recipe["selfplay"]["iterations"] = 4
    (run / "recipe.resolved.json").write_text(json.dumps(recipe))
    RunDir(run).seal(run / "recipe.resolved.json")
    assert cli("status", run, folder=tmp_path).out.startswith("The run is finished.")


def test_a_list_of_runs(reference, rewound, cli, tmp_path):
    assert cli("runs", folder=tmp_path).out == "no runs in runs\n"
    (tmp_path / "runs" / "something else").mkdir(parents=True)
    shutil.copytree(reference, tmp_path / "runs" / "whole", symlinks=True)
    rewound(0, "score").rename(tmp_path / "runs" / "part")
    said = cli("runs", folder=tmp_path).out
    assert "whole" in said and "part" in said and "stopped, score" in said and "something" not in said
    told = [json.loads(line) for line in cli("runs", "--json", folder=tmp_path).out.splitlines()]
    assert [(one["run"], one["state"]) for one in told] == [("runs/part", "stopped"), ("runs/whole", "finished")]
