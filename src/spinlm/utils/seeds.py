"""Random seeds, each derived from the recipe's seed and from what it is for."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Derive a seed below 2**63 from its parts. Equal parts always give the same seed."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
