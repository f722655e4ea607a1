"""The receiving end of the output channels: the outputs of every replica of one model come in here.

What arrives is handed over at once; the replica hears that it was taken only when ``taken`` is called, and sends
nothing more until then. So an ingress that is behind holds one parcel a replica, and the rest gathers where it is made.
Errands go the other way.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import msgspec
from vllm.v1.engine import EngineCoreOutput

from replicas.channel_wire import (
    HANDSHAKE_BYTES,
    KEY_BYTES,
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
    is_signed,
    notice_silence,
    sign_errand,
)
from replicas.hop import Frames, HopCodec

logger = logging.getLogger("ray.serve")

HANDSHAKE_S = 5.0
FORGET_S = 60.0
"""After that nobody comes back: a replica gives up much earlier."""

OnOutput = Callable[[int, int, EngineCoreOutput, str], None]
"""Called with a request's ticket, the output tokens before, the output, and the id of the replica it comes from."""


@dataclass
class _Sender:
    """A replica's channel over all its connections. taken: the last parcel that was said to be taken."""

    replica: str
    received: int = 0
    taken: int = 0
    connection: "_Connection | None" = None


class OutputInbox:
    """A listening socket and what comes over it. Belongs to the event loop it is opened on."""

    def __init__(self, on_output: OnOutput, on_left: Callable[[str], None] = lambda replica: None) -> None:
        """on_left: called with the id of a replica whose connection has ended."""
        self.refused = 0
        """Connections that did not speak the protocol, or did not have the key."""
        self._on_output, self._on_left = on_output, on_left
        self._key = secrets.token_bytes(KEY_BYTES)
        self._codec = HopCodec()
        self._senders: dict[bytes, _Sender] = {}
        self._untaken: set[bytes] = set()
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def open(self, host: str) -> InboxAddress:
        """Listen on a free port of ``host``; what replicas need to send here. Raises OSError."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return InboxAddress(host, port, self._key)

    def taken(self) -> None:
        """What has been handed over is dealt with: each replica may send its next parcel."""
        for name in self._untaken:
            sender = self._senders[name]
            sender.taken = sender.received
            if sender.connection is not None:
                sender.connection.say(Taken(sender.taken))
        self._untaken.clear()

    def send_errand(self, replica: str, ticket: int, frames: Frames) -> bool:
        """Have that replica run a request, whose outputs come under ``ticket``. False where no connection to it is
        open."""
        for name, sender in self._senders.items():
            if sender.replica == replica and sender.connection is not None:
                sender.connection.say(Errand(ticket, frames, sign_errand(self._key, name, ticket, frames)))
                return True
        return False

    def close(self) -> None:
        """Stop listening and hang up."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.hang_up()

    # What a connection calls

    def joined(self, connection: "_Connection") -> None:
        self._connections.add(connection)

    def knows(self, hello: Hello, nonce: bytes) -> bool:
        return is_signed(hello, self._key, nonce)

    def refuse(self, peer: object, error: Exception) -> None:
        self.refused += 1
        logger.warning("the output channel of %s is closed: %s", peer, error)

    def greeted(self, connection: "_Connection", name: bytes, replica: str) -> None:
        """A replica has shown who it is: tell it where to go on."""
        sender = self._senders.setdefault(name, _Sender(replica))
        if sender.connection is not None:
            sender.connection.hang_up()
        sender.connection, sender.taken = connection, sender.received
        self._untaken.discard(name)
        connection.say(Taken(sender.taken))

    def received(self, name: bytes, parcel: Parcel) -> None:
        """Raises WireError for another parcel than the next one, or one that does not fit together."""
        sender = self._senders[name]
        outputs = self._codec.decode_outputs(parcel.frames)
        if parcel.number != sender.received + 1 or not len(parcel.tickets) == len(parcel.offsets) == len(outputs):
            raise WireError(f"parcel {parcel.number} after {sender.received}")
        sender.received = parcel.number
        self._untaken.add(name)
        for ticket, offset, output in zip(parcel.tickets, parcel.offsets, outputs, strict=True):
            self._on_output(ticket, offset, output, sender.replica)

    def left(self, connection: "_Connection", name: bytes | None) -> None:
        self._connections.discard(connection)
        if name is not None and self._senders[name].connection is connection:
            self._senders[name].connection = None
            asyncio.get_running_loop().call_later(FORGET_S, self._forget, name)
            self._on_left(self._senders[name].replica)

    def _forget(self, name: bytes) -> None:
        sender = self._senders.get(name)
        if sender is not None and sender.connection is None:
            del self._senders[name]
            self._untaken.discard(name)


class _Connection(asyncio.Protocol):
    """One TCP connection of a replica, or of whoever has found the port."""

    def __init__(self, inbox: OutputInbox) -> None:
        self._inbox = inbox
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._frames = FrameBuffer(HANDSHAKE_BYTES)
        self._parcel = msgspec.msgpack.Decoder(Parcel)
        self._name: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        notice_silence(transport)
        self._inbox.joined(self)
        self._late = asyncio.get_running_loop().call_later(HANDSHAKE_S, self.hang_up)
        self._transport.write(frame(self._nonce))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                if self._name is None:
                    self._greet(body)
                else:
                    self._inbox.received(self._name, self._parcel.decode(body))
        except (WireError, msgspec.MsgspecError) as error:
            self._inbox.refuse(self._transport.get_extra_info("peername"), error)
            self.hang_up()

    def connection_lost(self, error: Exception | None) -> None:
        self._late.cancel()
        self._inbox.left(self, self._name)

    def say(self, message: Taken | Errand) -> None:
        self._transport.write(frame(msgspec.msgpack.encode(message)))

    def hang_up(self) -> None:
        self._transport.abort()

    def _greet(self, body: bytes) -> None:
        hello = msgspec.msgpack.decode(body, type=Hello)
        if not self._inbox.knows(hello, self._nonce):
            raise WireError("the key is another one")
        self._late.cancel()
        self._frames.longest_bytes = PARCEL_BYTES
        self._name = hello.sender
        self._inbox.greeted(self, hello.sender, hello.replica)
