"""The models of one ingress process: each is built when the registry wants it, and ends when its requests have.

wanted --> built --> routed ----------> withdrawn -----------------> closed
                     requests come in   no new ones, the rest ends
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from cluster.app import ApiModel
from cluster.engine import ClusterEngine
from cluster.model_plan import IngressState

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ServedModel:
    """One model behind the API: its engine, vLLM's application over it, and the metrics of both. close: what to await
    when it is over, beside the engine's shutdown."""

    name: str
    engine: ClusterEngine
    app: FastAPI
    metrics: CollectorRegistry
    close: Callable[[], Awaitable[None]]


@dataclass
class _Seat:
    """One model's place: its task, and what the task waits for."""

    leave: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Routed, or failed."""
    task: "asyncio.Task[None] | None" = None
    served: ServedModel | None = None
    requests: int = 0
    error: str | None = None

    @property
    def routed(self) -> bool:
        return self.served is not None and not self.leave.is_set()


class ModelTable:
    """Models by name. Belongs to the event loop it is used on."""

    def __init__(self, build: Callable[[ApiModel], Awaitable[ServedModel]]) -> None:
        """build: makes a model ready to be served, waiting for a replica of it; may raise anything."""
        self._build = build
        self._seats: dict[str, _Seat] = {}
        self._order: list[str] = []

    @property
    def routed(self) -> list[ServedModel]:
        """The models that take requests, in the order in which they are wanted."""
        seats = [self._seats[name] for name in self._order if name in self._seats]
        return [seat.served for seat in seats if seat.served is not None and seat.routed]

    def get(self, name: str) -> ServedModel | None:
        """The model, where it takes requests."""
        seat = self._seats.get(name)
        return seat.served if seat is not None and seat.routed else None

    @contextmanager
    def request(self, model: ServedModel) -> Iterator[None]:
        """Count a request of a routed model while it lasts: the model is not closed before its end."""
        seat = self._seats[model.name]
        seat.requests += 1
        seat.idle.clear()
        try:
            yield
        finally:
            seat.requests -= 1
            if not seat.requests:
                seat.idle.set()

    def follow(self, wanted: Sequence[ApiModel]) -> None:
        """Build what is new in ``wanted``, and withdraw what is not in it any more. Does not wait."""
        self._order = [model.spec.model_name for model in wanted]
        for model in wanted:
            name = model.spec.model_name
            if name not in self._seats:
                seat = self._seats[name] = _Seat()
                seat.idle.set()
                seat.task = asyncio.get_running_loop().create_task(self._hold(model, seat))
        for name in set(self._seats) - set(self._order):
            self._withdraw(self._seats[name])

    async def until_ready(self, names: Sequence[str]) -> None:
        """Wait until each of these models, as far as they are wanted, is routed or has failed."""
        await asyncio.gather(*(self._seats[name].ready.wait() for name in names if name in self._seats))

    async def close(self) -> None:
        """End every model at once, whatever its requests."""
        tasks = [seat.task for seat in self._seats.values() if seat.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def state(self) -> IngressState:
        """What the registry needs to know."""
        return IngressState(
            routed=frozenset(name for name, seat in self._seats.items() if seat.routed),
            in_flight={name: seat.requests for name, seat in self._seats.items() if seat.served is not None},
            failed={name: seat.error for name, seat in self._seats.items() if seat.error is not None},
        )

    def _withdraw(self, seat: _Seat) -> None:
        seat.leave.set()
        if seat.served is None and seat.task is not None:
            seat.task.cancel()

    async def _hold(self, model: ApiModel, seat: _Seat) -> None:
        """Keep the seat until the model is not wanted any more; one that failed keeps its reason there."""
        name = model.spec.model_name
        try:
            await self._serve(model, seat)
        except Exception as error:  # vLLM raises anything for a model that it cannot serve
            logger.error("the API of %s failed", name, exc_info=error)
            seat.error = f"{type(error).__name__}: {error}"
            seat.ready.set()
            await seat.leave.wait()
        finally:
            seat.ready.set()
            del self._seats[name]

    async def _serve(self, model: ApiModel, seat: _Seat) -> None:
        served = await self._build(model)
        try:
            async with served.app.router.lifespan_context(served.app):
                seat.served = served
                seat.ready.set()
                await seat.leave.wait()
                await seat.idle.wait()
        finally:
            served.engine.shutdown()
            await served.close()
