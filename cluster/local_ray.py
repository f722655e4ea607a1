"""A Ray cluster of this host's own: it joins no other one, and no other one joins it."""

import logging
import os
import secrets
import signal

from cluster.footprint import Footprint
from cluster.start_stages import PROCESS_ENVIRONMENT

_CLEARED = (
    "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ALLOW_INSECURE_SERIALIZATION"
)  # fmt: skip
"""Each would overrule what the configuration says: another cluster, another token, another KV size, pickles taken from
the network."""


def start_ray(footprint: Footprint, num_cpus: int, object_store_bytes: int) -> None:
    """Start Ray below ``footprint.folder`` and connect this process to it. Its token lives in the environment of our
    processes alone."""
    for name in _CLEARED:
        os.environ.pop(name, None)
    os.environ.update(PROCESS_ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ["VLLM_RPC_BASE_PATH"] = str(footprint.folder)  # vLLM leaves its sockets behind
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled, without stubs

    from memory_agent.controller_link import NAMESPACE

    # Ray reads both when it is imported, maybe by vLLM long ago; its own start-up reads them again in this way.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=0,
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        namespace=NAMESPACE,
        _temp_dir=str(footprint.folder),
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)  # ray.init puts its own in place of SIGTERM's


def stop_ray() -> None:
    """Disconnect and end Ray's processes. Nothing happens where Ray is not running."""
    import ray

    ray.shutdown()
