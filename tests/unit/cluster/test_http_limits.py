"""Clients that mean ill, or are broken: heads without end, slow ones, answers that nobody reads, too many connections;
and TLS."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster import http_server
from cluster.api_client import api_client
from cluster.config import HttpLimits
from cluster.http_server import Certificate, HttpServer
from tests.unit.cluster.test_http_server import DEADLINE_S, ask, free_port

SHORT = HttpLimits(header_timeout_s=0.3, body_timeout_s=0.3, write_timeout_s=0.3, max_header_bytes=2048)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n"


class Endless:
    """An application with an answer that never ends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.sent_bytes = 0
        self.app = Starlette(
            routes=[Route("/", self.say), Route("/endless", self.stream), Route("/body", self.body, methods=["POST"])]
        )

    async def say(self, request: Request) -> Response:
        return PlainTextResponse("a")

    async def body(self, request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    async def stream(self, request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 10_000
                    self.sent_bytes += 10_000
                    await asyncio.sleep(0)
            finally:
                self.ended.set()

        return StreamingResponse(pieces())


@asynccontextmanager
async def serving(limits: HttpLimits = SHORT, **settings: Any) -> AsyncIterator[tuple[int, Endless]]:
    port, endless = free_port(), Endless()
    server = HttpServer(endless.app, "127.0.0.1", port, 100, 1, limits, **settings)
    async with asyncio.timeout(DEADLINE_S):
        await server.start()
        try:
            yield port, endless
        finally:
            await server.stop()


async def connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def is_ended(reader: asyncio.StreamReader) -> bool:
    """The server ends the connection; what it says before does not matter."""
    try:
        await reader.read()
    except ConnectionResetError:
        return True
    return True


@pytest.mark.parametrize("beginning", [b"", b"\r\n", b"GET", GET, GET + b"x-a: "], ids=repr)
async def test_a_head_that_does_not_end_in_time_ends_the_connection(beginning: bytes) -> None:
    """Slow loris: a connection that says nothing, or a part of a head, or a bit of it now and then."""
    async with serving() as (port, _):
        reader, writer = await connected(port)
        writer.write(beginning)
        ending = asyncio.ensure_future(is_ended(reader))
        while not ending.done():
            writer.write(b"a" if beginning not in (b"", b"\r\n") else beginning)
            await asyncio.sleep(0.05)
        assert await ask(port) == "a"
        writer.close()


@pytest.mark.parametrize("later", [b"\r\n", b"GET / HT"], ids=repr)
async def test_the_second_head_of_a_connection_is_timed_too(later: bytes) -> None:
    """Who had an answer once has no more time for the next head, or to send nothing but line ends."""
    async with serving() as (port, _):
        reader, writer = await connected(port)
        writer.write(GET + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.5)  # longer than a head may take: an idle connection is kept
        writer.write(later)
        await reader.readexactly(1)
        assert await is_ended(reader)
        writer.close()


async def test_a_body_that_does_not_end_in_time_ends_the_connection() -> None:
    """And the application hears that its client has gone."""
    async with serving() as (port, _):
        reader, writer = await connected(port)
        writer.write(b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        ending = asyncio.ensure_future(is_ended(reader))
        while not ending.done():
            writer.write(b"a")
            await asyncio.sleep(0.05)
        assert await ask(port) == "a"
        writer.close()


@pytest.mark.parametrize(
    "piece", [b"x-a: " + b"a" * 1000 + b"\r\n", b"a" * 1000, b"x-%d: a\r\n"], ids=["lines", "one line", "many lines"]
)
async def test_a_head_without_end_is_not_kept(piece: bytes) -> None:
    """More than max_header_bytes ends the connection, whether in many headers or in one."""
    async with serving(SHORT.model_copy(update={"header_timeout_s": 60.0})) as (port, _):
        reader, writer = await connected(port)
        writer.write(GET + b"x-long: " * (piece == b"a" * 1000))
        ending = asyncio.ensure_future(is_ended(reader))
        sent = 0
        while not ending.done():
            writer.write(piece.replace(b"%d", b"%d" % sent))
            sent += len(piece)
            assert sent < 10_000_000
            await asyncio.sleep(0)
        writer.close()


async def test_a_head_that_comes_at_once_is_bounded_too() -> None:
    """In one piece, complete, but too long."""
    async with serving() as (port, _):
        reader, writer = await connected(port)
        writer.write(GET + b"x-a: " + b"a" * 3000 + b"\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 4")
        writer.close()


async def test_a_client_that_does_not_read_is_ended() -> None:
    """An endless answer takes bounded memory here, and ends when its client has read nothing for a while."""
    async with serving() as (port, endless):
        _, writer = await connected(port)
        writer.transport.pause_reading()
        writer.write(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        await endless.ended.wait()
        assert endless.sent_bytes < 50_000_000, "what the system's buffers take, and no more"
        writer.close()


async def test_a_client_that_reads_slowly_is_not() -> None:
    """It is time without any progress that counts, not the time that an answer takes."""
    async with serving() as (port, endless):
        reader, writer = await connected(port)
        writer.write(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        begun = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < begun + 1.5:
            assert await reader.read(1 << 20)
            await asyncio.sleep(0.01)
        assert not endless.ended.is_set()
        writer.transport.abort()


async def test_idle_connections_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the one that is idle longest goes; one with a request never does."""
    monkeypatch.setattr(http_server, "IDLE_MOST", 10)
    async with serving(HttpLimits()) as (port, endless):
        busy_reader, busy = await connected(port)
        busy.write(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        await busy_reader.readuntil(b"\r\n\r\n")
        idle = [await connected(port) for _ in range(30)]
        assert await ask(port) == "a"
        ended = [reader.at_eof() for reader, _ in idle]
        while sum(ended) < 20:
            await asyncio.sleep(0.01)
            ended = [reader.at_eof() or reader.exception() is not None for reader, _ in idle]
        assert not any(ended[-9:]), "the newest are kept"
        assert await busy_reader.readexactly(10_000)
        assert not endless.ended.is_set()
        for _, writer in (*idle, (busy_reader, busy)):
            writer.transport.abort()


async def test_requests_beyond_the_limit_are_refused_with_503() -> None:
    """Idle connections do not count as requests; those that run do."""
    async with serving(HttpLimits()) as (port, _):
        idle = [await connected(port) for _ in range(150)]
        assert await ask(port) == "a"
        for _, writer in idle:
            writer.write(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        heads = [await reader.readline() for reader, _ in idle]
        assert sum(head.startswith(b"HTTP/1.1 200") for head in heads) == 100
        assert sum(head.startswith(b"HTTP/1.1 503") for head in heads) == 50
        for _, writer in idle:
            writer.transport.abort()


# TLS


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Certificate, Path]:
    """For 127.0.0.1, and the authority that has signed it."""
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    for at, blob in enumerate(own.cert_chain_pems):
        blob.write_to_path(tmp_path / "cert.pem", append=at > 0)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return Certificate(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")), tmp_path / "ca.pem"


async def test_tls_serves_those_who_trust_it(
    certificate: tuple[Certificate, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its authority, or with the certificate itself; without either, and without TLS, there is no answer."""
    own, authority = certificate
    async with serving(HttpLimits(), certificate=own) as (port, _):

        def get(certfile: str | None = None) -> str:
            with api_client(DEADLINE_S, "k", certfile) as client:
                return client.get(f"https://127.0.0.1:{port}/").text

        assert await asyncio.to_thread(get, own.certfile) == "a"
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await asyncio.to_thread(get)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        assert await asyncio.to_thread(get) == "a"
        with pytest.raises(httpx.HTTPError):
            await ask(port)


async def test_a_certificate_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """At the start, and nothing listens."""
    (tmp_path / "cert.pem").write_text("nothing")
    port = free_port()
    for file in ("cert.pem", "none.pem"):
        server = HttpServer(Endless().app, "127.0.0.1", port, 1, 1, None, Certificate(str(tmp_path / file)))
        with pytest.raises((OSError, ssl.SSLError)):
            await server.start()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
