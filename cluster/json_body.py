"""The JSON body of a command of the API.

It has to be announced as application/json, which a web page of another origin cannot do without asking first.
"""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from memory_agent.errors import SettingsError

M = TypeVar("M", bound=BaseModel)


async def json_body(request: Request) -> Any:
    """Raises SettingsError where there is none."""
    _check_kind(request)
    try:
        return json.loads(await request.body())
    except ValueError as error:
        raise SettingsError(f"the body is not JSON: {error}") from error


async def body_as(model: type[M], request: Request, expected: str) -> M:
    """``expected``: the body in words. Raises SettingsError for another one."""
    _check_kind(request)
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise SettingsError(f"the body should be {expected}") from error


def _check_kind(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
        raise SettingsError(f"the body should be application/json, found {kind or 'nothing'}")
