"""Threads that wait for each other."""

import os
import subprocess
import sys

import pytest

SCRIPT = "from spinlm.utils.hardware import limit_spinning; limit_spinning(); import torch"


@pytest.mark.parametrize(
    ("chosen", "count"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["default", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has GNU's OpenMP on Linux only")
def test_threads_sleep_soon(chosen: dict[str, str], count: str) -> None:
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = unset | chosen | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
