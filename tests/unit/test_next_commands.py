"""The commands that a run recommends at its end."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spinlm.cli import run


@pytest.mark.parametrize("has_script", [True, False])
def test_the_program_starts_without_an_activated_environment(
    has_script: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_script:
        python = tmp_path / "python"
        python.symlink_to(sys.executable)
        monkeypatch.setattr(sys, "executable", str(python))
    command = shlex.split(run._program())
    assert command[1:] == ([] if has_script else ["-m", "spinlm"])
    if has_script:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("spinlm ")


def test_the_program_is_named_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / ".venv" / "bin" / "spinlm"
    script.parent.mkdir(parents=True)
    script.touch()
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.chdir(tmp_path)
    assert run._program() == ".venv/bin/spinlm"
