"""A seed depends on its parts and on nothing else."""

import subprocess
import sys

from spinlm.utils.seeds import derive_seed


def test_literal_values():
    """The first eight bytes of SHA-256("a/b/…"), shifted right by one bit. These values must never change."""
    assert derive_seed(0) == 0x5FECEB66FFC86F38 >> 1  # sha256("0") = 5feceb66ffc86f38…
    assert derive_seed("abc") == 0xBA7816BF8F01CFEA >> 1  # the standard's own example
    assert derive_seed(0, "train", 1) == derive_seed("0/train/1")


def test_every_part_counts():
    seeds = {
        derive_seed(seed, purpose, iteration, split, shard)
        for seed in (0, 1)
        for purpose in ("generate", "evaluate")
        for iteration in range(3)
        for split in ("train", "heldout")
        for shard in range(5)
    }
    assert len(seeds) == 2 * 2 * 3 * 2 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_another_process_derives_the_same_seed():
    """Unlike `hash`, which differs from process to process."""
    program = "from spinlm.utils.seeds import derive_seed; print(derive_seed(7, 'generate', 1, 'train', 3))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(found.stdout) == derive_seed(7, "generate", 1, "train", 3)
