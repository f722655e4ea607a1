"""The HTTP server of one ingress process, on the event loop that everything else of it runs on.

Ray Serve's own proxies are not used: each chunk of each stream would be pickled and sent to another process, which
costs more than making it. Ingress processes of one host share the port, and the system deals connections out.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

KEEP_ALIVE_S = 90
"""Idle connections are kept so long, as Ray Serve's proxies do."""
BACKLOG = 2048


class HttpServer:
    """Serves one application on one address. Belongs to the event loop that starts it."""

    def __init__(self, app: Starlette, host: str, port: int, request_limit: int, patience_s: int) -> None:
        """
        Args:
            request_limit: requests at once; more are refused with 503.
            patience_s: how long requests may take to end after ``stop``.
        """
        self._address = host, port
        # Not by uvicorn, which ends the process where it fails.
        self._lifespan = app.router.lifespan_context(app)
        self._server = _Server(
            uvicorn.Config(
                app,
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=patience_s,
                limit_concurrency=request_limit,
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def serves(self) -> bool:
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Start the application and return when requests are taken. Raises OSError where nothing can listen there, and
        what the application's start raises."""
        listener = _listen(*self._address)
        try:
            await self._lifespan.__aenter__()
        except BaseException:  # given back whatever the reason, then raised again
            listener.close()
            raise
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))
        await self._server.ready.wait()

    async def stop(self) -> None:
        """Take no more requests, let those that run end, and end the application. Again does nothing."""
        self._server.should_exit = True
        task, self._task = self._task, None
        if task is not None:
            await asyncio.wait([task])
            await self._lifespan.__aexit__(None, None, None)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process is a worker of Ray, which has its own handlers."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # REUSEADDR: a new process can listen where connections of a killed one still linger.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
