"""Answers that are errors, in OpenAI's form."""

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from vllm.entrypoints.serve import create_error_response


def error_answer(message: str, status_code: HTTPStatus) -> JSONResponse:
    """OpenAI's error form, as vLLM writes it."""
    return _answer(create_error_response(message, status_code.phrase, status_code).model_dump(), status_code)


def no_such_model(name: str, served: list[str]) -> JSONResponse:
    """OpenAI's answer to a name that no model has; it lists those there are."""
    message = f"The model `{name}` does not exist. This cluster serves: {', '.join(served)}."
    error = create_error_response(message, "NotFoundError", HTTPStatus.NOT_FOUND, "model")
    return _answer(error.model_dump(), HTTPStatus.NOT_FOUND)


def _answer(content: dict[str, Any], status_code: HTTPStatus) -> JSONResponse:
    return JSONResponse(content, status_code=status_code)
