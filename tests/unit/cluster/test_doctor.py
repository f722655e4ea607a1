"""`ellm doctor`: each check says what it found, and what to do where it is wrong."""

import json
import socket
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import cluster.doctor as doctor
from cluster.cli import app
from cluster.config import ClusterConfig, HttpConfig, ModelConfig
from cluster.finding import State
from cluster.mapping_check import gpu_mapping, host_mapping
from memory_agent.cuda_driver import CudaDriver

CONFIG = ClusterConfig()


def test_this_machine_passes_what_its_tests_need() -> None:
    """The tests run here, so nothing is missing; every finding that is not well says what to do."""
    findings = doctor.examine(CONFIG)
    assert [one for one in findings if one.state is State.FAILED and one.name != "memory"] == []
    assert {"system", "versions", "device", "mapping", "memory", "shared memory", "port", "malloc", "clock"} <= {
        one.name for one in findings
    }
    assert all(one.found and bool(one.remedy) == (one.state is not State.OK) for one in findings)


def test_a_version_that_the_package_does_not_take_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the version that it takes."""
    monkeypatch.setattr(doctor, "_pins", lambda: [Requirement("ray[serve]==1.0.*")])
    [finding] = doctor.check_versions(CONFIG)
    assert (finding.state, "==1.0.*" in finding.remedy) == (State.FAILED, True)


def test_what_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither vLLM nor Ray."""
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    [finding] = doctor.check_versions(CONFIG)
    assert (finding.state, finding.found) == (State.FAILED, "not installed: vllm, ray")


def test_a_port_in_use_is_told_with_its_number() -> None:
    """It may be the cluster's own, so it is no failure."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [finding] = doctor.check_listening(ClusterConfig(http=HttpConfig(port=port)))
    assert (finding.state, str(port) in finding.found) == (State.WARNING, True)


def test_shared_memory_is_there(tmp_path: Path) -> None:
    """A folder that is missing fails; one in which others may delete is a warning."""
    [missing] = doctor.check_shared_memory(CONFIG, tmp_path / "none")
    assert missing.state is State.FAILED
    tmp_path.chmod(0o777)
    [loose] = doctor.check_shared_memory(CONFIG, tmp_path)
    assert (loose.state, "1777" in loose.remedy) == (State.WARNING, True)
    tmp_path.chmod(0o1777)
    [fine] = doctor.check_shared_memory(CONFIG, tmp_path)
    assert fine.state is State.OK


@pytest.mark.parametrize(
    ("tasks", "cpu", "states"),
    [("max", "max 100000", {}), ("100", "100000 100000", {"tasks": "warning", "cpu limit": "warning"})],
)
def test_limits_of_the_cgroup(tmp_path: Path, tasks: str, cpu: str, states: dict[str, str]) -> None:
    """What is unlimited is not mentioned; what is too tight is."""
    (tmp_path / "pids.max").write_text(f"{tasks}\n")
    (tmp_path / "cpu.max").write_text(f"{cpu}\n")
    found = {one.name: str(one.state) for one in doctor.check_limits(CONFIG, tmp_path) if one.name != "open files"}
    assert found == states


@pytest.mark.parametrize(
    ("slow", "dtype", "state", "remedy"),
    [
        (False, "bfloat16", State.OK, ""),
        (True, "auto", State.WARNING, "leave dtype at auto"),
        (True, "bfloat16", State.WARNING, "dtype: auto for chosen"),
    ],
)
def test_a_cpu_that_is_slow_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, slow: bool, dtype: Any, state: State, remedy: str
) -> None:
    """With the models that ask for it all the same."""
    monkeypatch.setattr(doctor, "find_device", lambda: SimpleNamespace(is_gpu=False))
    monkeypatch.setattr(doctor, "has_slow_half_precision", lambda: slow)
    config = ClusterConfig(models=[ModelConfig(name="chosen", dtype=dtype)])
    [finding] = [one for one in doctor.check_device(config) if one.name == "precision"]
    assert (finding.state, remedy in finding.remedy) == (state, True)


def test_memory_that_is_too_little_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figure."""
    monkeypatch.setattr(doctor, "free_memory_bytes", lambda: 100 << 20)
    [finding] = doctor.check_memory(CONFIG)
    assert (finding.state, finding.found.startswith("100 MiB free")) == (State.FAILED, True)


def test_another_heap_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations would not come back."""
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    [finding] = doctor.check_heap(CONFIG)
    assert (finding.state, "LD_PRELOAD" in finding.remedy) == (State.WARNING, True)


@pytest.mark.parametrize(("answer", "state"), [(0, State.OK), (5, State.WARNING), (-1, State.OK)])
def test_the_clock(answer: int, state: State) -> None:
    """Synchronised, not, and not to be asked."""
    [finding] = doctor.check_clock(CONFIG, lambda: answer)
    assert finding.state is state


def test_memory_files_of_this_kernel_give_back() -> None:
    """The probe maps and punches for real."""
    assert host_mapping().state is State.OK


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100


def played_driver(able: int, init: Result = Result.CUDA_SUCCESS) -> CudaDriver:
    api: Any = SimpleNamespace(
        CUresult=Result,
        CUdevice_attribute=SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=102),
        cuInit=lambda flags: (init,),
        cuDriverGetVersion=lambda: (Result.CUDA_SUCCESS, 12090),
        cuDeviceGet=lambda index: (Result.CUDA_SUCCESS, index),
        cuDeviceGetAttribute=lambda attribute, device: (Result.CUDA_SUCCESS, able),
        cuGetErrorName=lambda error: (Result.CUDA_SUCCESS, b"CUDA_ERROR_NO_DEVICE"),
        cuGetErrorString=lambda error: (Result.CUDA_SUCCESS, b"no device"),
    )
    return CudaDriver(api)


def test_a_gpu_with_and_without_virtual_memory() -> None:
    """The driver's own answer decides; a driver that does not start is a failure with its reason."""
    fine, without = gpu_mapping(0, played_driver(1)), gpu_mapping(0, played_driver(0))
    broken = gpu_mapping(0, played_driver(1, Result.CUDA_ERROR_NO_DEVICE))
    assert (fine.state, "12.9" in fine.found) == (State.OK, True)
    assert (without.state, "elastic: false" in without.remedy) == (State.FAILED, True)
    assert (broken.state, "CUDA_ERROR_NO_DEVICE" in broken.found) == (State.FAILED, True)


@pytest.mark.parametrize(("free", "status"), [(1 << 20, 1), (1 << 50, 0)])
def test_the_exit_status_says_whether_a_cluster_would_start(
    monkeypatch: pytest.MonkeyPatch, free: int, status: int
) -> None:
    """And the JSON says the same."""
    monkeypatch.setattr(doctor, "free_memory_bytes", lambda: free)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert (result.exit_code, told["ok"]) == (status, status == 0)
    assert {"name", "state", "found", "remedy"} == set(told["checks"][0])
    assert CliRunner().invoke(app, ["doctor"]).exit_code == status
