"""What a start says and does before any process is there, on a machine with a GPU."""

import os

import pytest

from cluster import launcher
from cluster.config import ClusterConfig, HttpConfig
from cluster.device import HOST, gpu
from cluster.launcher import LocalCluster
from tests.unit.cluster.test_cli import free_port


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_gpu_is_chosen_pinned_and_called_experimental(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of the cluster sees that GPU alone; without one nothing is said and nothing changed."""
    device = gpu(1) if on_gpu else HOST
    monkeypatch.setattr(launcher, "remove_leftovers", list)
    monkeypatch.setattr(launcher, "find_device", lambda: device)
    monkeypatch.setattr(launcher, "device_environment", lambda one: {"CUDA_VISIBLE_DEVICES": "1"} if one.is_gpu else {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    said: list[str] = []
    cluster = LocalCluster(ClusterConfig(http=HttpConfig(port=free_port())), lambda *line: None)
    cluster._check(said.append)
    assert cluster.device is device
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("1" if on_gpu else "0")
    assert any("experimental: no GPU has run this project's tests" in line for line in said) is on_gpu
