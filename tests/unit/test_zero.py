"""What is said where DeepSpeed cannot be used. That it computes the same is shown with two processes."""

import sys
from pathlib import Path

import pytest

from models import tiny_recipe
from spinlm.distributed import processes
from spinlm.errors import MissingPackageError
from spinlm.model.zero import check_deepspeed
from spinlm.rundir.layout import RunDir
from spinlm.stages.prepare import prepare


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is imported as deepspeed."""
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "deepspeed.py"


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("import not_there", "not installed (not_there). Run: pip install 'spinlm[deepspeed]'"),
        ("raise FileNotFoundError('no nvcc')", "cannot be loaded: no nvcc"),
    ],
)
def test_deepspeed_that_cannot_be_used(stand_in: Path, does: str, said: str) -> None:
    stand_in.write_text(does, encoding="utf-8")
    with pytest.raises(MissingPackageError) as caught:
        check_deepspeed()
    assert said in str(caught.value) and "train.sharding: full" in str(caught.value)


def test_a_missing_one_is_told_before_anything_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(processes, "size", lambda: 2)
    run = RunDir(tmp_path / "run")
    with pytest.raises(MissingPackageError, match=r"spinlm\[deepspeed\]"):
        prepare(tiny_recipe(tmp_path, train={"sharding": "zero-2"}), run)
    assert not run.root.exists()
