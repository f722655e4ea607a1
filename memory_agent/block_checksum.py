"""The checksum of a KV block: 64 bits at the speed of memory, to tell torn and damaged copies from whole ones.

Not cryptographic: it guards against accidents. zlib's crc32 takes several times as long, more than the copy itself.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, so that multiplying modulo 2**64 loses nothing."""
_PAGE_WORDS = 512
"""Words that are added before they are weighed: a page, the unit in which copies tear."""


def block_checksum(key: bytes, parts: Sequence[NDArray[np.uint64]]) -> int:
    """The checksum of a block under its key: the sum of each page, weighed by its place.

    Weights are odd, so a change confined to one word always shows. Any other change escapes with the chance that sums
    modulo 2**64 agree; of words that only swap places inside a page they do, and nothing that moves blocks does that.

    parts: two-dimensional, rows contiguous; the same bytes in other rows have another checksum. Python's lock is left
    to others once a part, not once a row: a thread that computes in Python gives it back only after milliseconds.
    """
    total = int.from_bytes(key, "little")
    for part in parts:
        rows, words = part.shape
        pages = words // _PAGE_WORDS
        whole = part[:, : pages * _PAGE_WORDS].reshape(rows, pages, _PAGE_WORDS)
        rest = part[:, None, pages * _PAGE_WORDS :]
        for summands in (whole, rest):
            if summands.size:
                sums = np.add.reduce(summands, axis=2).ravel()
                total = (total * _MULTIPLIER + int(np.dot(sums, _weights(len(sums))))) & _MASK
    return total


@lru_cache(maxsize=64)
def _weights(count: int) -> NDArray[np.uint64]:
    return (2 * np.arange(count, dtype=np.uint64) + 1) * np.uint64(_MULTIPLIER)
