"""The cluster as one vLLM engine: to vLLM's API server, ``ClusterEngine`` is an AsyncLLM like any other.

AsyncLLM renders, tokenises, detokenises, applies stop strings, fans out n > 1, and makes RequestOutputs; only its
``engine_core`` is another one here. Its constructor has no door for that (it always starts engine processes), so
this module sets the same attributes itself, and refuses to start where vLLM's constructor stores other ones than it
did when this was written. It is the only module that depends on AsyncLLM's inside.
"""

import asyncio
import dis
from http import HTTPStatus

import vllm
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.renderers import renderer_from_config
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerFactory, StatLoggerManager

from cluster.core_client import ClusterCore

VLLM_RELEASE = "0.32."
_ATTRIBUTES = (
    "vllm_config model_config scheduler_config observability_config renderer input_processor output_processor "
    "engine_core logger_manager output_handler log_requests log_stats admission_stats profiler _client_count "
    "_elastic_ep_lock _profile_lock _profile_session_guard_enabled _profile_session_active "
    "_frontend_profiler_injected _frontend_profiler_worker_name"
)
"""What AsyncLLM.__init__ stores in the release above."""


class UpstreamChangedError(RuntimeError):
    """The installed vLLM is not the one this release was written for. Remedy: install vllm==0.32.*."""


def check_upstream() -> None:
    """Raises UpstreamChangedError where vLLM's AsyncLLM is built otherwise than ClusterEngine expects."""
    if not vllm.__version__.startswith(VLLM_RELEASE):
        raise UpstreamChangedError(
            f"vLLM {vllm.__version__} is installed, {VLLM_RELEASE}* is needed: install vllm=={VLLM_RELEASE}*"
        )
    code = dis.get_instructions(AsyncLLM.__init__)
    stored = {step.argval for step in code if step.opname == "STORE_ATTR"}
    known = set(_ATTRIBUTES.split())
    if stored != known:
        raise UpstreamChangedError(
            f"AsyncLLM of vLLM {vllm.__version__} stores other attributes than expected (new: "
            f"{sorted(stored - known)}, gone: {sorted(known - stored)}); install vllm=={VLLM_RELEASE}*"
        )


class ClusterEngine(AsyncLLM):
    """An AsyncLLM whose engine core is a cluster of replicas. Build it on the event loop that will serve requests."""

    engine_core: ClusterCore

    def __init__(self, vllm_config: VllmConfig, core: ClusterCore, stat_loggers: list[StatLoggerFactory]) -> None:
        """
        Args:
            vllm_config: of one replica; the ingress needs its model, tokenizer and limits.
            core: the replicas. The engine owns it from here on: ``shutdown`` closes it.
            stat_loggers: where the engine's statistics go, beside the log.
        """
        check_upstream()
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        self.observability_config = vllm_config.observability_config
        self.log_requests = False
        self.log_stats = True
        self.renderer = renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, renderer)
        self.admission_stats = None
        self.output_processor = OutputProcessor(
            renderer.tokenizer, log_stats=True, stream_interval=vllm_config.scheduler_config.stream_interval
        )
        self.engine_core = core
        self.logger_manager = StatLoggerManager(
            vllm_config=vllm_config, engine_idxs=core.engine_ranks_managed, custom_stat_loggers=stat_loggers
        )
        self.logger_manager.log_engine_initialized()  # type: ignore[no-untyped-call]
        self._elastic_ep_lock = asyncio.Lock()
        self._client_count = 1
        self._init_profiling()
        self.output_handler = None
        self._run_output_handler()  # type: ignore[no-untyped-call]

    def _init_profiling(self) -> None:
        """AsyncLLM's profiler state, for a front-end that is never profiled."""
        self.profiler = None
        self._frontend_profiler_injected = False
        self._profile_lock = asyncio.Lock()
        self._profile_session_guard_enabled = True
        self._profile_session_active = False

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Called before a response begins, while a refusal can still carry its status.

        Raises GracefulHTTPError (503) where no replica can be reached or all are full.
        """
        if reason := self.engine_core.why_full(n):
            raise GracefulHTTPError(reason, HTTPStatus.SERVICE_UNAVAILABLE)
        super().check_admission(n, request_id)

    async def check_health(self) -> None:
        """Raises EngineDeadError where no replica can be reached, but for a model that rests."""
        await super().check_health()
        if self.engine_core.reachable == 0 and not self.engine_core.rests:
            raise EngineDeadError()
