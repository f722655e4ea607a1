"""The HTTP server of one ingress process, on the event loop that everything else of it runs on.

Ray Serve's own proxies are not used: each chunk of each stream would be pickled and sent to another process, which
costs more than making it. Ingress processes of one host share the port, and the system deals connections out.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api_errors import error_answer
from cluster.config import HttpLimits
from cluster.http_connection import ConnectionBounds, GuardedConfig

KEEP_ALIVE_S = 90
"""Idle connections are kept so long, as Ray Serve's proxies do."""
BACKLOG = 2048
IDLE_MOST = 16384
"""Connections without a request that are kept, where the system allows as many files."""
_IDLE_LEAST, _OTHER_FILES = 64, 512
_RETRY_S = 1


@dataclass(frozen=True)
class Certificate:
    """PEM files. keyfile: None where the key is with the certificate."""

    certfile: str
    keyfile: str | None = None


class HttpServer:
    """Serves one application on one address. Belongs to the event loop that starts it."""

    def __init__(
        self,
        app: Starlette,
        host: str,
        port: int,
        request_limit: int,
        patience_s: int,
        limits: HttpLimits | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        """
        Args:
            request_limit: requests at once; more are refused with 503.
            patience_s: how long requests may take to end after ``stop``.
            limits: of what clients may send, and how slowly.
            certificate: for TLS; None for none.
        """
        bounds = ConnectionBounds(limits or HttpLimits(), _idle_most(request_limit))
        self._write_timeout_s = bounds.limits.write_timeout_s
        self._address = host, port
        # Not by uvicorn, which ends the process where it fails.
        self._lifespan = app.router.lifespan_context(app)
        self._server = _Server(
            GuardedConfig(
                _Bounded(app, request_limit),
                bounds,
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=patience_s,
                ssl_certfile=certificate.certfile if certificate is not None else None,
                ssl_keyfile=certificate.keyfile if certificate is not None else None,
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def serves(self) -> bool:
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Start the application and return when requests are taken. Raises OSError where nothing can listen there or a
        certificate cannot be read, and what the application's start raises."""
        self._server.config.load()  # where it reads a certificate
        listener = _listen(*self._address, self._write_timeout_s)
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


class _Bounded:
    """Refuses requests beyond ``limit`` at once. Connections without a request do not count, unlike in uvicorn's own
    bound."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._running >= self._limit:
            answer = error_answer("this cluster has too many requests now", HTTPStatus.SERVICE_UNAVAILABLE)
            answer.headers["retry-after"] = str(_RETRY_S)
            await answer(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1


def _idle_most(request_limit: int) -> int:
    """Idle connections that leave enough files for requests. Takes as many files as the system allows this process."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY:
        return IDLE_MOST
    return min(IDLE_MOST, max(_IDLE_LEAST, most - request_limit - _OTHER_FILES))


def _listen(host: str, port: int, write_timeout_s: float) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # REUSEADDR: a new process can listen where connections of a killed one still linger.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Of every connection: what is written at the end of an answer waits for no reader any more.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_timeout_s * 1000))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
