"""A run must not use the network, save a key, write outside its folder, or execute data."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import RECIPE, World, rows, write_rows

KEYS = ("HF_TOKEN", "OPENAI_API_KEY", "SPINLM_SERVER_KEY", "SPINLM_JUDGE_KEY", "WANDB_API_KEY")
SECRET = "sk-do-not-keep-me-1234567890"
CLEAR = "\x1b[2J"  # to a terminal: clear the screen

GUARDED = """
import socket, sys

def refuse(*arguments, **more):
    print("REACHED FOR THE NETWORK", arguments, file=sys.stderr)
    raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from spinlm.cli.app import main
sys.argv[0] = "spinlm"
main()
"""


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its report and an exported player. Keys were in the environment; there was no network."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(world.folder, place / "work")
    commanding = [{**row, "response": f"{row['response']}{CLEAR}"} for row in rows()]
    write_rows(place / "work" / "data.jsonl", commanding)
    for folder in ("home", "temporary"):
        (place / folder).mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= dict.fromkeys(KEYS, SECRET) | {"HOME": str(place / "home"), "TMPDIR": str(place / "temporary")}
    for arguments in (
        ("run", "recipe.yaml", "--run-dir", "run"),
        ("report", "run"),
        ("export", "run", "--merge", "--output", "run/exported"),
        ("plan", "recipe.yaml"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", GUARDED, *arguments],
            cwd=place / "work",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "REACHED" not in done.stderr
        assert SECRET not in done.stdout + done.stderr
        (place / arguments[0]).write_text(done.stdout + done.stderr)
    return place


def test_without_a_network(place):
    assert (place / "work" / "run" / "report.html").exists()  # it has come to its end


def test_no_key_is_saved(place):
    kept = [path for path in place.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not kept


def test_nothing_is_written_outside_the_run_folder(place, world):
    before = {path.relative_to(world.folder) for path in world.folder.rglob("*")}
    after = {path.relative_to(place / "work") for path in (place / "work").rglob("*")}
    assert {path for path in after - before if path.parts[0] != "run"} == set()
    assert [path for folder in ("home", "temporary") for path in (place / folder).rglob("*") if path.is_file()] == []


def test_no_pickles_are_written(place):
    assert not [path for path in place.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_output_cannot_control_the_terminal(cli, world, place):
    shown = (place / "run").read_text()
    assert r"\x1b[2J" in shown and CLEAR not in shown
    assert r"no\x1b[2J.yaml" in cli("plan", f"no{CLEAR}.yaml", folder=world.folder, code=2).message


class Trap:
    """Runs a command when unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_weights_are_not_executed(cli, world, tmp_path):
    shutil.copytree(world.model, tmp_path / "model")
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    weights.unlink()
    trap = Trap(f"touch {tmp_path / 'sprung'}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(trap, protocol=2))
    shutil.copy(world.folder / "data.jsonl", tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    result = cli("run", "recipe.yaml", folder=tmp_path, code=2)
    assert "pickle that holds more than tensors" in result.message
    assert not (tmp_path / "sprung").exists()


def test_model_code_is_not_executed_unless_allowed(cli, world, tmp_path):
    shutil.copytree(world.model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    text = config.read_text().replace('"model_type": "llama"', '"model_type": "own"')
    config.write_text(
        text.replace("{", '{"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},', 1)
    )
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n", encoding="utf-8")
    shutil.copy(world.folder / "data.jsonl", tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    refused = cli("run", "recipe.yaml", folder=tmp_path, code=2).message
    assert "model.trust_remote_code: true" in refused
    assert not (tmp_path / "sprung").exists()
    allowed = cli.start("run", "recipe.yaml", "model.trust_remote_code=true", "--overwrite", folder=tmp_path).wait()
    assert "model.trust_remote_code is on" in allowed.err


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch sprung']\n",
        "model: !!python/name:os.system\n",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
        "m0: &m0 {k: 1}\n" + "".join(f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 9)}]\n" for n in range(1, 9)),
        "report_to: &a [x]\nmodel: {path: *a}\n",
        "data: &d {path: *d}\n",
        "# " + "x" * 1_000_000,
    ],
    ids=["a command", "a name", "a bomb", "a bomb of merge keys", "an alias", "itself", "a megabyte"],
)
def test_hostile_recipes(cli, tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    began = time.monotonic()
    result = cli("run", "recipe.yaml", folder=tmp_path, code=2)
    assert time.monotonic() - began < 20
    assert "recipe.yaml" in result.message and len(result.err) < 5000
    assert not (tmp_path / "sprung").exists()
