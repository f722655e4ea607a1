"""The routes that move requests by hand.

POST /ellm/migrate    {"request_id": ID, "to": REPLICA}: move a running request; the answer comes when it has moved
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from http import HTTPStatus

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.api_errors import error_answer
from cluster.core_client import ClusterCore
from cluster.json_body import body_as
from cluster.migration import MigrationError
from memory_agent.errors import SettingsError


class MigrateRequest(BaseModel):
    """The body of POST /ellm/migrate."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request_id: str
    to: str


def migration_routes(cores: Callable[[], Sequence[ClusterCore]]) -> list[Route]:
    """The routes, to be put before any that matches everything. cores: of the models of this process, whose requests
    these are."""

    async def migrate(request: Request) -> Response:
        try:
            wanted = await body_as(MigrateRequest, request, '{"request_id": ID, "to": REPLICA}')
        except SettingsError as error:
            return error_answer(str(error), HTTPStatus.BAD_REQUEST)
        core = next((core for core in cores() if core.mover.has(wanted.request_id)), None)
        if core is None:
            why = f"no request {wanted.request_id} runs at this ingress process: it has finished, or never was"
            return error_answer(why, HTTPStatus.NOT_FOUND)
        try:
            return JSONResponse(asdict(await core.migrate(wanted.request_id, wanted.to)))
        except MigrationError as error:
            return error_answer(str(error), error.status)

    return [Route("/ellm/migrate", migrate, methods=["POST"])]
