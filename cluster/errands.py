"""Requests of the cluster's own, each to one replica and to no other.

An errand goes over the replica's output channel, where one is open: past the router, past the replica's limit of
requests, and also to a replica that Ray Serve is ending. Else it goes as any request does.
"""

import asyncio
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from cluster.migration import MigrationError
from cluster.output_inbox import OutputInbox
from cluster.route import Route
from cluster.routing_policy import RouteRequest
from replicas.hop import Frames, HopCodec

ERRAND_S = 10.0
"""For a replica to do its part of a migration's round."""

Call = Callable[[Frames, int, Route], Any]
"""Calls ``generate`` of the replica that the route wants, with a ticket: a Ray Serve response."""


class Errands:
    """Of one core. tickets: no other request has these numbers."""

    def __init__(self, inbox: OutputInbox, call: Call, tickets: Iterator[int]) -> None:
        self._inbox, self._call, self._tickets = inbox, call, tickets
        self._codec = HopCodec()
        self._out: dict[int, tuple[str, asyncio.Future[EngineCoreOutput]]] = {}

    def __len__(self) -> int:
        """Those under way."""
        return len(self._out)

    async def run_at(self, replica: str, request: EngineCoreRequest) -> EngineCoreOutput:
        """The request's last output. Raises MigrationError."""
        ticket, frames = next(self._tickets), self._codec.encode_request(request)
        answer: asyncio.Future[EngineCoreOutput] = asyncio.get_running_loop().create_future()
        self._out[ticket] = replica, answer
        try:
            if self._inbox.send_errand(replica, ticket, frames):
                await asyncio.wait([answer], timeout=ERRAND_S)
            else:
                await self._as_a_call(replica, ticket, frames, answer)
            if not answer.done():
                raise _unusable(replica, "it is full, or does not answer")
            output = answer.result()
        finally:
            del self._out[ticket]
            answer.cancel()
        if output.finish_reason is FinishReason.ERROR:
            raise _unusable(replica, output.stop_reason or "the request has failed there")
        return output

    def receive(self, ticket: int, output: EngineCoreOutput, replica: str) -> bool:
        """An output has come: whether it was an errand's."""
        if ticket not in self._out:
            return False
        wanted, answer = self._out[ticket]
        if answer.done():
            return True
        if replica != wanted:
            answer.set_exception(_unusable(wanted, "another one has answered"))
        elif output.finished:
            answer.set_result(output)
        return True

    def lost(self, replica: str) -> None:
        """Nothing comes from there any more."""
        for wanted, answer in self._out.values():
            if wanted == replica and not answer.done():
                answer.set_exception(_unusable(replica, "the connection to it is lost"))

    async def _as_a_call(
        self, replica: str, ticket: int, frames: Frames, answer: "asyncio.Future[EngineCoreOutput]"
    ) -> None:
        route = Route(RouteRequest(1), to=replica, only=True)
        call = self._call(frames, ticket, route)
        work: asyncio.Future[Any] = asyncio.ensure_future(_awaited(call))
        try:
            waiting: list[asyncio.Future[Any]] = [answer, work]
            await asyncio.wait(waiting, timeout=ERRAND_S, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and work.done() and not work.cancelled() and (why := work.exception()) is not None:
                raise _unusable(replica, why)
        finally:
            route.ended(0)
            if not answer.done():
                call.cancel()
                work.cancel()


def _unusable(replica: str, why: object) -> MigrationError:
    return MigrationError(f"replica {replica} cannot be used: {why}", HTTPStatus.SERVICE_UNAVAILABLE)


async def _awaited(call: Any) -> None:
    await call
