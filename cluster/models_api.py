"""The routes under /ellm/models: the registry's commands over HTTP, for ``ellm models``.

    GET    /ellm/models           every model
    POST   /ellm/models           add one; the body is an entry of the configuration's ``models``
    GET    /ellm/models/{name}    one model, and how its addition or removal goes
    DELETE /ellm/models/{name}    remove it
    PATCH  /ellm/models/{name}    {"guarantee": SIZE, "ceiling": SIZE}, either may be left out

Commands are begun, not waited for: the answer is 202.
"""

import asyncio
from collections.abc import Awaitable, Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from ray.exceptions import RayError, RayTaskError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.api_errors import error_answer
from cluster.config import ModelConfig, Size
from cluster.json_body import json_body
from cluster.model_set import ModelConflictError, UnknownModelError
from cluster.registry_link import registry_actor
from memory_agent.errors import SettingsError

_ANSWER_TIMEOUT_S = 10.0
_STATUS = {UnknownModelError: HTTPStatus.NOT_FOUND, ModelConflictError: HTTPStatus.CONFLICT}


class RegistryAwayError(RuntimeError):
    """The model registry did not answer. Models are served without it; try again when it is back."""


class LimitRequest(BaseModel):
    """The body of PATCH: new bytes of one replica. "auto" is what its engines started with."""

    model_config = ConfigDict(extra="forbid", strict=True)

    guarantee: Size = None
    ceiling: Size = None


async def read_models() -> list[dict[str, Any]]:
    """Every model of the cluster, JSON-ready. Raises RegistryAwayError."""
    models: list[dict[str, Any]] = await _ask("listing")
    return models


async def _list(request: Request) -> Response:
    return JSONResponse({"models": await read_models()})


async def _add(request: Request) -> Response:
    config = ModelConfig.model_validate(await json_body(request))
    await _ask("add", config)
    return JSONResponse({"name": config.name}, HTTPStatus.ACCEPTED)


async def _story(request: Request) -> Response:
    return JSONResponse(await _ask("story_of", request.path_params["name"]))


async def _remove(request: Request) -> Response:
    name = request.path_params["name"]
    await _ask("remove", name)
    return JSONResponse({"name": name}, HTTPStatus.ACCEPTED)


async def _limit(request: Request) -> Response:
    name = request.path_params["name"]
    wanted = LimitRequest.model_validate(await json_body(request))
    if not wanted.model_fields_set:
        raise SettingsError('nothing to change: say "guarantee" or "ceiling", a size such as "512MiB" or "auto"')
    await _ask("limit", name, {key: getattr(wanted, key) for key in wanted.model_fields_set})
    return JSONResponse({"name": name}, HTTPStatus.ACCEPTED)


_COMMANDS = {
    "/ellm/models": {"GET": _list, "POST": _add},
    "/ellm/models/{name:path}": {"GET": _story, "DELETE": _remove, "PATCH": _limit},
}


def model_routes() -> list[Route]:
    """The routes, to be put before any that matches everything."""
    return [Route(path, _endpoint(commands), methods=list(commands)) for path, commands in _COMMANDS.items()]


def _endpoint(commands: Mapping[str, Any]) -> Any:
    async def answer(request: Request) -> Response:
        try:
            response: Response = await commands["GET" if request.method == "HEAD" else request.method](request)
        except ValidationError as error:
            wrong = "; ".join(_explain(dict(item)) for item in error.errors(include_url=False))
            return error_answer(wrong, HTTPStatus.BAD_REQUEST)
        except SettingsError as error:
            return error_answer(str(error), _STATUS.get(type(error), HTTPStatus.BAD_REQUEST))
        except RegistryAwayError as error:
            return error_answer(str(error), HTTPStatus.SERVICE_UNAVAILABLE)
        return response

    return answer


def _explain(item: Mapping[str, Any]) -> str:
    where = ".".join(map(str, item["loc"])) or "the body"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"


async def _ask(method: str, *args: Any) -> Any:
    """What the registry answers. Raises what it raises on purpose, and RegistryAwayError."""
    try:
        registry = await asyncio.to_thread(registry_actor)
        answer: Awaitable[Any] = getattr(registry, method).remote(*args)
        return await asyncio.wait_for(answer, _ANSWER_TIMEOUT_S)
    except RayTaskError as error:
        if isinstance(error.cause, SettingsError):
            raise error.cause from error
        raise
    except (RayError, ValueError, TimeoutError) as error:
        raise RegistryAwayError(f"the model registry is away ({type(error).__name__}); try again soon") from error
