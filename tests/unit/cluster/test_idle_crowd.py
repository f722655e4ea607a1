"""Very many connections that do nothing, and served traffic beside them."""

import asyncio
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cluster.config import HttpLimits
from cluster.http_server import HttpServer
from tests.unit.cluster.test_http_server import free_port

CROWD = 10_000
REQUESTS = 1000
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def serve(port: int, pipe: Connection) -> None:
    """A server until the pipe says something."""

    async def say(request: Request) -> Response:
        return PlainTextResponse("a")

    async def run() -> None:
        app = Starlette(routes=[Route("/", say)])
        server = HttpServer(app, "127.0.0.1", port, 8192, 1, HttpLimits(header_timeout_s=600.0))
        await server.start()
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        await server.stop()

    asyncio.run(run())


async def median_s(port: int) -> float:
    """Of requests one after the other over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = []
    for _ in range(REQUESTS):
        begun = time.perf_counter()
        writer.write(GET)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readexactly(1)
        times.append(time.perf_counter() - begun)
    writer.close()
    return statistics.median(times)


@pytest.mark.slow
def test_ten_thousand_idle_connections_change_nothing(record_property: Callable[[str, object], None]) -> None:
    """As many as the system allows are kept, every request beside them is answered, about as fast as without; new
    connections get in."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    crowd = min(CROWD, files - 8192 - 1024)  # the server keeps files for requests
    port = free_port()
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, there))
    process.start()
    assert here.recv() == "ready"

    async def measure() -> tuple[float, float, int]:
        alone = await median_s(port)
        idle = []
        for at in range(0, crowd, 500):
            idle += await asyncio.gather(
                *(asyncio.open_connection("127.0.0.1", port) for _ in range(min(500, crowd - at)))
            )
        beside = await median_s(port)
        kept = sum(not reader.at_eof() for reader, _ in idle)
        for _, writer in idle:
            writer.transport.abort()
        return alone, beside, kept

    try:
        alone, beside, kept = asyncio.run(measure())
    finally:
        here.send("stop")
        process.join()
    record_property("median_ms_alone_beside", (1000 * alone, 1000 * beside))
    assert kept == crowd
    assert beside < 3 * alone, f"{1000 * alone:.2f} ms alone, {1000 * beside:.2f} ms beside {crowd}"
