"""Memory that this process may use, and whether the machine has a GPU. Imports no torch."""

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
