"""The routes that move requests by hand.

POST /ellm/migrate    {"request_id": ID, "to": REPLICA}: move a running request; the answer comes when it has moved

A request moves by the ingress process that has its client's stream; another one asks it to.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.api_errors import error_answer
from cluster.core_client import ClusterCore
from cluster.ingress_peers import IngressPeers
from cluster.json_body import body_as
from cluster.migration import MigrationError
from cluster.move import Migrated
from memory_agent.errors import SettingsError

MOVE_TIMEOUT_S = 120.0


class MigrateRequest(BaseModel):
    """The body of POST /ellm/migrate."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request_id: str
    to: str


@dataclass(frozen=True)
class MoveAnswer:
    """How a migration went, or why it did not, with the status for HTTP. Crosses processes."""

    moved: Migrated | None
    why: str = ""
    status: HTTPStatus = HTTPStatus.OK


async def move_here(cores: Sequence[ClusterCore], request_id: str, to: str) -> MoveAnswer | None:
    """Move a request of one of these cores to the replica ``to``; None where none of them has it."""
    core = next((core for core in cores if core.mover.has(request_id)), None)
    if core is None:
        return None
    try:
        return MoveAnswer(await core.migrate(request_id, to))
    except MigrationError as error:
        return MoveAnswer(None, str(error), error.status)


def migration_routes(cores: Callable[[], Sequence[ClusterCore]], peers: IngressPeers) -> list[Route]:
    """The routes, to be put before any that matches everything. cores: of the models of this process."""

    async def migrate(request: Request) -> Response:
        try:
            wanted = await body_as(MigrateRequest, request, '{"request_id": ID, "to": REPLICA}')
        except SettingsError as error:
            return error_answer(str(error), HTTPStatus.BAD_REQUEST)
        answer = await move_here(cores(), wanted.request_id, wanted.to)
        if answer is None:
            others = await peers.ask("migrate", wanted.request_id, wanted.to, timeout_s=MOVE_TIMEOUT_S)
            answer = next((one for one in others if one is not None), None)
        if answer is None:
            why = f"no request {wanted.request_id} runs here: it has finished, or never was"
            return error_answer(why, HTTPStatus.NOT_FOUND)
        if answer.moved is None:
            return error_answer(answer.why, answer.status)
        return JSONResponse(asdict(answer.moved))

    return [Route("/ellm/migrate", migrate, methods=["POST"])]
