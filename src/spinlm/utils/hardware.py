"""Memory that this process may use, its threads, and whether the machine has a GPU. Imports no torch."""

import os
from pathlib import Path

import psutil

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),  # version 2
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),  # version 1
)
"""Memory limit and usage of a container or a batch job."""

DEVICES = Path("/dev")
GPU_DEVICE_FILES = "nvidia[0-9]*", "dxg", "kfd"
"""Device files of CUDA, the Windows Subsystem for Linux, and ROCm."""


SPIN_COUNT = "2000"
"""How long a thread of OpenMP spins before it sleeps. With OpenMP's own 300,000, two threads on two cores of which
another program takes one generate a third as fast as on idle cores; with this, 40% as fast, and 93% on idle cores."""


def limit_spinning() -> None:
    """Let threads that wait for each other sleep soon, unless the user has chosen. Call this before torch is imported.

    The number of threads stays: with another one, the last digits of a result may differ.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def has_gpu() -> bool:
    """Return whether a GPU's device file exists."""
    return any(any(DEVICES.glob(file)) for file in GPU_DEVICE_FILES)


def total_memory() -> int:
    """Return the bytes of memory that this process may use in all."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _cgroup_memory())])


def free_memory() -> int:
    """Return the bytes of memory that this process can still allocate."""
    return min([int(psutil.virtual_memory().available), *(limit - usage for limit, usage in _cgroup_memory())])


def _cgroup_memory() -> list[tuple[int, int]]:
    """Return limit and usage, in bytes, of each cgroup that has a limit."""
    pairs = []
    for limit, usage in CGROUP_FILES:
        try:
            pairs.append((int(Path(limit).read_text()), int(Path(usage).read_text())))
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
    return pairs
