"""Seeds for everything that is random, each derived from the recipe's seed and from what it is for."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**63 that depends on every part and on nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
