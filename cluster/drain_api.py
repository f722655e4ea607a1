"""The routes by which replicas and nodes drain, for ``ellm drain``.

    POST /ellm/drain     {"target": REPLICA or NODE}: no request goes there any more, and those that are there move;
                         with "undo": true they may have requests again
    GET  /ellm/drains    what drains, and what is left there

A drain is begun, not waited for: the answer is 202.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from http import HTTPStatus
from itertools import chain

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.api_errors import error_answer
from cluster.core_client import ClusterCore
from cluster.drains import drains, find
from cluster.json_body import body_as
from cluster.migration import MigrationError
from memory_agent.errors import SettingsError


class DrainRequest(BaseModel):
    """The body of POST /ellm/drain."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target: str
    undo: bool = False


def drain_routes(cores: Callable[[], Sequence[ClusterCore]]) -> list[Route]:
    """The routes, to be put before any that matches everything. cores: of the models of this process."""

    async def drain(request: Request) -> Response:
        try:
            expected = '{"target": REPLICA or NODE}, with "undo": true to end a drain'
            wanted = await body_as(DrainRequest, request, expected)
        except SettingsError as error:
            return error_answer(str(error), HTTPStatus.BAD_REQUEST)
        there = cores()
        meant = find(wanted.target, there)
        if not meant:
            known = sorted({name for core in there for one in core.replicas for name in (one.engine_id, one.node_ip)})
            why = f"no replica and no node is named {wanted.target}; there are {', '.join(known) or 'none now'}"
            return error_answer(why, HTTPStatus.NOT_FOUND)
        try:
            if not wanted.undo:
                for core, replicas in meant.items():
                    core.check_drain(replicas)
            for core, replicas in meant.items():
                await core.drain(replicas, not wanted.undo)
        except MigrationError as error:
            return error_answer(str(error), error.status)
        return JSONResponse({"replicas": sorted(chain.from_iterable(meant.values()))}, HTTPStatus.ACCEPTED)

    async def listing(request: Request) -> Response:
        return JSONResponse({"drains": [asdict(one) for one in drains(cores())]})

    return [Route("/ellm/drain", drain, methods=["POST"]), Route("/ellm/drains", listing)]
