"""What one engine replica is made from. Plain frozen data: it crosses processes by pickle."""

from dataclasses import dataclass, field
from typing import Any


def step_bytes(tokens: int, token_bytes: int, rows: int, row_bytes: int) -> int:
    """Upper estimate of the activations of a step of ``tokens`` that samples for ``rows`` requests: its forward and its
    logits do not overlap."""
    return max(tokens * token_bytes, rows * row_bytes)


@dataclass(frozen=True)
class EngineSpec:
    """One model's engine settings, after defaults and sizes have been resolved.

    Attributes:
        model_name: the name that requests use (``model`` in the API).
        model_path: local folder or hub id, as vLLM's ``model``.
        dtype: as vLLM's ``dtype``.
        max_model_len: tokens of one longest request, prompt and output.
        max_num_seqs: ceiling on running requests; max_num_batched_tokens: ceiling on tokens a step.
        elastic: False serves the model as plain vLLM with ``kv_ceiling_bytes`` of static KV memory.
        tensor_parallel_size: ranks that the model is split over; bytes of KV memory and weights are those of all.
        kv_ceiling_bytes: bytes of the virtual KV tensor, the most this engine can ever commit.
        kv_rest_bytes: committed KV bytes the engine shrinks to when idle.
        kv_guarantee_bytes: KV bytes of one longest request; always obtainable.
        weights_bytes: bytes of the loaded weights.
        spike_bytes: what loading and warming up hold beside weights and KV memory until the engine is live.
        weight: part of contended and of lent bytes, against other engines'.
        charge_activations: activations count against the lease, and bound the tokens of a step.
        token_bytes: upper estimate of a worker's activation bytes of one token in a step, used until it is measured.
        row_bytes: likewise, of the logits of one request that samples.
        host_buffer_bytes: host memory, over all workers, for KV blocks that leave the device; 0 for none.
        ttft_slo_ms, tpot_slo_ms: objectives by which the host buffer lets prompts in early; 0: it does not.
        paced_tokens_per_s: answer with made-up tokens at this pace instead of running an engine, see
            ``replicas.paced_core``; None runs the engine.
        async_scheduling: None leaves it to vLLM's platform default; True forces it on.
        engine_args: further keyword arguments of vLLM's AsyncEngineArgs, passed as they are.
    """

    model_name: str
    model_path: str
    max_model_len: int
    kv_ceiling_bytes: int
    kv_rest_bytes: int
    kv_guarantee_bytes: int
    weights_bytes: int
    spike_bytes: int = 0
    weight: float = 1.0
    charge_activations: bool = False
    token_bytes: int = 64 << 10
    row_bytes: int = 1 << 20
    host_buffer_bytes: int = 0
    ttft_slo_ms: float = 0.0
    tpot_slo_ms: float = 0.0
    dtype: str = "auto"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    elastic: bool = True
    tensor_parallel_size: int = 1
    paced_tokens_per_s: float | None = None
    async_scheduling: bool | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)

    @property
    def guarantee_bytes(self) -> int:
        """What this engine must always be able to get: KV memory of one longest request, and where they are charged,
        the activations of the smallest step that lets every running request go on, a token of each."""
        return self.kv_guarantee_bytes + self._activation_bytes(self.max_num_seqs)

    @property
    def start_bytes(self) -> int:
        """What the start takes of the device's budget, until the engine is live."""
        return self.kv_rest_bytes + self.spike_bytes

    @property
    def ceiling_bytes(self) -> int:
        """The most that this engine can make use of."""
        return self.kv_ceiling_bytes + self._activation_bytes(self.max_num_batched_tokens)

    def _activation_bytes(self, tokens: int) -> int:
        if not self.charge_activations:
            return 0
        return step_bytes(tokens, self.token_bytes, self.max_num_seqs, self.row_bytes) * self.tensor_parallel_size
