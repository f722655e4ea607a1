"""The HTTP server of an ingress: shared ports, ends of requests, and starts that cannot work."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.http_server import HttpServer

DEADLINE_S = 20.0


def application(name: str, go_on: asyncio.Event | None = None, left: asyncio.Event | None = None) -> Starlette:
    """Says its name; /slow sends a beginning, and the rest when it may go on; ``left`` when it cannot."""

    async def say(request: Request) -> Response:
        return PlainTextResponse(name)

    async def pieces() -> AsyncIterator[str]:
        assert go_on is not None
        try:
            yield "first "
            await go_on.wait()
            yield "last"
        except asyncio.CancelledError:
            if left is not None:
                left.set()
            raise

    async def slow(request: Request) -> Response:
        return StreamingResponse(pieces())

    return Starlette(routes=[Route("/", say), Route("/slow", slow)])


@asynccontextmanager
async def serving(app: Starlette, port: int, patience_s: int = 10) -> AsyncIterator[HttpServer]:
    server = HttpServer(app, "127.0.0.1", port, request_limit=100, patience_s=patience_s)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def ask(port: int, path: str = "/") -> str:
    async with httpx.AsyncClient(trust_env=False, timeout=DEADLINE_S) as client:
        return (await client.get(f"http://127.0.0.1:{port}{path}")).text


async def test_two_servers_share_a_port() -> None:
    """Both get connections, and when one stops the other gets them all."""
    port = free_port()
    async with serving(application("a"), port) as first, serving(application("b"), port):
        assert {await ask(port) for _ in range(40)} == {"a", "b"}
        await first.stop()
        assert not first.serves
        assert {await ask(port) for _ in range(10)} == {"b"}


async def test_a_stop_lets_requests_end() -> None:
    """A stream that runs when the server is stopped ends as it should, while new connections are refused."""
    port, go_on = free_port(), asyncio.Event()
    async with serving(application("a", go_on), port) as server, asyncio.timeout(DEADLINE_S):
        async with (
            httpx.AsyncClient(trust_env=False) as client,
            client.stream("GET", f"http://127.0.0.1:{port}/slow") as answer,
        ):
            parts = answer.aiter_text()
            seen = await anext(parts)
            stopping = asyncio.ensure_future(server.stop())
            with pytest.raises(httpx.ConnectError):
                while True:
                    await ask(port)
                    await asyncio.sleep(0.01)
            go_on.set()
            seen += "".join([part async for part in parts])
        await stopping
        assert seen == "first last"


async def test_a_stop_does_not_wait_for_ever() -> None:
    """Requests that do not end in time are cut."""
    port = free_port()
    async with (
        asyncio.timeout(DEADLINE_S),
        serving(application("a", asyncio.Event()), port, patience_s=1) as server,
        httpx.AsyncClient(trust_env=False) as client,
        client.stream("GET", f"http://127.0.0.1:{port}/slow") as answer,
    ):
        assert await anext(answer.aiter_text()) == "first "
        await server.stop()
        assert not server.serves


async def test_a_client_that_leaves_ends_its_request() -> None:
    """The application hears of it at once."""
    port, left = free_port(), asyncio.Event()
    async with serving(application("a", asyncio.Event(), left), port), asyncio.timeout(DEADLINE_S):
        async with (
            httpx.AsyncClient(trust_env=False) as client,
            client.stream("GET", f"http://127.0.0.1:{port}/slow") as answer,
        ):
            await anext(answer.aiter_text())
        await left.wait()


async def test_an_address_of_somebody_else_is_refused() -> None:
    """A port that another program has is an error, not a second listener."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            await HttpServer(application("a"), "127.0.0.1", other.getsockname()[1], 100, 1).start()


async def test_an_application_that_does_not_start_is_told() -> None:
    """A failure of the application's start is the server's, and nothing listens after it."""

    @asynccontextmanager
    async def broken(app: Starlette) -> AsyncIterator[None]:
        raise ValueError("no model")
        yield

    port = free_port()
    with pytest.raises(ValueError, match="no model"):
        await HttpServer(Starlette(lifespan=broken), "127.0.0.1", port, 100, 1).start()
    with pytest.raises(httpx.ConnectError):
        await ask(port)
