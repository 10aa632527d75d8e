"""What a resumed run may change, and what it may not."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from rundirs import CHAIN, finish, finish_sft

from spinlm.errors import RunError
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.resume import claim_recipe, verify_inputs
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"path": "d"}} | changes)


def iterations(count: int, section: str = "train", **values: Any) -> Recipe:
    return recipe(selfplay={"iterations": count}, **{section: values})


def test_other_recipe_is_refused_once_a_stage_is_complete(run):
    claim_recipe(run, recipe())
    assert run.is_run()
    assert read_recipe(run) == yaml.safe_load(run.recipe.read_text()) == recipe().model_dump(mode="json")
    claim_recipe(run, recipe(seed=1))  # nothing was made from the first one
    assert read_recipe(run)["seed"] == 1
    finish(run, ("prepare", START))
    claim_recipe(run, recipe(seed=1))
    with pytest.raises(RunError) as caught:
        claim_recipe(run, recipe(train={"epochs": 7}))
    message = str(caught.value)
    assert "seed: was 1, is 0" in message and "train.epochs: was 2, is 7" in message and str(run.root) in message
    assert read_recipe(run)["seed"] == 1


def test_mutable_fields_may_change(run):
    claim_recipe(run, recipe())
    finish(run, ("prepare", START))
    claim_recipe(run, recipe(train={"save_steps": 7}))
    assert read_recipe(run)["train"]["save_steps"] == 7


def test_more_iterations_continue_a_run_and_fewer_do_not(run):
    claim_recipe(run, iterations(2))
    finish(run, ("prepare", START))
    claim_recipe(run, iterations(3))
    with pytest.raises(RunError, match=r"selfplay\.iterations: was 3, is 2"):
        claim_recipe(run, iterations(2))


@pytest.mark.parametrize("name", ["train.learning_rate", "objective.beta"])
def test_added_iterations_have_their_own_values(run, name):
    section, key = name.split(".")

    def with_values(count: int, value: Any) -> Recipe:
        return iterations(count, section, **{key: value})

    claim_recipe(run, with_values(2, [0.5, 0.25]))
    finish(run, ("prepare", START))
    claim_recipe(run, with_values(3, [0.5, 0.25, 0.125]))
    for count, value in ((4, [0.5, 0.25, 0.5, 0.5]), (4, 0.5), (2, [0.5, 0.25])):
        with pytest.raises(RunError, match="different recipe"):
            claim_recipe(run, with_values(count, value))
    assert read_recipe(run)[section][key] == [0.5, 0.25, 0.125]


def test_one_value_may_become_a_list_with_that_value(run):
    claim_recipe(run, iterations(2, "objective", beta=0.1))
    finish(run, ("prepare", START))
    claim_recipe(run, iterations(3, "objective", beta=[0.1, 0.1, 5.0]))


def test_recipe_is_fixed_while_any_stage_is_complete(run):
    """Even if prepare.done was deleted, as the message about a changed file asks for."""
    claim_recipe(run, recipe())
    finish(run, *CHAIN)
    run.marker("prepare", START).unlink()
    with pytest.raises(RunError, match="seed: was 0, is 1"):
        claim_recipe(run, recipe(seed=1))


@pytest.mark.parametrize("edit", ["", "model: damaged\n", None])
def test_recipe_file_that_was_edited(run, edit):
    """Commands that read the file refuse it. The original recipe restores it; another recipe cannot be compared."""
    finish_sft(run)
    claim_recipe(run, recipe())
    original = run.recipe.read_bytes()
    for _ in range(2):
        run.recipe.unlink() if edit is None else run.recipe.write_text(edit)
        with pytest.raises(RunError, match=r"recipe\.yaml: has changed"):
            read_recipe(run)
        with pytest.raises(RunError, match=r"recipe\.yaml: has changed"):
            claim_recipe(run, recipe(train={"save_steps": 7}))
        claim_recipe(run, recipe())
        assert run.recipe.read_bytes() == original


def test_folder_without_a_run(run):
    with pytest.raises(RunError, match="no run here"):
        read_recipe(run)


def test_run_whose_first_write_failed_can_be_started_again(run, monkeypatch):
    """For example on a full disk. The same holds between writing the recipe and recording its digest."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError), run.locked():
        patch.setattr(os, "fsync", full)
        claim_recipe(run, recipe())
    with run.locked():
        claim_recipe(run, recipe())
    run.digest_file(run.recipe).unlink()
    with run.locked():
        claim_recipe(run, recipe())
    assert read_recipe(run) == recipe().model_dump(mode="json")


def test_changed_model_or_data_is_refused(run):
    inputs = {"data": {"sha256": "a"}, "model": {"model.safetensors": 100}}
    verify_inputs(run, inputs)  # no provenance.json yet
    write_json(run.provenance, {"inputs": {"data": {"sha256": "the first try"}}, "python": "3"})
    verify_inputs(run, inputs)  # no stage is complete
    write_json(run.provenance, {"inputs": inputs, "python": "3"})
    finish(run, ("prepare", START))
    verify_inputs(run, inputs)
    with pytest.raises(RunError) as caught:
        verify_inputs(run, {"data": {"sha256": "b"}, "model": {"model.safetensors": 100, "config.json": "x"}})
    message = str(caught.value)
    assert 'data.sha256: was "a", is "b"' in message and 'model.config.json: was null, is "x"' in message


def test_hub_model_can_be_pinned_to_the_commit_the_run_began_with(run):
    finish_sft(run)
    claim_recipe(run, recipe())
    write_json(run.provenance, {"inputs": {"data": {"sha256": "a"}, "model": {"id": "m", "commit": "abc"}}})
    for other in ("new", "abcd"):
        with pytest.raises(RunError, match="different recipe"):
            claim_recipe(run, recipe(model={"path": "m", "revision": other}))
    claim_recipe(run, recipe(model={"path": "m", "revision": "abc"}))
