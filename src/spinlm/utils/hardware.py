"""The machine: the memory that this process may use, in bytes, and whether there is a GPU. Imports no torch."""

from pathlib import Path

import psutil

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where a container or a batch system says what it allows and what is used of that: cgroups 2 and 1."""


DEVICES = Path("/dev")
GPU_FILES = "nvidia[0-9]*", "dxg", "kfd"
"""What drivers put there for a GPU: CUDA's, that of Windows' subsystem for Linux, and ROCm's."""


def has_gpu() -> bool:
    """Whether there is one, as far as that shows without its libraries."""
    return any(any(DEVICES.glob(file)) for file in GPU_FILES)


def total_memory() -> int:
    """All that may be used."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """What can still be had."""
    return min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())])


def _limits() -> list[tuple[int, int]]:
    found = []
    for limit, used in CGROUPS:
        try:
            found.append((int(Path(limit).read_text()), int(Path(used).read_text())))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return found
