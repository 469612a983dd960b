"""Damage files: flip bits of a byte, or cut the end off."""

import numpy as np


def damaged_copies(content, count, seed=0):
    """Yield `count` copies of the bytes with one byte changed, and `count` copies that are cut, at random places."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= int(rng.integers(1, 256))
        yield bytes(changed)
    for _ in range(count):
        yield content[:rng.integers(len(content))]


def write_bytes(path, content):
    """Write a file without any checksum."""
    with open(path, "wb") as f:
        f.write(content)
