"""Which replicas have computed which beginnings of prompts, as far as a router knows: what it has sent them.

Ids are those of ``replicas.prefix_cache``: one stands for a run of tokens and all before it. A replica's cache drops
what was used least recently, so the index does too, at the size that its KV memory has.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from cluster.fleet_view import Floats


class PrefixIndex:
    """Prefix blocks by replica. Used by one thread.

    Attributes:
        most: blocks that a replica keeps.
    """

    def __init__(self, blocks: int) -> None:
        self.most = blocks
        self._holders: dict[int, dict[int, None]] = {}
        self._kept: defaultdict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)

    def insert(self, ids: Sequence[int], row: int) -> None:
        """The replica computes a prompt that begins with these."""
        kept = self._kept[row]
        for block in ids:
            if block in kept:
                kept.move_to_end(block)
            else:
                kept[block] = None
                self._holders.setdefault(block, {})[row] = None
        while len(kept) > self.most:
            self._drop(kept.popitem(last=False)[0], row)

    def matches(self, ids: Sequence[int], rows: int) -> Floats:
        """How many of ``ids``, from the first on, each of ``rows`` replicas has, of shape (rows,)."""
        found = np.zeros(rows)
        for count, block in enumerate(ids, start=1):
            holders = self._holders.get(block)
            if not holders:
                break
            at = list(holders)
            if count > 1:  # what lacks an earlier block cannot use this one
                at = [row for row in at if found[row] == count - 1]
            found[at] = count
        return found

    def size(self, row: int) -> int:
        """Blocks that the replica keeps."""
        return len(self._kept[row]) if row in self._kept else 0

    def forget(self, row: int) -> None:
        """The replica has lost its cache."""
        for block in self._kept.pop(row, ()):
            self._drop(block, row)

    def move(self, rows: Mapping[int, int]) -> None:
        """The replicas have other rows now, from key to value; one that is not named is gone."""
        self._kept = defaultdict(OrderedDict, {rows[row]: kept for row, kept in self._kept.items() if row in rows})
        moved = ((block, [rows[row] for row in held if row in rows]) for block, held in self._holders.items())
        self._holders = {block: dict.fromkeys(held) for block, held in moved if held}

    def _drop(self, block: int, row: int) -> None:
        holders = self._holders[block]
        del holders[row]
        if not holders:
            del self._holders[block]
