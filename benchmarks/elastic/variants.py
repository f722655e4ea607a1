"""The engines that are compared: same model, same device bytes."""

from dataclasses import dataclass, replace

from cluster.bench.report import Slo
from cluster.config import ModelConfig
from cluster.default_model import get_default_model
from cluster.device import KvUnit, find_device
from cluster.models import ModelFacts, read_facts
from replicas.spec import EngineSpec
from replicas.step_memory import Memory

MIB = 1 << 20
_SPARE_BLOCKS = 2


@dataclass(frozen=True)
class Device:
    """What every variant gets: bytes for KV memory and activations; ``host_bytes`` are what C has on top."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class BenchModel:
    """The model of all variants, and the tokens of its KV blocks."""

    facts: ModelFacts
    block_tokens: int

    @property
    def block_bytes(self) -> int:
        return self.facts.kv_token_bytes * self.block_tokens

    @property
    def longest_blocks(self) -> int:
        """KV blocks with which a static engine can serve its longest request, vLLM's null block included."""
        return -(-self.facts.max_model_len // self.block_tokens) + 1


def bench_model(max_model_len: int, block_tokens: int = 128) -> BenchModel:
    """The default model; vLLM's default KV block on CPU has 128 tokens."""
    facts = read_facts(get_default_model(print), ModelConfig(max_model_len=max_model_len))
    return BenchModel(facts, block_tokens)


def static_spec(model: BenchModel, max_num_seqs: int, kv_blocks: int, step_tokens: int) -> EngineSpec:
    """vLLM as it comes, with ``kv_blocks`` of KV memory and at most ``step_tokens`` a step. Steps that cover the
    longest request are not chunked."""
    facts, kv_bytes = model.facts, kv_blocks * model.block_bytes
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
        engine_args={
            "enforce_eager": True,
            "enable_chunked_prefill": step_tokens < facts.max_model_len,
            "block_size": model.block_tokens,
        },
    )


def elastic_spec(model: BenchModel, max_num_seqs: int, ceiling_bytes: int, step_tokens: int) -> EngineSpec:
    """KV memory, up to ``ceiling_bytes``, and activations share a lease; a step may take up to ``step_tokens``."""
    facts, block = model.facts, model.block_bytes
    unit = KvUnit(find_device(), block)
    return replace(
        static_spec(model, max_num_seqs, ceiling_bytes // block, step_tokens),
        kv_rest_bytes=unit.bytes_for(_SPARE_BLOCKS),
        kv_guarantee_bytes=unit.bytes_for(model.longest_blocks + 1),
        elastic=True,
        charge_activations=True,
        token_bytes=facts.activation_token_bytes,
        row_bytes=facts.logits_row_bytes,
        engine_args={"enforce_eager": True, "block_size": model.block_tokens},
    )


def static_variants(
    model: BenchModel, max_num_seqs: int, memory: Memory, device: Device, chunk: int
) -> dict[str, EngineSpec]:
    """A, B and C. ``chunk``: the tuned step size of B and C."""
    longest, both = model.facts.max_model_len, device.device_bytes + device.host_bytes
    return {
        "A": static_spec(model, max_num_seqs, memory.blocks(device.device_bytes, longest), longest),
        "B": static_spec(model, max_num_seqs, memory.blocks(device.device_bytes, chunk), chunk),
        "C": static_spec(model, max_num_seqs, memory.blocks(both, chunk), chunk),
    }


def host_variants(
    model: BenchModel, max_num_seqs: int, memory: Memory, device: Device, chunk: int, slo: Slo
) -> dict[str, EngineSpec]:
    """The paper's ablation with a host buffer: as B with KV memory that does not move, and elastic. Where ``slo`` has
    bounds, requests are set aside for prompts that would miss them."""
    blocks = memory.blocks(device.device_bytes, chunk)
    fixed = replace(
        static_spec(model, max_num_seqs, blocks, chunk),
        kv_guarantee_bytes=model.longest_blocks * model.block_bytes,
        elastic=True,
    )
    moving = elastic_spec(model, max_num_seqs, device.device_bytes, model.facts.max_model_len)
    return {
        name: replace(
            spec,
            host_buffer_bytes=device.host_bytes,
            ttft_slo_ms=slo.ttft_ms or 0.0,
            tpot_slo_ms=slo.tpot_ms or 0.0,
        )
        for name, spec in (("host", fixed), ("both", moving))
    }
