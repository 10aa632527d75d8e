"""Trackers get what train_log.jsonl gets, and stay off the network where that is asked for."""

import json

import pytest
from runs import steps


@pytest.fixture
def tracked(world, rewound, cli):
    """Runs the second iteration with a tracker; returns the run folder, and what it wrote about the training steps."""

    def run(name, **environment):
        folder = rewound(1)
        cli("run", world.recipe, f"report_to=[{name}]", "--run-dir", folder, folder=world.folder, **environment)
        return folder, [line for line in steps(folder) if (line["stage"], line["iteration"]) == ("train", 1)]

    return run


def test_tensorboard(tracked):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, lines = tracked("tensorboard")
    found = events.EventAccumulator(str(run / "spinlm")).Reload()
    for name in ("loss", "margin", "learning_rate", "grad_norm"):
        values = [point.value for point in found.Scalars(f"train/{name}")]
        assert values == pytest.approx([line[name] for line in lines])
    measured = json.loads((run / "iteration-1" / "eval.json").read_text())
    for name in ("task_score", "heldout_nll", "margin", "kl_from_start"):
        (point,) = found.Scalars(f"evaluate/{name}")
        assert point.value == pytest.approx(measured[name]) and point.step == len(steps(run))
    numbers = [point.step for point in found.Scalars("train/loss")]
    assert numbers == list(range(numbers[0], numbers[0] + len(lines))) and numbers[-1] == len(steps(run))


def test_wandb_without_a_network(tracked, world):
    pytest.importorskip("wandb")
    run, lines = tracked("wandb", WANDB_MODE="offline")
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert content.count(b"train/loss") >= len(lines) > 0
    assert not (world.folder / "wandb").exists()


def test_trackio_without_a_network(tracked, tmp_path):
    sqlite3 = pytest.importorskip("sqlite3")
    pytest.importorskip("trackio")
    _, lines = tracked("trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    (file,) = (tmp_path / "trackio").glob("spinlm*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    logged = [row for row in rows if "train/loss" in str(row[1])]
    assert len(logged) == len(lines) > 0
    assert f"{lines[-1]['loss']:.6f}"[:6] in str(logged[-1][1])
