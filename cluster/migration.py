"""Moves a running request to another replica while its tokens stream.

    source replica       PushOrder --> what it has filled goes to staging memory, while it decodes
    destination replica  a request of one token over these blocks: they are in its prefix cache, pinned
    ... again, until a block or so is missing; then the source lets go, and the relay goes on at the destination

Between nodes what is staged crosses before the destination looks for it (``cluster.crossing``).

Whatever fails before the request has left leaves it where it is. Afterwards it is continued as after a replica's death,
at the destination or elsewhere, with the KV that is there.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from http import HTTPStatus
from uuid import uuid4

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from cluster.crossing import AHEAD_S, SWITCH_S, CrossingError, Crossings
from replicas.migration_words import ANSWER_PARAM, Arrival, Moved, PushAnswer, PushOrder, with_word
from replicas.warm_up import ahead_id

logger = logging.getLogger("ray.serve")

ROUNDS_MOST = 64
TOKEN_WAIT_S = 1.0
PERIOD_S = 0.005


class MigrationError(Exception):
    """The request was not moved, and goes on where it is. ``status``: for HTTP."""

    def __init__(self, why: str, status: HTTPStatus = HTTPStatus.CONFLICT) -> None:
        super().__init__(why)
        self.status = status


class CannotPush(MigrationError):
    """The source's engine cannot move any request."""


Run = Callable[[str, EngineCoreRequest], Awaitable[EngineCoreOutput]]
"""Have a request of our own run at that replica and nowhere else; its last output. Raises MigrationError."""


class Rounds:
    """The rounds and the switch of one migration.

    Args:
        request: that moves, as its client asked it. tokens: of its answer, as far as they have come; it grows.
        block_tokens: tokens of a KV block.
        crossings: between nodes; None where there is one only.
    """

    def __init__(
        self,
        run: Run,
        request: EngineCoreRequest,
        tokens: list[int],
        source: str,
        destination: str,
        block_tokens: int,
        crossings: Crossings | None = None,
    ) -> None:
        self._run = run
        self._request = request
        self._tokens = tokens
        self._source = source
        self._destination = destination
        self._block_tokens = block_tokens
        self._name = uuid4().hex
        self._crossing = crossings.between(source, destination, self._name) if crossings is not None else None
        self.ahead = self.done = 0

    async def push(self) -> None:
        """Until no more than a block is missing at the destination. Raises MigrationError."""
        for _ in range(ROUNDS_MOST):
            answer = await self._order(taken=self.ahead)
            if answer.staged - self.ahead <= (self.done > 0):
                return
            blocks = await self._known_blocks(answer.staged)
            if blocks <= self.ahead:
                return
            await self._run(self._destination, self._ahead(await self._brought(answer.origin), blocks))
            self.ahead, self.done = blocks, self.done + 1
        raise MigrationError("its KV grows as fast as it is moved; try again when the replicas are less busy")

    async def switch(self) -> None:
        """Have the source let go. Raises MigrationError where it does not."""
        await self._order(switch=True)

    async def bring(self, moved: Moved) -> Moved:
        """The source has let go: have what it sends last where the destination finds it. Never fails: what is not there
        then is computed."""
        if self._crossing is None or moved.move != self._name:
            return moved
        try:
            return replace(moved, origin=await self._crossing.bring(moved.origin, SWITCH_S, moved.last))
        except CrossingError as error:
            logger.warning("request %s moves without its last KV: %s", self._request.request_id, error)
            return replace(moved, computed=self.ahead * self._block_tokens)

    async def end(self) -> None:
        """Nothing is held at either end any more. Never fails: they forget by themselves, later."""
        if self._crossing is not None:
            await self._crossing.end()
        try:
            await self._order(end=True)
        except MigrationError:
            return

    async def _order(self, *, taken: int = 0, switch: bool = False, end: bool = False) -> PushAnswer:
        order = PushOrder(self._request.request_id, self._name, taken, switch, end)
        params = with_word(SamplingParams(max_tokens=1), order)
        output = await self._run(self._source, _own_request(f"push-{uuid4().hex}", [0], params))
        said = (output.kv_transfer_params or {}).get(ANSWER_PARAM)
        if said is None:
            raise CannotPush(f"replica {self._source} cannot move requests: it needs elastic memory and full attention")
        answer = PushAnswer(**said)
        if answer.error is not None:
            raise MigrationError(f"request {self._request.request_id} is not moved: {answer.error}")
        return answer

    async def _brought(self, origin: str) -> str:
        """Where the destination finds what is staged. Raises MigrationError."""
        if self._crossing is None:
            return origin
        try:
            return await self._crossing.bring(origin, AHEAD_S)
        except CrossingError as error:
            why = f"request {self._request.request_id} is not moved: its KV does not get to the other node, {error}"
            raise MigrationError(why, HTTPStatus.SERVICE_UNAVAILABLE) from error

    async def _known_blocks(self, staged: int) -> int:
        """Of the staged blocks those whose tokens have come, with one token more."""
        prompt = len(self._request.prompt_token_ids or ())
        until_s = time.monotonic() + TOKEN_WAIT_S
        while True:
            blocks = min(staged, (prompt + len(self._tokens) - 1) // self._block_tokens)
            if blocks == staged or time.monotonic() > until_s:
                return blocks
            await asyncio.sleep(PERIOD_S)

    def _ahead(self, origin: str, blocks: int) -> EngineCoreRequest:
        """A request that makes the destination take these blocks."""
        computed = blocks * self._block_tokens
        tokens = [*(self._request.prompt_token_ids or ()), *self._tokens][: computed + 1]
        word = Arrival(origin, self._name, computed, pin=True)
        params = with_word(SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True), word)
        mine = _own_request(ahead_id(uuid4().hex), tokens, params)
        mine.lora_request, mine.cache_salt = self._request.lora_request, self._request.cache_salt
        return mine


def _own_request(request_id: str, tokens: list[int], params: SamplingParams) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
