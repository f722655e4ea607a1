"""The tail of a request: the KV in its last block, which is not full and so has no hash by which others could find it.

    tokens    0 ............ first_token ........ generation
              | full blocks, by hash  | tail      |

It is bytes that belong to one request, and to the number of tokens, its generation, whose KV the request has with them.
A request that goes on elsewhere or later needs its full blocks, this, and nothing else; then only its newest token is
computed. Here the tails of preempted requests are kept in the host buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memory_agent.kv_fingerprint import tail_key
from replicas.break_even import Move
from replicas.host_traffic import HostTraffic, Landed


@dataclass(frozen=True)
class KvTail:
    """Which KV it is.

    Attributes:
        first_token: of the block.
        generation: tokens of the request, from its first on, whose KV is computed with this block: at least one and at
            most all of the block's.
    """

    request_id: str
    first_token: int
    generation: int

    @property
    def tokens(self) -> int:
        """That the tail holds."""
        return self.generation - self.first_token


def tail_of(request_id: str, computed_tokens: int, unknown_tokens: int, block_tokens: int) -> KvTail | None:
    """The tail of a request; None where all that is computed is in blocks that have a hash.

    Args:
        computed_tokens: of which KV is on the device once the steps in flight have run.
        unknown_tokens: that steps in flight will sample. vLLM hashes a block when the tokens after it are known that
            these steps compute: with one step in flight, a block that was filled in it has no hash yet.
    """
    first = (computed_tokens - unknown_tokens) // block_tokens * block_tokens
    generation = min(computed_tokens, first + block_tokens)
    return KvTail(request_id, first, generation) if generation > first else None


@dataclass
class _Kept:
    """A tail that the host buffer has, or had. ``granted``: it is worth loading; ``matched``: vLLM was told so when it
    asked last."""

    tail: KvTail
    key: bytes
    granted: bool = False
    matched: bool = False


class KvTails:
    """Tails of preempted requests. Lives in the scheduler's process; not thread-safe.

    Args:
        traffic: carries the copies; a tail takes a slot of it.
        block_tokens: tokens of a KV block.
        fingerprint: of the KV, 32 bytes.
    """

    def __init__(self, traffic: HostTraffic, block_tokens: int, fingerprint: bytes) -> None:
        self._traffic = traffic
        self._block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._kept: dict[str, _Kept] = {}
        self.stored = 0
        """Tails written since the start."""
        self.loaded = 0
        """Tails that came back since the start."""

    def keep(self, tail: KvTail, block_id: int) -> None:
        """The request is preempted: have the block stored in the coming step, where that pays and there is room."""
        self.forget(tail.request_id)
        kept = _Kept(tail, tail_key(self._fingerprint, tail.request_id, tail.generation))
        self._traffic.store({kept.key: block_id}, tail.tokens)
        self._kept[tail.request_id] = kept

    def match(self, request_id: str, present_tokens: int, tokens: int) -> int:
        """Tokens of the request that its tail has after ``present_tokens``, which the device has or will have loaded.

        tokens: of the request now; at least the last one is computed.
        """
        kept = self._kept.get(request_id)
        if kept is None:
            return 0
        end = min(kept.tail.generation, tokens - 1)
        kept.matched = (
            kept.tail.first_token == present_tokens < end
            and self._traffic.buffer.match_prefix([kept.key], again=True, storing=True) == 1
        )
        if not kept.matched:
            return 0
        # vLLM asks again in each step until it has memory for the request: what was decided stays decided.
        kept.granted = kept.granted or self._traffic.pays(Move.LOAD, 1, end - present_tokens) == 1
        if not kept.granted:
            self.forget(request_id)
            return 0
        return end - present_tokens

    def allocate(self, request_id: str, block_ids: Sequence[int], loaded_tokens: int) -> None:
        """vLLM has given the request these blocks, and expects ``loaded_tokens`` tokens in them to be loaded, the last
        of them those that ``match`` has named. A tail that was of no use is given up: the request moves on."""
        kept = self._kept.get(request_id)
        if kept is None:
            return
        if not (kept.matched and loaded_tokens):
            self.forget(request_id)
            return
        at = kept.tail.first_token // self._block_tokens
        self._traffic.load([kept.key], block_ids[at : at + 1])

    def on_landed(self, landed: Landed) -> None:
        """Copies have ended: a tail that was loaded is given up."""
        for kept in list(self._kept.values()):
            self.stored += kept.key in landed.stored
            self.loaded += kept.key in landed.loaded
            if kept.key in landed.loaded | landed.damaged:
                self.forget(kept.tail.request_id)

    def forget(self, request_id: str) -> None:
        """Nobody will ask for this request's tail: its slot is free when no copy uses it."""
        kept = self._kept.pop(request_id, None)
        if kept is not None:
            self._traffic.buffer.drop([kept.key])

    def clear(self) -> None:
        """Forget all."""
        for request_id in list(self._kept):
            self.forget(request_id)
