"""What a machine with an NVIDIA GPU says about the CUDA backend: its tests, then what each call of it costs.

Needs torch (a CUDA build), cuda-python, pytest and hypothesis, and nothing else of this project's dependencies; tests
and figures of engines also vLLM's GPU build. Exit status: 0 all well, 1 a test or the benchmark of engines failed (the
other figures are taken all the same), 2 no GPU.

    create_us, map_us, unmap_us, release_us   median of one call for a chunk of the granularity (2 MiB)
    backed_map_us, backed_unmap_us            likewise in a range that shows scratch where no chunk is (a KV cache)
    commit_gb_per_s, return_gb_per_s          bytes over (create + map), and over (unmap + release), for that chunk
    activation_ratio                          time of a forward outside the pool over inside it, medians of turns
    concurrency_ratio, no_pressure_..., ...   ``benchmarks.gpu_engines``, where vLLM is there
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

from benchmarks.record import finish
from memory_agent.chunks import ChunkPool
from memory_agent.cuda_allocator import CudaAllocator
from memory_agent.cuda_vmm import CudaVmm
from memory_agent.errors import SettingsError
from memory_agent.vmm import ChunkHandle

ROOT = Path(__file__).parents[1]
CHUNKS = 128
CALLS = ("create", "map", "unmap", "release")


def why_no_gpu() -> str | None:
    """What keeps this machine from the check; None where it can run."""
    missing = [name for name in ("torch", "cuda", "pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (cuda is the package cuda-python)"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    try:
        CudaVmm().close()
    except SettingsError as error:
        return str(error)
    return None


def run_tests() -> int:
    """Exit status of the GPU tests. Without the project's pytest options: they need plugins that may be missing."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-ra", "-m", "gpu", "tests/gpu"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def timed_us(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def run_engines() -> dict[str, float] | None:
    """Figures of engines; None where they failed, none where there is no vLLM."""
    if not any(metadata.distributions(name="vllm")):
        return {}
    command = [sys.executable, "-m", "benchmarks.gpu_engines"]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode:
        return None
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def latencies(vmm: CudaVmm, chunk_bytes: int, backed: bool = False) -> dict[str, float]:
    """Median microseconds of each call, over CHUNKS chunks that are all created, mapped, unmapped and released."""
    address = vmm.reserve(CHUNKS * chunk_bytes)
    if backed:
        vmm.back(address, CHUNKS * chunk_bytes, chunk_bytes)
    places = [address + at * chunk_bytes for at in range(CHUNKS)]
    for _ in range(2):  # the first round warms up, the second counts
        handles: list[ChunkHandle] = []
        create = [timed_us(lambda: handles.append(vmm.create(chunk_bytes))) for _ in places]  # noqa: B023, called now
        taken = {
            "create": create,
            "map": [timed_us(partial(vmm.map, *pair)) for pair in zip(places, handles, strict=True)],
            "unmap": [timed_us(partial(vmm.unmap, place, chunk_bytes)) for place in places],
            "release": [timed_us(partial(vmm.release, handle)) for handle in handles],
        }
    vmm.free(address, CHUNKS * chunk_bytes)
    return {call: round(statistics.median(values), 2) for call, values in taken.items()}


def activation_ratio(vmm: CudaVmm) -> float:
    """Time of a feed-forward layer outside the activation pool over inside it, in turns; 1 is no cost."""
    import torch

    pool = ChunkPool(vmm, vmm.granularity_bytes, limit_chunks=1024)
    allocator = CudaAllocator(vmm, pool)
    x, up, down = (torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def forward() -> None:
        for _ in range(20):
            torch.nn.functional.gelu(x @ up) @ down
        torch.cuda.synchronize()

    def forward_in_pool() -> None:
        with allocator.activation_pool():
            forward()

    forward()
    forward_in_pool()
    turns = [(timed_us(forward), timed_us(forward_in_pool)) for _ in range(30)]
    allocator.close()
    pool.trim()
    return round(statistics.median(plain / pooled for plain, pooled in turns), 4)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if reason := why_no_gpu():
        print(f"gpu-check did not run: {reason}")
        return 2
    import torch

    tests = run_tests()
    vmm = CudaVmm()
    chunk = vmm.granularity_bytes
    backed = latencies(vmm, chunk, backed=True)
    by_size = {size: latencies(vmm, size) for size in (chunk, 4 * chunk, 16 * chunk)}
    ratio = activation_ratio(vmm)
    vmm.close()
    engines = run_engines()
    small = by_size[chunk]
    finish(
        "gpu_check",
        {
            "tests_exit_status": tests,
            **{f"{call}_us": small[call] for call in CALLS},
            **{f"backed_{call}_us": backed[call] for call in ("map", "unmap")},
            "commit_gb_per_s": round(chunk / (small["create"] + small["map"]) / 1e3, 3),
            "return_gb_per_s": round(chunk / (small["unmap"] + small["release"]) / 1e3, 3),
            "activation_ratio": ratio,
            **(engines or {}),
        },
        {
            "device": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "granularity_bytes": chunk,
            "median_us_by_chunk_bytes": {str(size): figures for size, figures in by_size.items()},
        },
    )
    return 1 if tests or engines is None else 0


if __name__ == "__main__":
    sys.exit(main())
