"""Settings that travel to the engine's processes inside vLLM's ``kv_connector_extra_config``."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ElasticSettings:
    """How one engine's KV memory breathes.

    Attributes:
        board_path, row: where the engine reads its lease and writes its numbers.
        rest_bytes: KV bytes, per worker, mapped at start and kept by an idle engine.
        kv_guarantee_bytes: KV bytes, over all workers, of one longest request: activations never take these.
        charge_activations: activations count against the lease, and bound the tokens of a step.
        token_bytes, row_bytes: activation bytes of a token and of a request's logits, per worker, until measured.
        host_buffer_bytes: per worker; 0 for none. weights_identity: which weights computed the KV
            that leaves the device.
        ttft_slo_s, tpot_slo_s: objectives by which prompts are computed before there is memory to decode them, their KV
            in the host buffer meanwhile; 0: they never are.
        idle_release_s: idleness after which the engine shrinks to ``rest_bytes``.
        patience_s: longest wait for a lease that the agent is about to raise, before a request is preempted instead.
        notice_s: time the agent gets to notice a new demand.
        map_batch_bytes: most bytes to map in one step.
        lookahead_tokens: a decoding request's next block is mapped when its last one has this many tokens left.
    """

    board_path: str
    row: int
    rest_bytes: int
    kv_guarantee_bytes: int
    charge_activations: bool
    token_bytes: int
    row_bytes: int
    host_buffer_bytes: int = 0
    weights_identity: str = ""
    ttft_slo_s: float = 0.0
    tpot_slo_s: float = 0.0
    idle_release_s: float = 3.0
    patience_s: float = 1.0
    notice_s: float = 0.15
    map_batch_bytes: int = 64 << 20
    lookahead_tokens: int = 16

    def to_extra_config(self) -> dict[str, Any]:
        return {"ellm": asdict(self)}

    @classmethod
    def from_extra_config(cls, extra: dict[str, Any]) -> "ElasticSettings":
        """Raises KeyError or TypeError where the configuration was not made by ``to_extra_config``."""
        return cls(**extra["ellm"])
