"""Counter-based randomness: every draw is a pure function of (seed, purpose, step, lane).

No global random state is used, so a resumed run, another number of ranks or another machine draws the same numbers.
The generator is Philox 4x64 (Salmon et al., 'Parallel random numbers: as easy as 1, 2, 3', SC 2011).
"""

from __future__ import annotations

import hashlib

import numpy as np

MAX_SEED = 2**64 - 1  # of PyTorch and of episode files


def generator(seed: int, purpose: str, step: int = 0, lane: int = 0) -> np.random.Generator:
    """A numpy generator for (seed, purpose, step, lane); different arguments never share numbers.

    `seed` and `purpose` (such as "noise") make the key, `step` and `lane` the two upper words of the 256-bit counter,
    which leaves 2^128 blocks of numbers to each.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key, counter=(step << 128) | (lane << 192)))
