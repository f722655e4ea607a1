"""The engines that are compared: same model, same device bytes."""

from dataclasses import dataclass, replace

from benchmarks.elastic.bounds import Memory
from cluster.config import ModelConfig
from cluster.default_model import get_default_model
from cluster.models import ModelFacts, read_facts
from replicas.spec import EngineSpec

MIB = 1 << 20
BLOCK_TOKENS = 128
"""vLLM's default KV block on CPU."""
_SPARE_BLOCKS = 2


@dataclass(frozen=True)
class Device:
    """What every variant gets: bytes for KV memory and activations; ``host_bytes`` are what C has on top."""

    device_bytes: int
    host_bytes: int


def model_facts(max_model_len: int) -> ModelFacts:
    return read_facts(get_default_model(print), ModelConfig(max_model_len=max_model_len))


def block_bytes(facts: ModelFacts) -> int:
    return facts.kv_token_bytes * BLOCK_TOKENS


def longest_blocks(max_model_len: int) -> int:
    """KV blocks with which a static engine can serve its longest request, vLLM's null block included."""
    return -(-max_model_len // BLOCK_TOKENS) + 1


def static_spec(facts: ModelFacts, max_num_seqs: int, kv_blocks: int, step_tokens: int) -> EngineSpec:
    """vLLM as it comes, with ``kv_blocks`` of KV memory and at most ``step_tokens`` a step. Steps that cover the
    longest request are not chunked."""
    kv_bytes = kv_blocks * block_bytes(facts)
    return EngineSpec(
        model_name="bench",
        model_path=str(facts.path),
        max_model_len=facts.max_model_len,
        dtype=facts.dtype,
        kv_ceiling_bytes=kv_bytes,
        kv_rest_bytes=kv_bytes,
        kv_guarantee_bytes=kv_bytes,
        weights_bytes=facts.weights_bytes,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        elastic=False,
        engine_args={"enforce_eager": True, "enable_chunked_prefill": step_tokens < facts.max_model_len},
    )


def elastic_spec(facts: ModelFacts, max_num_seqs: int, ceiling_bytes: int, step_tokens: int) -> EngineSpec:
    """KV memory, up to ``ceiling_bytes``, and activations share a lease; a step may take up to ``step_tokens``."""
    block = block_bytes(facts)
    return replace(
        static_spec(facts, max_num_seqs, ceiling_bytes // block, step_tokens),
        kv_rest_bytes=_SPARE_BLOCKS * block,
        kv_guarantee_bytes=(longest_blocks(facts.max_model_len) + 1) * block,
        elastic=True,
        charge_activations=True,
        token_bytes=facts.activation_token_bytes,
        row_bytes=facts.logits_row_bytes,
        engine_args={"enforce_eager": True},
    )


def static_variants(
    facts: ModelFacts, max_num_seqs: int, memory: Memory, device: Device, chunk: int
) -> dict[str, EngineSpec]:
    """A, B and C. ``chunk``: the tuned step size of B and C."""
    longest, both = facts.max_model_len, device.device_bytes + device.host_bytes
    return {
        "A": static_spec(facts, max_num_seqs, memory.blocks(device.device_bytes, longest), longest),
        "B": static_spec(facts, max_num_seqs, memory.blocks(device.device_bytes, chunk), chunk),
        "C": static_spec(facts, max_num_seqs, memory.blocks(both, chunk), chunk),
    }


def host_variants(
    facts: ModelFacts, max_num_seqs: int, memory: Memory, device: Device, chunk: int
) -> dict[str, EngineSpec]:
    """The paper's ablation with a host buffer: as B with KV memory that does not move, and elastic. Their prompts are
    set aside by no objective."""
    blocks = memory.blocks(device.device_bytes, chunk)
    fixed = replace(
        static_spec(facts, max_num_seqs, blocks, chunk),
        kv_guarantee_bytes=longest_blocks(facts.max_model_len) * block_bytes(facts),
        elastic=True,
    )
    moving = elastic_spec(facts, max_num_seqs, device.device_bytes, facts.max_model_len)
    return {
        name: replace(spec, host_buffer_bytes=device.host_bytes) for name, spec in (("host", fixed), ("both", moving))
    }
