"""A model of an engine's prefix cache and of the host buffer behind it. Pure.

A prefix block is a run of a prompt's tokens whose id stands for it and for all before it, so prompts that share a
beginning share the ids of its blocks. A block is held while a request refers to it, then kept until its memory is
needed or it is the least recently used; what is pushed out goes to the host buffer, if there is one.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence


class PrefixCache:
    """Prefix blocks of ``blocks_each`` KV blocks each.

    Args:
        host_blocks: KV blocks that the host buffer holds; 0: there is none.
    """

    def __init__(self, blocks_each: int, host_blocks: int = 0) -> None:
        self._each = blocks_each
        self._users: dict[Hashable, int] = {}
        self._idle: OrderedDict[Hashable, None] = OrderedDict()
        self._host: OrderedDict[Hashable, int] = OrderedDict()
        self._host_blocks = host_blocks
        self.host_used_blocks = 0

    @property
    def held_blocks(self) -> int:
        """KV blocks that requests refer to."""
        return len(self._users) * self._each

    @property
    def idle_blocks(self) -> int:
        """KV blocks that are only kept."""
        return len(self._idle) * self._each

    def match(self, ids: Sequence[Hashable]) -> tuple[int, int]:
        """How many of ``ids``, from the first on, are on the device, and how many after these in the host buffer."""
        device = 0
        for block in ids:
            if block not in self._users and block not in self._idle:
                break
            device += 1
        host = 0
        if self._host:
            for block in ids[device:]:
                if block not in self._host:
                    break
                host += 1
        return device, host

    def idle_among(self, ids: Iterable[Hashable]) -> int:
        """KV blocks of ``ids`` that are only kept: to hold them makes them unavailable for others."""
        return self._each * sum(block in self._idle for block in ids)

    def hold(self, ids: Iterable[Hashable]) -> None:
        """A request refers to these; those that are not there are there from now on."""
        for block in ids:
            users = self._users.get(block, 0)
            if not users:
                self._idle.pop(block, None)
            self._users[block] = users + 1

    def release(self, ids: Sequence[Hashable]) -> None:
        """The request is done with them: the last ones go first when memory is needed."""
        for block in reversed(ids):
            users = self._users[block] - 1
            if users:
                self._users[block] = users
            else:
                del self._users[block]
                self._idle[block] = None

    def push_out(self, blocks: int) -> None:
        """Free at least so many KV blocks of what is only kept, or all of it."""
        for _ in range(min(len(self._idle), -(-blocks // self._each))):
            block, _none = self._idle.popitem(last=False)
            self.store(block, self._each)

    def store(self, block: Hashable, blocks: int) -> bool:
        """Copy so many KV blocks to the host buffer under one id; False where they do not fit."""
        if blocks > self._host_blocks:
            return False
        if block in self._host:
            self._host.move_to_end(block)
            return True
        while self.host_used_blocks + blocks > self._host_blocks:
            self.host_used_blocks -= self._host.popitem(last=False)[1]
        self._host[block] = blocks
        self.host_used_blocks += blocks
        return True

    def take_back(self, block: Hashable) -> bool:
        """Whether the host buffer has it; it is used now and gone from there."""
        blocks = self._host.pop(block, None)
        if blocks is None:
            return False
        self.host_used_blocks -= blocks
        return True
