"""Counter-based randomness: every draw is a pure function of (seed, purpose, step, lane).

Nothing reads a global random state, so a resumed run, another rank count or another machine draws the same
numbers. The generator is Philox 4x64 (Salmon et al., 'Parallel random numbers: as easy as 1, 2, 3', SC 2011).
"""

from __future__ import annotations

import hashlib

import numpy as np

MAX_SEED = 2**64 - 1  # that PyTorch and the files of episodes take


def generator(seed: int, purpose: str, step: int = 0, lane: int = 0) -> np.random.Generator:
    """A numpy generator at the counter block of (step, lane), under the key (seed, purpose).

    Two different quadruples never share numbers: `purpose` (such as "noise") and `seed` make the key, `step` and
    `lane` the two upper words of the 256-bit counter, which leaves 2^128 blocks of numbers to each.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key, counter=(step << 128) | (lane << 192)))
