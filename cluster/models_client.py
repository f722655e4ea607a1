"""The models of a running cluster over HTTP: the other side of ``cluster.models_api``."""

from typing import Any
from urllib.parse import quote

import httpx

from cluster.api_client import CredentialsError, api_client
from cluster.config import ModelConfig
from cluster.readiness import NoAnswer, key_refused, no_cluster

_TIMEOUT_S = 30.0


class RefusedError(Exception):
    """The cluster refused a command. The message says why, and what would work."""


class UnknownError(RefusedError):
    """The cluster has no such model, or no such request."""


class ModelsClient:
    """Commands to the cluster at ``url``. Each raises NoAnswer where no cluster answers, RefusedError where it
    refuses."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def models(self) -> list[dict[str, Any]]:
        """Every model, as ``ModelKeeper.listing`` tells it."""
        models: list[dict[str, Any]] = self._call("GET", "")["models"]
        return models

    def story(self, name: str) -> dict[str, Any]:
        """One model, with the lines of its addition or removal. Raises UnknownError where it is gone."""
        return self._call("GET", _path(name))

    def add(self, model: ModelConfig) -> None:
        """Begin to add a model."""
        self._call("POST", "", model.model_dump(mode="json"))

    def remove(self, name: str) -> None:
        """Begin to remove a model."""
        self._call("DELETE", _path(name))

    def limit(self, name: str, wanted: dict[str, str]) -> None:
        """Change the limits of a model: sizes by ``guarantee`` and ``ceiling``."""
        self._call("PATCH", _path(name), wanted)

    def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        return command(self._url, method, f"/ellm/models{path}", body)


def command(cluster_url: str, method: str, path: str, body: object = None) -> dict[str, Any]:
    """What the cluster answers to a command. Raises NoAnswer where no cluster answers, RefusedError where it
    refuses."""
    cluster_url = cluster_url.rstrip("/")
    try:
        with api_client(_TIMEOUT_S) as client:
            answer = client.request(method, cluster_url + path, json=body)
    except CredentialsError as error:
        raise NoAnswer(str(error)) from error
    except httpx.HTTPError as error:
        raise no_cluster(cluster_url, error) from error
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.is_success and isinstance(content, dict):
        return content
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise NoAnswer(key_refused(cluster_url, answer))
    try:
        reason = str(content["error"]["message"])
    except (TypeError, KeyError) as error:
        raise NoAnswer(
            f"{cluster_url} answers, but not as an ellm cluster (status {answer.status_code}); is another server on "
            "that port?"
        ) from error
    raise (UnknownError if answer.status_code == httpx.codes.NOT_FOUND else RefusedError)(reason)


def _path(name: str) -> str:
    return "/" + quote(name, safe="")
