"""Asking a running cluster over HTTP: one real answer, and its status."""

from typing import Any

import httpx

from cluster.api_client import KEY_FILE_VARIABLE, KEY_VARIABLE, CredentialsError, api_client

_ANSWER_TIMEOUT_S = 60.0
_STATUS_TIMEOUT_S = 5.0


class NoAnswer(Exception):
    """The cluster did not answer, or not as it should. The message names the address and the remedy."""


def no_cluster(url: str, error: httpx.HTTPError) -> NoAnswer:
    """What to say where a request to ``url`` ended in ``error``."""
    if isinstance(error, httpx.UnsupportedProtocol):
        return NoAnswer(f"{url!r} is no address; it looks like http://127.0.0.1:8000")
    return NoAnswer(
        f"no cluster answers at {url} ({error or type(error).__name__}); start one with `ellm serve`, or name its "
        "address with --url"
    )


def answer_once(url: str, model: str, key: str | None = None, certfile: str | None = None) -> str:
    """One short completion by ``model``. ``key``, ``certfile``: see ``cluster.api_client``. Raises NoAnswer where the
    API refuses it."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    try:
        with api_client(_ANSWER_TIMEOUT_S, key, certfile) as client:
            answer = client.post(f"{url}/v1/completions", json=body)
    except CredentialsError as error:
        raise NoAnswer(str(error)) from error
    except httpx.HTTPError as error:
        raise NoAnswer(f"{url} did not answer a completion: {error or type(error).__name__}") from error
    if answer.status_code != 200:
        raise NoAnswer(f"{url} answered a completion by {model} with status {answer.status_code}: {answer.text[:500]}")
    return str(answer.json()["choices"][0]["text"])


def read_status(url: str) -> dict[str, Any]:
    """The snapshot at ``url``/ellm/status. Raises NoAnswer."""
    snapshot: dict[str, Any] = _read(url, "/ellm/status", {}, dict)
    return snapshot


def read_decisions(url: str, count: int, subject: str) -> list[dict[str, Any]]:
    """The controller's last decisions at ``url``/ellm/decisions, the newest first. Raises NoAnswer."""
    decisions: list[dict[str, Any]] = _read(url, "/ellm/decisions", {"last": str(count), "subject": subject}, list)
    return decisions


def key_refused(url: str, answer: httpx.Response) -> str:
    """What to say where the cluster does not take the key, or the lack of one."""
    return (
        f"{url} wants an API key with the scope admin (status {answer.status_code}): put one into {KEY_VARIABLE}, or "
        f"the path of a file with it into {KEY_FILE_VARIABLE}"
    )


def _read(url: str, path: str, params: dict[str, str], shape: type) -> Any:
    """The JSON at that path, which is to be of that shape."""
    try:
        with api_client(_STATUS_TIMEOUT_S) as client:
            answer = client.get(f"{url.rstrip('/')}{path}", params=params)
    except CredentialsError as error:
        raise NoAnswer(str(error)) from error
    except httpx.HTTPError as error:
        raise no_cluster(url, error) from error
    try:
        value = answer.json()
    except ValueError:
        value = None
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise NoAnswer(key_refused(url, answer))
    if answer.status_code != 200 or not isinstance(value, shape):
        raise NoAnswer(
            f"{url} answers, but not as an ellm cluster (status {answer.status_code}); is another server on that port?"
        )
    return value
