"""Constants of training memory. Imports no torch, so that `spinlm plan` can use them."""

MEMORY_MARGIN = 1.25
"""Safety factor on activation memory, for temporaries and fragmentation."""

OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "adam": 8, "adamw": 8, "nadam": 8, "radam": 8}
"""Optimizer state per trained parameter, in bytes."""


def optimizer_bytes(name: str) -> int:
    """Return the bytes of optimizer state per trained parameter. An unknown optimizer counts like AdamW: 8 bytes."""
    return OPTIMIZER_BYTES.get(name.lower(), 8)
