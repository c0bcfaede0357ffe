"""A shuffle that is computed, not stored: position to window in constant memory, the same under any numpy.

A Feistel network permutes the numbers below 4^b; walking its cycles until a number is below n permutes those below n
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def shuffled(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int64 [n] positions of an endless order to numbers below `count`, int64 [n].

    Each run of `count` positions, an epoch, holds every number once; epochs differ, and so do seeds.
    """
    epoch, within = np.divmod(positions.astype(np.uint64), np.uint64(count))
    key = _mixed(epoch * np.uint64(_GOLDEN) + np.array(seed % 2**64, np.uint64))
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    number = _permuted(within, key, half)
    while (outside := number >= count).any():
        number[outside] = _permuted(number[outside], key[outside], half)
    return number.astype(np.int64)


def _permuted(number: np.ndarray, key: np.ndarray, half: int) -> np.ndarray:
    mask, bits = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = number >> bits, number & mask
    for step in range(_ROUNDS):
        left, right = right, left ^ (_mixed(right + key + np.uint64(step + 1) * np.uint64(1 << 32)) & mask)
    return (left << bits) | right


def _mixed(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): uint64 [n] to uint64 [n]."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
