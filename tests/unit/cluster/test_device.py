"""Which device a cluster uses, and what nvidia-smi says of it."""

import subprocess
from collections.abc import Sequence
from importlib import metadata, util
from typing import Any

import pytest

from cluster import device as device_module
from cluster import gpus as gpus_module
from cluster.device import HOST, device_environment, device_named, find_device, gpu
from cluster.gpus import Gpu, chosen_gpu, list_gpus, pinned
from memory_agent.errors import SettingsError

MIB = 1 << 20
SMI = "0, GPU-aaaa-1, 81559, 80000, NVIDIA H100 80GB HBM3\n1, GPU-bbbb-2, 24564, 20000, NVIDIA RTX, 4090\n"


def smi(text: str = SMI) -> list[Gpu]:
    return list_gpus(lambda command: text)


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with vLLM's GPU build, cuda-python, and the GPUs of SMI."""
    monkeypatch.setattr(metadata, "distributions", lambda name: iter(["found"] if name == "vllm" else []))
    monkeypatch.setattr(util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpus_module, "_run", lambda command: SMI)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_nvidia_smi_is_read() -> None:
    """A line a GPU; sizes are MiB, and a name may contain commas."""
    assert smi() == [
        Gpu(0, "GPU-aaaa-1", "NVIDIA H100 80GB HBM3", 81559 * MIB, 80000 * MIB),
        Gpu(1, "GPU-bbbb-2", "NVIDIA RTX, 4090", 24564 * MIB, 20000 * MIB),
    ]


@pytest.mark.parametrize(
    "error", [FileNotFoundError("nvidia-smi"), subprocess.CalledProcessError(9, "nvidia-smi"), PermissionError("no")]
)
def test_a_driver_that_does_not_answer_is_a_setting(error: Exception) -> None:
    """The message says what to install, or to take the CPU build."""

    def run(command: Sequence[str]) -> str:
        raise error

    with pytest.raises(SettingsError, match=r"install NVIDIA's driver, or run `make serve EXTRA=cpu`"):
        list_gpus(run)


def test_a_divided_gpu_is_refused() -> None:
    """MIG hides the memory of a GPU from nvidia-smi's list."""
    with pytest.raises(SettingsError, match="MIG is not supported"):
        smi("0, GPU-aaaa-1, [N/A], [N/A], NVIDIA A100\n")


@pytest.mark.parametrize(
    ("visible", "index"), [(None, 0), ("1", 1), ("1,0", 1), ("GPU-bbbb", 1), ("GPU-aaaa-1, GPU-bbbb-2", 0)]
)
def test_the_first_visible_gpu_is_used(visible: str | None, index: int) -> None:
    """By index or by the beginning of its uuid; without CUDA_VISIBLE_DEVICES the first of all."""
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    chosen = chosen_gpu(smi(), environment)
    assert chosen.index == index
    assert pinned(chosen) == {"CUDA_VISIBLE_DEVICES": str(index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(("visible", "said"), [("", "is ''"), ("7", "is '7'"), ("MIG-1", "is 'MIG-1'")])
def test_no_visible_gpu_is_a_setting(visible: str, said: str) -> None:
    """The message says what there is, and what CUDA_VISIBLE_DEVICES was."""
    with pytest.raises(SettingsError, match=f"nvidia-smi lists 0, 1, CUDA_VISIBLE_DEVICES {said}"):
        chosen_gpu(smi(), {"CUDA_VISIBLE_DEVICES": visible})
    with pytest.raises(SettingsError, match="lists none, CUDA_VISIBLE_DEVICES is not set"):
        chosen_gpu([], {})


def test_this_build_of_vllm_computes_on_the_host() -> None:
    """It is the CPU build: the host is the device, and nothing is added to the environment."""
    assert find_device() is HOST and device_environment(HOST) == {}
    assert HOST.free_bytes() > 0 and not HOST.is_gpu


def test_the_gpu_build_computes_on_a_gpu(gpu_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is named by the GPU's index, and the cluster's processes see it alone."""
    assert find_device() == gpu(0) == device_named("gpu0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb")
    found = find_device()
    assert (found.name, found.is_gpu, device_named("cpu")) == ("gpu1", True, HOST)
    assert device_environment(found)["CUDA_VISIBLE_DEVICES"] == "1"
    assert 0.9 * 20000 * MIB < found.free_bytes() < 20000 * MIB, "some is left to others"
    with pytest.raises(SettingsError, match="does not list gpu5"):
        gpu(5).free_bytes()


@pytest.mark.parametrize(
    ("target", "name", "value", "said"),
    [
        (metadata, "distributions", lambda name: iter([]), "vLLM is not installed"),
        (util, "find_spec", lambda name: None, "cuda-python"),
    ],
)
def test_what_is_missing_is_named(
    gpu_build: None, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, value: Any, said: str
) -> None:
    """vLLM itself, or cuda-python beside its GPU build."""
    monkeypatch.setattr(target, name, value)
    with pytest.raises(SettingsError, match=said):
        find_device()


def test_memory_of_a_gpu_comes_in_whole_extents() -> None:
    """Blocks that a chunk holds several of are reckoned in runs, those of a whole chunk by themselves. A chunk has no
    less than 16 MiB."""
    whole, small = (device_module.KvUnit(gpu(0), size) for size in (16 * MIB, 360 << 10))
    assert (whole.unit_blocks, whole.unit_bytes, whole.bytes_for(3)) == (1, 16 * MIB, 48 * MIB)
    assert device_module.KvUnit(gpu(0), 2 * MIB).bytes_for(3) == 16 * MIB
    assert small.unit_bytes % (2 * MIB) == 0 and small.bytes_for(1) == small.unit_bytes
    assert small.bytes_for(1000) >= 1000 * (360 << 10)
    assert device_module.KvUnit(HOST, 360 << 10).bytes_for(3) == 3 * (360 << 10)
