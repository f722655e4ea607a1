"""What a start says and does before any process is there, on a machine with a GPU; and that a stop in the middle of a
start leaves nothing."""

import os
import subprocess
import sys
import time

import pytest

from cluster import launcher
from cluster.config import ClusterConfig, HttpConfig
from cluster.device import HOST, gpu
from cluster.footprint import SHM, Footprint
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


def test_what_an_engine_maps_while_it_is_stopped_is_removed() -> None:
    """An engine that was still starting makes shared memory during the stop, and is killed then."""

    class RayLives(Footprint):
        def ray_lives(self) -> bool:
            return True

    cluster = LocalCluster(ClusterConfig(), lambda *line: None)
    cluster.footprint = footprint = RayLives()
    segment = SHM / f"psm_{footprint.cluster_id}"
    code = (
        "import mmap, sys, time; file = open(sys.argv[1], 'wb+'); file.truncate(4096); "
        "segment = mmap.mmap(file.fileno(), 4096); print(flush=True); time.sleep(1000)"
    )

    def end_the_engine() -> None:
        engine = subprocess.Popen([sys.executable, "-c", code, str(segment)], stdout=subprocess.PIPE)
        assert engine.stdout is not None
        engine.stdout.readline()
        engine.stdout.close()
        time.sleep(3 * launcher._POLL_S)
        engine.kill()
        engine.wait()

    cluster._undo.append(("replicas", end_the_engine))
    cluster.stop()
    assert not segment.exists()
