"""vLLM's GPU worker with elastic memory. Chosen by ``worker_cls``.

    execute_model   step before settled, memory moved (ElasticKVConnector.begin_step)
                    -> vLLM: inputs, connector, forward    | allocated from the pool of the step,
    sample_tokens   -> vLLM: logits, sampling              | where activations are charged

What vLLM allocates at its start, its CUDA graphs too, comes from torch's own pool: it stays.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.gpu_worker import Worker

from replicas.cuda_meter import CudaMeter
from replicas.elastic_connector import ElasticKVConnector
from replicas.kv_moves import KvMoves


class ElasticGpuWorker(Worker):
    """Steps of vLLM's own, between which KV memory moves and activations are given back."""

    _meter: CudaMeter | None = None
    """None until vLLM has warmed up."""

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        connector = _connector()
        connector.end_warm_up()
        assert isinstance(connector.activations, CudaMeter)
        self._meter = connector.activations
        torch.cuda.empty_cache()  # what profiling and warm-up left in torch's own pool
        return times

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        moves = scheduler_output.kv_connector_metadata
        if isinstance(moves, KvMoves):  # there is none in the steps of the warm-up
            _connector().begin_step(moves)
        with self._step():
            return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        with self._step():
            return super().sample_tokens(grammar_output)

    def _step(self) -> AbstractContextManager[None]:
        return self._meter.step() if self._meter is not None else nullcontext()


def _connector() -> ElasticKVConnector:
    connector = get_kv_transfer_group()
    if not isinstance(connector, ElasticKVConnector):
        raise TypeError(f"ElasticGpuWorker needs ElasticKVConnector, found {type(connector).__name__}")
    return connector
