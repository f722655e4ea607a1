"""A model that is served again right after it was removed."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

import cluster.ingress
from cluster.ingress import first_info
from tests.unit.cluster.fake_replicas import INFO


def handle(refusals: int) -> Any:
    """Unavailable for the first calls."""
    calls = iter(range(10**6))

    async def info() -> Any:
        if next(calls) < refusals:
            raise DeploymentUnavailableError(DeploymentID(name="m"))
        return INFO

    return SimpleNamespace(info=SimpleNamespace(remote=info))


async def test_what_is_not_known_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ingress, "_AGAIN_S", 0.0)
    assert await first_info(handle(refusals=3)) is INFO


async def test_what_stays_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ingress, "_SUCCESSOR_S", -1.0)
    with pytest.raises(DeploymentUnavailableError):
        await first_info(handle(refusals=3))
