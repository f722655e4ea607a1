"""The NVIDIA GPUs of this host, as nvidia-smi lists them, and the one that a cluster uses."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from memory_agent.errors import SettingsError

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free,name", "--format=csv,noheader,nounits")
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Gpu:
    """index: nvidia-smi's, which is the order on the PCI bus. free_bytes: left by all processes."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


def list_gpus(run: Callable[[Sequence[str]], str] | None = None) -> list[Gpu]:
    """Every GPU. Raises SettingsError where nvidia-smi is missing, fails, or tells no memory (a GPU divided by MIG)."""
    try:
        text = (run or _run)(_QUERY)
    except (OSError, subprocess.SubprocessError) as error:
        raise SettingsError(
            f"vLLM's GPU build is installed, but nvidia-smi does not answer: {error}; install NVIDIA's driver, or run "
            "`make serve EXTRA=cpu`"
        ) from error
    return [_gpu(line) for line in text.splitlines() if line.strip()]


def chosen_gpu(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> Gpu:
    """The first of ``gpus`` that CUDA_VISIBLE_DEVICES names, by index or uuid; the first of all where it is not set.

    Raises SettingsError where there is none.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    wanted = visible.split(",")[0].strip() if visible is not None else str(gpus[0].index) if gpus else ""
    for gpu in gpus:
        if wanted == str(gpu.index) or (wanted.startswith("GPU-") and gpu.uuid.startswith(wanted)):
            return gpu
    said = "is not set" if visible is None else f"is {visible!r}"
    there = ", ".join(str(gpu.index) for gpu in gpus) or "none"
    raise SettingsError(f"no GPU to use: nvidia-smi lists {there}, CUDA_VISIBLE_DEVICES {said}; set it to one of these")


def pinned(gpu: Gpu) -> dict[str, str]:
    """Environment in which ``gpu`` is the only one that CUDA sees."""
    return {"CUDA_VISIBLE_DEVICES": str(gpu.index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S).stdout


def _gpu(line: str) -> Gpu:
    try:
        index, uuid, total, free, name = (part.strip() for part in line.split(",", 4))
        return Gpu(int(index), uuid, name, int(total) << 20, int(free) << 20)
    except ValueError as error:
        raise SettingsError(f"nvidia-smi says {line!r}, not how much memory is free: MIG is not supported") from error
