"""The sending end of an output channel: outputs of all requests that one ingress has at this replica.

    put --> waiting, by request --> one parcel, while no other is on its way --> inbox of the ingress
            coalesced meanwhile                    <-- Taken ----------

A parcel leaves as soon as the one before it was taken, with everything that has come since: at a low rate each step's
tokens go at once, and an ingress that is behind gets fewer and larger pieces instead of a longer queue. A parcel is
kept until it was taken, so a connection that breaks costs nothing but time.

The ingress sends errands the other way: requests of its own, which reach a replica that takes no others any more.
"""

import asyncio
import hmac
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import msgspec
from vllm.v1.engine import EngineCoreOutput, FinishReason

from replicas.channel_wire import (
    HANDSHAKE_BYTES,
    NONCE_BYTES,
    PARCEL_BYTES,
    Errand,
    FrameBuffer,
    Hello,
    InboxAddress,
    Parcel,
    Taken,
    WireError,
    frame,
    notice_silence,
    sign,
    sign_errand,
)
from replicas.coalesce import coalesce
from replicas.hop import Frames, HopCodec

logger = logging.getLogger("ray.serve")

GIVE_UP_S = 3.0
"""An ingress that cannot be reached for so long is gone, and its requests end."""
RETRY_PERIOD_S = 0.1
SENDER_BYTES = 16


class ChannelBroken(Exception):
    """The ingress cannot be reached, so nobody takes the outputs."""


class Lane:
    """One request's way through a channel."""

    def __init__(self, channel: "OutputChannel", ticket: int) -> None:
        self.ticket = ticket
        self.waiting: list[EngineCoreOutput] = []
        self.sent_tokens = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the last output was taken; with ChannelBroken when it cannot be any more."""
        self._channel = channel

    @property
    def idle(self) -> bool:
        """Everything so far has been taken."""
        return not self.waiting and self._channel.idle

    @property
    def lost(self) -> bool:
        """The ingress cannot be reached now."""
        return self._channel.lost

    def give_up(self) -> None:
        """End it with ChannelBroken, before the channel does."""
        if not self.ended.done():
            self.ended.set_exception(ChannelBroken("another request has taken its place"))
            self.ended.exception()  # whoever waits is told; that nobody does is no fault

    def put(self, output: EngineCoreOutput) -> None:
        """Send ``output``, which belongs to the channel from here on."""
        coalesce(self.waiting, output)
        self._channel.hurry(self)


Run = Callable[[Frames, Lane], Awaitable[None]]
"""Runs an encoded request; its outputs go through the lane. Returns when they have been taken."""


class OutputChannel:
    """Everything for one ingress. Belongs to the event loop it is built on; ``run`` must be running."""

    def __init__(self, address: InboxAddress, replica: str, run_errand: Run) -> None:
        self.lanes: set[Lane] = set()
        self.lost = False
        """There is no connection any more, or none could be made."""
        self._address = address
        self._sender = os.urandom(SENDER_BYTES)
        self._replica = replica
        self._run_errand = run_errand
        self._errands: set[asyncio.Task[None]] = set()
        self._codec = HopCodec()
        self._ready: dict[Lane, None] = {}
        self._number = 0
        self._untaken: bytes | None = None
        self._ending: list[Lane] = []
        self._connection: _Connection | None = None
        self._due = False

    def lane(self, ticket: int) -> Lane:
        """A way for one more request."""
        lane = Lane(self, ticket)
        self.lanes.add(lane)
        return lane

    def close(self, lane: Lane) -> None:
        """Nothing more of this request is sent."""
        self.lanes.discard(lane)
        self._ready.pop(lane, None)

    def hurry(self, lane: Lane) -> None:
        """Send what waits in ``lane``, with all that comes in the same turn of the event loop."""
        if lane not in self.lanes:
            return
        self._ready[lane] = None
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._send)

    async def run(self) -> None:
        """Keep a connection while there are lanes; returns when there are none and the ingress has hung up, or when it
        cannot be reached. The lanes that are left then end with ChannelBroken."""
        loop = asyncio.get_running_loop()
        host, port = self._where
        try:
            lost_s = loop.time()
            while loop.time() - lost_s < GIVE_UP_S:
                try:
                    await self._connect_once()
                except (OSError, WireError) as error:
                    logger.warning("no connection to the ingress at %s:%d: %s", host, port, error)
                self.lost = True
                if self._connection is not None:
                    self._connection, lost_s = None, loop.time()
                    if not self.lanes:
                        return
                await asyncio.sleep(RETRY_PERIOD_S)
        finally:
            for task in self._errands:
                task.cancel()
            for lane in self.lanes:
                if not lane.ended.done():
                    lane.ended.set_exception(ChannelBroken(f"the ingress at {host}:{port} is gone"))
                    lane.ended.exception()  # whoever waits is told; that nobody does is no fault

    @property
    def idle(self) -> bool:
        """No parcel is on its way."""
        return self._untaken is None

    @property
    def _where(self) -> tuple[str, int]:
        return self._address.host, self._address.port

    async def _connect_once(self) -> None:
        """Until the connection ends; ``_connection`` is set where the ingress took it. Raises OSError where there is
        none, WireError where it speaks something else."""
        loop = asyncio.get_running_loop()
        transport, connection = await loop.create_connection(
            lambda: _Connection(self._address.key, self._sender, self._replica, self._taken, self._take), *self._where
        )
        notice_silence(transport)
        try:
            await connection.closed
        finally:
            transport.abort()

    def _taken(self, connection: "_Connection", number: int) -> None:
        """The ingress has every parcel up to ``number``; said first after connecting, then after each parcel."""
        again, self.lost = self._connection is not connection, False
        if number == self._number:
            self._connection, self._untaken = connection, None
            for lane in self._ending:
                if not lane.ended.done():
                    lane.ended.set_result(None)
            self._ending.clear()
            self._send()
        elif again and number == self._number - 1 and self._untaken is not None:
            self._connection = connection
            connection.send(self._untaken)
        else:
            self._connection = None
            raise WireError(f"parcel {number} was taken, the last one sent is {self._number}")

    def _take(self, errand: Errand) -> None:
        """Run what the ingress asks for. Raises WireError where it was not the ingress that asked."""
        if not hmac.compare_digest(
            errand.digest, sign_errand(self._address.key, self._sender, errand.ticket, errand.frames)
        ):
            raise WireError("an errand has another key")
        task = asyncio.get_running_loop().create_task(self._run(errand))
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _run(self, errand: Errand) -> None:
        lane = self.lane(errand.ticket)
        try:
            await self._run_errand(errand.frames, lane)
        except ChannelBroken:
            return
        except Exception as error:  # whatever an engine raises: the ingress is told
            logger.exception("an errand of the ingress has failed")
            lane.put(EngineCoreOutput("", [], finish_reason=FinishReason.ERROR, stop_reason=str(error)))
            await lane.ended
        finally:
            self.close(lane)

    def _send(self) -> None:
        self._due = False
        if self._untaken is not None or not self._ready or self._connection is None:
            return
        self._number += 1
        self._untaken = frame(msgspec.msgpack.encode(self._pack()))
        self._connection.send(self._untaken)

    def _pack(self) -> Parcel:
        tickets, offsets, outputs = [], [], []
        for lane in self._ready:
            for output in lane.waiting:
                tickets.append(lane.ticket)
                offsets.append(lane.sent_tokens)
                outputs.append(output)
                lane.sent_tokens += len(output.new_token_ids)
                if output.finished:
                    self._ending.append(lane)
            lane.waiting = []
        self._ready.clear()
        return Parcel(self._number, tickets, offsets, self._codec.encode_outputs(outputs))


class _Connection(asyncio.Protocol):
    """One TCP connection to the inbox."""

    def __init__(
        self, key: bytes, sender: bytes, replica: str, on_taken: "OnTaken", on_errand: Callable[[Errand], None]
    ) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended, with WireError where that was a fault."""
        self._key, self._sender, self._replica = key, sender, replica
        self._on_taken, self._on_errand = on_taken, on_errand
        self._frames = FrameBuffer(HANDSHAKE_BYTES)
        self._messages = msgspec.msgpack.Decoder(Taken | Errand)
        self._greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._receive(body)
        except (WireError, msgspec.MsgspecError) as error:
            if not self.closed.done():
                self.closed.set_exception(WireError(str(error)))
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def _receive(self, body: bytes) -> None:
        if not self._greeted:
            if len(body) != NONCE_BYTES:
                raise WireError("the ingress did not greet")
            self._greeted = True
            self._frames.longest_bytes = PARCEL_BYTES
            hello = Hello(self._sender, sign(self._key, body, self._sender), self._replica)
            self.send(frame(msgspec.msgpack.encode(hello)))
            return
        message = self._messages.decode(body)
        if isinstance(message, Taken):
            self._on_taken(self, message.number)
        else:
            self._on_errand(message)


OnTaken = Callable[[_Connection, int], None]


class Channels:
    """The channels of one replica, one an ingress. Belongs to the event loop it is used on."""

    def __init__(self, replica: str, run_errand: Run) -> None:
        """
        Args:
            replica: its id; run_errand: runs what an ingress asks for over its channel.
        """
        self._replica, self._run_errand = replica, run_errand
        self._channels: dict[InboxAddress, tuple[OutputChannel, asyncio.Task[None]]] = {}

    @contextmanager
    def lane(self, address: InboxAddress, ticket: int) -> Iterator[Lane]:
        """A way to the ingress at ``address`` for the request that has this number there. The channel is made with its
        first request, and ends after its last one when the ingress does."""
        channel, task = self._channels.get(address, (None, None))
        if channel is None or task is None or task.done():
            channel = OutputChannel(address, self._replica, self._run_errand)
            task = asyncio.get_running_loop().create_task(channel.run())
            self._channels[address] = channel, task
            task.add_done_callback(partial(self._forget, address))
        lane = channel.lane(ticket)
        try:
            yield lane
        finally:
            channel.close(lane)

    def close(self) -> None:
        for _, task in self._channels.values():
            task.cancel()

    def _forget(self, address: InboxAddress, task: "asyncio.Task[None]") -> None:
        if self._channels[address][1] is task:
            del self._channels[address]
