"""The environment variables of an engine replica's processes: how many threads, what is compiled, where temporary files
are."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from replicas.cpu import computes_on_cpu
from replicas.spec import EngineSpec


def engine_environment(spec: EngineSpec, engines: int) -> dict[str, str]:
    """Environment of an engine, one of ``engines`` on its host that computes on the CPU; what is set already stays.

    vLLM would bind the threads of every engine to the same cores, all but one: several engines share the cores
    evenly instead. An eager engine compiles nothing at all: vLLM compiles a few small functions even so, the one for
    logprobs for half a minute in the middle of the first request that asks for them.

    Killed, an engine leaves the file behind by which its workers have found each other. So its temporary files are
    where vLLM's sockets are, in the folder that is removed with the cluster.
    """
    folder = os.environ.get("VLLM_RPC_BASE_PATH")
    temporary = {"TMPDIR": folder} if folder else {}
    if not computes_on_cpu():
        return temporary
    workers = max(1, engines) * spec.tensor_parallel_size
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    wanted = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    if spec.engine_args.get("enforce_eager"):
        wanted["TORCH_COMPILE_DISABLE"] = "1"
    return {name: os.environ.get(name, value) for name, value in wanted.items()} | temporary


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes started meanwhile find ``variables`` in their environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
