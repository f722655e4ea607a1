"""The bytes of an output channel: one TCP connection from a replica to an ingress, for all its requests.

    ingress -> replica    a nonce, as soon as it is connected
    replica -> ingress    Hello: who sends, and the nonce signed with the key
    ingress -> replica    Taken: the last parcel that was taken; once as the answer, then after each parcel
    replica -> ingress    Parcel: outputs of any number of requests
    ingress -> replica    Errand: a request of the ingress's own, signed; its outputs come in parcels, like any others

Every message is a frame: four bytes of length, then msgpack. The key reaches the replica with the request, in a call
between Ray actors. Nothing that comes from the network is unpickled. As in Ray's own connections, what is sent is not
encrypted.
"""

import asyncio
import hashlib
import hmac
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

_LENGTH = struct.Struct(">I")
KEY_BYTES = 32
NONCE_BYTES = 32
HANDSHAKE_BYTES = 1024
"""Longest frame before the other side is known."""
SILENCE_S = 15
"""How long a connection may say nothing at all, not even answer the system, before it counts as lost."""
PARCEL_BYTES = 1 << 30
"""Longest frame after that: prompt logprobs of a long request take tens of megabytes."""


class WireError(Exception):
    """What came over the connection is not this protocol, or not signed with its key. Close it."""


@dataclass(frozen=True)
class InboxAddress:
    """Where an ingress takes outputs, and the key it expects. Sent with every request."""

    host: str
    port: int
    key: bytes = field(repr=False)


class Hello(msgspec.Struct, array_like=True):
    """sender: differs from that of every other channel, also across restarts of its process; replica: whose it is."""

    sender: bytes
    digest: bytes
    replica: str = ""


class Taken(msgspec.Struct, array_like=True, tag=True):
    """number: of the last parcel that the ingress has taken from this sender; 0 for none."""

    number: int


class Errand(msgspec.Struct, array_like=True, tag=True):
    """A request to the replica at the other end, past every router and queue.

    Attributes:
        ticket: of its outputs; frames: the request, encoded by ``HopCodec``.
        digest: ``sign_errand`` of these. Whoever takes the ingress's port after it is no ingress.
    """

    ticket: int
    frames: list[bytes]
    digest: bytes


class Parcel(msgspec.Struct, array_like=True):
    """One piece of what a sender has to say. Parcels of a sender count from 1 without gaps.

    Attributes:
        tickets: which request each output is of, as the ingress has numbered it.
        offsets: output tokens of that request before this output.
        frames: the outputs, encoded by ``HopCodec``.
    """

    number: int
    tickets: list[int]
    offsets: list[int]
    frames: list[bytes]


def sign(key: bytes, nonce: bytes, sender: bytes) -> bytes:
    """The digest by which a sender shows that it has the key."""
    return hmac.digest(key, nonce + sender, hashlib.sha256)


def sign_errand(key: bytes, sender: bytes, ticket: int, frames: Sequence[bytes]) -> bytes:
    """The digest of an errand on the channel of that sender. Never that of a greeting: it is of more bytes."""
    said = hashlib.sha256()
    for one in frames:
        said.update(frame(one))
    return hmac.digest(key, b"errand" + sender + struct.pack(">Q", ticket) + said.digest(), hashlib.sha256)


def is_signed(hello: Hello, key: bytes, nonce: bytes) -> bool:
    return hmac.compare_digest(hello.digest, sign(key, nonce, hello.sender))


def notice_silence(transport: asyncio.BaseTransport) -> None:
    """Let the system end a connection whose other side has vanished without a word, as a host that loses power does,
    SILENCE_S after the last sign of it."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)


def frame(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a stream of bytes into frames."""

    def __init__(self, longest_bytes: int) -> None:
        """longest_bytes: may be changed later."""
        self.longest_bytes = longest_bytes
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of all frames that are complete with ``data``. Raises WireError for one that is too long."""
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > self.longest_bytes:
                raise WireError(f"a frame of {length} bytes, at most {self.longest_bytes} are expected")
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield body
