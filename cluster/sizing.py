"""Pure arithmetic: from configuration, model facts and free memory to engine settings and the device's KV budget.

    free memory of the device: the host, or a GPU, on which base is nothing
    |<- base ->|<---- each replica: process + weights (+ static KV) ---->|<------------- room ------------->|
                                                                         |<-------- budget ------->|
                                                                         |<- guarantees ->|<start>|  lent  |
    one engine's KV:  rest <= guarantee <= ceiling <= budget

``guarantee`` is at least one longest request: ``max_model_len`` in whole KV blocks, one block more because a request's
last block is prepared ahead, and vLLM's null block; and where activations are charged, those of the smallest step. What
is above the guarantees goes to whoever needs it; from it comes ``start`` too, what an engine holds for a while when it
is loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import ClusterConfig, MemoryConfig, ModelConfig, SloClass
from cluster.device import HOST, Device, KvUnit
from cluster.models import ModelFacts
from memory_agent.errors import SettingsError
from memory_agent.lease_board import LIMIT_UNIT_BYTES
from replicas.spec import EngineSpec, step_bytes

MIB, GIB = 1 << 20, 1 << 30
PACED_BYTES = 3 * GIB // 4
"""Replica actor without any engine: 0.6 GiB measured."""
_SPARE_BLOCKS = 2
_REST_SHARE = 64
_CEILING_OVER_REST = 4


@dataclass(frozen=True)
class Sizing:
    """What a cluster is started with.

    Attributes:
        specs: engine settings, one a model, in the order of the configuration.
        guarantees_bytes: what each replica of these can always get, likewise; 0 for one that is not elastic.
        budget_bytes: bytes of KV memory, and of activations where they are charged, that all elastic engines of the
            device share.
        weights_bytes: of all elastic engines, beside the budget.
        needed_bytes: memory of the device that the whole cluster can come to hold; at most the free memory it was
            computed from.
    """

    specs: tuple[EngineSpec, ...]
    guarantees_bytes: tuple[int, ...]
    budget_bytes: int
    weights_bytes: int
    needed_bytes: int


@dataclass(frozen=True)
class EngineSizes:
    """One model's sizes before the budget is known; every replica of it has the same.

    least_bytes: the smallest guarantee that is possible; guarantee_bytes: the one that was chosen, or that.
    spike_bytes: what its start holds for a while beside weights and KV memory.
    static_bytes: KV bytes of one replica that is not elastic, held all the time; fixed_bytes: these, weights, process,
    on a host its host buffer, and the spike where no lease holds it; of a paced one, which has none of these, the
    process.
    """

    model: ModelConfig
    facts: ModelFacts
    memory: MemoryConfig
    slo: SloClass
    device: Device = HOST

    @property
    def block_tokens(self) -> int:
        return int(self.model.engine_args.get("block_size") or self.device.block_tokens)

    @property
    def block_bytes(self) -> int:
        return self.facts.kv_token_bytes * self.block_tokens

    @property
    def unit(self) -> KvUnit:
        return KvUnit(self.device, self.block_bytes)

    @property
    def longest_bytes(self) -> int:
        return self.unit.bytes_for(math.ceil(self.facts.max_model_len / self.block_tokens) + _SPARE_BLOCKS)

    @property
    def reckoned_token_bytes(self) -> int:
        """The most that one more token of a longest request takes, on average."""
        if not self.device.is_gpu:
            return self.facts.kv_token_bytes
        return -(-self.unit.unit_bytes // (self.unit.unit_blocks * self.block_tokens))

    @property
    def spare_bytes(self) -> int:
        """What a longest request takes beyond its tokens at most, in whole blocks and pieces of memory."""
        return _SPARE_BLOCKS * self.block_bytes + (2 * self.unit.unit_bytes if self.device.is_gpu else 0)

    def longest_request(self, kv_bytes: int) -> int:
        """Largest max_model_len whose longest request fits into so many KV bytes; 0 or less where there is none."""
        blocks = kv_bytes // self.unit.unit_bytes * self.unit.unit_blocks - _SPARE_BLOCKS
        return blocks * self.block_tokens

    @property
    def step_bytes(self) -> int:
        """Charged activations of the smallest step: a token of each running request, and their logits."""
        if not self.memory.activations:
            return 0
        seqs, facts = self.model.max_num_seqs, self.facts
        return step_bytes(seqs, facts.activation_token_bytes, seqs, facts.logits_row_bytes)

    @property
    def least_bytes(self) -> int:
        """The smallest guarantee: one longest request, and the smallest step."""
        return -down(-(self.longest_bytes + self.step_bytes), LIMIT_UNIT_BYTES)

    @property
    def guarantee_bytes(self) -> int:
        return max(self.least_bytes, -down(-(self.model.guarantee or 0), LIMIT_UNIT_BYTES))

    @property
    def spike_bytes(self) -> int:
        """Held for a while at the start, beside weights and KV memory."""
        model, facts = self.model, self.facts
        largest = step_bytes(
            model.max_num_batched_tokens, facts.activation_token_bytes, model.max_num_seqs, facts.logits_row_bytes
        )
        compiled = not model.engine_args.get("enforce_eager", True)
        return -down(-self.device.spike_bytes(compiled, largest), LIMIT_UNIT_BYTES)

    @property
    def static_bytes(self) -> int:
        """KV bytes held all the time by one replica that is not elastic."""
        return 0 if self.model.elastic else self.model.kv_ceiling or 2 * self.longest_bytes

    @property
    def host_buffer_bytes(self) -> int:
        return self.memory.host_buffer or 0 if self.model.elastic else 0

    @property
    def process_bytes(self) -> int:
        """Of a replica without its weights and KV memory."""
        reserve = self.device.step_reserve_bytes(
            self.model.max_num_batched_tokens,
            self.facts.activation_token_bytes,
            self.model.max_num_seqs,
            self.facts.logits_row_bytes,
        )
        return self.device.replica_bytes + reserve

    @property
    def fixed_bytes(self) -> int:
        if self.model.paced_tokens_per_s is not None:
            return PACED_BYTES
        buffer = 0 if self.device.is_gpu else self.host_buffer_bytes
        spike = 0 if self.model.elastic else self.spike_bytes
        return self.process_bytes + self.facts.weights_bytes + self.static_bytes + spike + buffer


def plan_sizes(config: ClusterConfig, facts: Sequence[ModelFacts], free_bytes: int, device: Device = HOST) -> Sizing:
    """Sizes for ``config``; ``facts`` belong to ``config.models``, ``free_bytes`` is what the device can give.

    Raises SettingsError where the memory, a budget or a ceiling is too small: with what is needed and what would fit.
    """
    engines = [
        EngineSizes(model, fact, config.memory, config.slo[0], device)
        for model, fact in zip(config.models, facts, strict=True)
    ]
    for engine in engines:
        check_guarantee(engine)
    fixed = device.base_bytes + sum(e.model.most_replicas * e.fixed_bytes for e in engines)
    elastic = [e for e in engines if e.model.elastic]
    least = sum(e.model.most_replicas * e.guarantee_bytes for e in elastic) + start_room(elastic)
    room = free_bytes - fixed
    if room < least:
        raise SettingsError(
            f"too little memory: {gib(fixed + least)} are needed ({_parts(engines)}), {gib(free_bytes)} are "
            "free. " + _what_fits(engines, free_bytes, device)
        )
    budget = _budget(config, elastic, room, device)
    specs = tuple(engine_spec(engine, budget, config.memory.rest) for engine in engines)
    promised = tuple(engine.guarantee_bytes if engine.model.elastic else 0 for engine in engines)
    weights = sum(e.model.most_replicas * e.facts.weights_bytes for e in elastic)
    return Sizing(specs, promised, budget, weights, needed_bytes=fixed + budget)


def start_room(elastic: Sequence[EngineSizes]) -> int:
    """Of the budget, what the guarantees leave to starts, so that each engine can start when all others have theirs:
    one after the other, where no more is there."""
    return max((e.spike_bytes for e in elastic), default=0)


def automatic_budget(guarantees: int, start: int) -> int:
    """The budget that is wished for where its size is left to the cluster, on a host."""
    return max(2 * guarantees, guarantees + start, GIB)


def _budget(config: ClusterConfig, elastic: Sequence[EngineSizes], room: int, device: Device) -> int:
    wanted, start = config.memory.budget, start_room(elastic)
    guarantees = sum(e.model.most_replicas * e.guarantee_bytes for e in elastic)
    if not elastic:
        return 0
    if wanted is None and device.is_gpu:
        return down(room, LIMIT_UNIT_BYTES)
    if wanted is None:
        return down(min(automatic_budget(guarantees, start), room), LIMIT_UNIT_BYTES)
    if wanted < guarantees + start:
        tokens = longest_request(elastic, wanted - start)
        remedy = f"max_model_len of {tokens} fits" if tokens > 0 else "fewer replicas or lower guarantees are needed"
        raise SettingsError(
            f"memory.budget is {mib(wanted)}, but the guarantees of all replicas, one longest request where none is "
            f"set, need {mib(guarantees)}, and the start of one {mib(start)}: raise it to {mib(guarantees + start)}; "
            f"or with this budget, {remedy}"
        )
    if wanted > room:
        raise SettingsError(
            f"memory.budget is {mib(wanted)}, but beside the processes and weights only {mib(down(room, MIB))} are "
            f"free: lower it to at most {mib(down(room, MIB))}"
        )
    return down(wanted, LIMIT_UNIT_BYTES)


def engine_spec(engine: EngineSizes, budget: int, wanted_rest: int | None) -> EngineSpec:
    """Settings of one replica in a ``budget``. Raises SettingsError for a ceiling or a rest that does not fit it."""
    model, facts = engine.model, engine.facts
    ceiling, rest = _elastic_sizes(engine, budget, wanted_rest) if model.elastic else _static_sizes(engine)
    return EngineSpec(
        model_name=model.name,
        model_path=str(facts.path),
        max_model_len=facts.max_model_len,
        kv_ceiling_bytes=ceiling,
        kv_rest_bytes=rest,
        kv_guarantee_bytes=engine.longest_bytes,
        weights_bytes=facts.weights_bytes,
        spike_bytes=engine.spike_bytes,
        weight=model.weight,
        charge_activations=engine.memory.activations,
        host_buffer_bytes=engine.host_buffer_bytes,
        ttft_slo_ms=engine.slo.ttft_ms,
        tpot_slo_ms=engine.slo.tpot_ms,
        token_bytes=facts.activation_token_bytes,
        row_bytes=facts.logits_row_bytes,
        dtype=facts.dtype,
        max_num_seqs=model.max_num_seqs,
        max_num_batched_tokens=model.max_num_batched_tokens,
        elastic=model.elastic,
        paced_tokens_per_s=model.paced_tokens_per_s,
        async_scheduling=model.async_scheduling,
        # Without compilation and with explicit KV bytes vLLM skips its warm-up on a host: seconds instead of a minute
        # to start. A GPU is slow without CUDA graphs.
        engine_args=dict(model.engine_args) if engine.device.is_gpu else {"enforce_eager": True, **model.engine_args},
    )


def _elastic_sizes(engine: EngineSizes, budget: int, wanted_rest: int | None) -> tuple[int, int]:
    """(ceiling, rest) in whole KV blocks; on a GPU, whose smallest piece of memory is larger, in whole such pieces."""
    name, unit = engine.model.name, engine.unit.unit_bytes
    wanted = engine.model.kv_ceiling if engine.model.kv_ceiling is not None else budget
    ceiling = down(wanted, unit)
    if wanted > budget:
        raise SettingsError(
            f"model {name}: kv_ceiling is {mib(wanted)}, more than the budget of {mib(budget)}; lower one or raise "
            "the other"
        )
    _check_ceiling(engine, ceiling)
    least = _SPARE_BLOCKS * unit
    if least * _CEILING_OVER_REST > ceiling:
        raise SettingsError(
            f"model {name}: a ceiling of {mib(ceiling)} is too small to be elastic, because two pieces of KV "
            f"memory of {mib(unit)} always stay; raise it to {mib(least * _CEILING_OVER_REST)}, or set elastic: false"
        )
    rest = max(least, down(ceiling // _REST_SHARE if wanted_rest is None else wanted_rest, unit))
    if rest * _CEILING_OVER_REST > ceiling:
        raise SettingsError(
            f"model {name}: memory.rest is {mib(wanted_rest or rest)}, more than a quarter of the ceiling of "
            f"{mib(ceiling)}; lower it to at most {mib(down(ceiling // _CEILING_OVER_REST, MIB))}"
        )
    # No more than a replica is sure to get: it maps its rest before it can ask for anything.
    return ceiling, min(rest, engine.longest_bytes)


def check_guarantee(engine: EngineSizes) -> None:
    """Raises SettingsError for a guarantee that is below one longest request, or above the ceiling."""
    wanted, ceiling = engine.model.guarantee, engine.model.kv_ceiling
    if wanted is None:
        return
    if not engine.model.elastic:
        raise SettingsError(
            f"model {engine.model.name}: guarantee is set, but elastic is false and all its KV memory is held anyway; "
            "remove one of them"
        )
    if wanted < engine.least_bytes:
        raise SettingsError(
            f"model {engine.model.name}: guarantee is {mib(wanted)}, but one longest request needs "
            f"{mib(engine.least_bytes)}; raise it to that, or lower max_model_len"
        )
    if ceiling is not None and wanted > ceiling:
        raise SettingsError(
            f"model {engine.model.name}: guarantee is {mib(wanted)}, more than its kv_ceiling of {mib(ceiling)}; "
            "lower one or raise the other"
        )


def _static_sizes(engine: EngineSizes) -> tuple[int, int]:
    ceiling = down(engine.static_bytes, engine.block_bytes)
    _check_ceiling(engine, ceiling)
    return ceiling, ceiling


def _check_ceiling(engine: EngineSizes, ceiling: int) -> None:
    if ceiling < engine.longest_bytes:
        tokens = max(0, engine.longest_request(ceiling))
        raise SettingsError(
            f"model {engine.model.name}: kv_ceiling is {mib(ceiling)}, but one longest request needs "
            f"{mib(engine.longest_bytes)}; raise it to that"
            + (f", or set max_model_len to at most {tokens}" if tokens else "")
        )


def _what_fits(engines: Sequence[EngineSizes], free_bytes: int, device: Device) -> str:
    """The largest change of one setting that would fit, in words."""
    options = []
    each = sum(e.fixed_bytes + (e.guarantee_bytes if e.model.elastic else 0) for e in engines)
    elastic = [e for e in engines if e.model.elastic]
    once = device.base_bytes + start_room(elastic)
    replicas = (free_bytes - once) // each
    if replicas >= 1:
        key = "max_replicas" if any(e.model.scales for e in engines) else "replicas"
        options.append(f"set {key} to {replicas}" + (" for every model" if len(engines) > 1 else ""))
    tokens = longest_request(elastic, free_bytes - once - sum(e.model.most_replicas * e.fixed_bytes for e in engines))
    if tokens > 0:
        options.append(f"set max_model_len to at most {tokens}")
    if not options:
        least = gib(once + each)
        return f"Not even one replica of each model fits ({least}): free memory, or serve a smaller model."
    return f"What would fit: {', or '.join(options)}."


def longest_request(elastic: Sequence[EngineSizes], kv_bytes: int) -> int:
    """Largest max_model_len, common to all, whose guarantees fit into ``kv_bytes``; 0 where there is none, or where a
    guarantee was chosen."""
    if not elastic or any(e.guarantee_bytes > e.least_bytes for e in elastic):
        return 0
    step = math.lcm(*(e.block_tokens for e in elastic))
    per_token = sum(e.model.most_replicas * e.reckoned_token_bytes for e in elastic)
    spare = sum(e.model.most_replicas * (e.spare_bytes + e.step_bytes + LIMIT_UNIT_BYTES) for e in elastic)
    return down(max(0, kv_bytes - spare) // per_token, step)


def _parts(engines: Sequence[EngineSizes]) -> str:
    base, start = engines[0].device.base_bytes, start_room([e for e in engines if e.model.elastic])
    parts = [f"{gib(base)} for Ray and the API"] if base else []
    parts += [f"{gib(start)} for a start"] if start else []
    for e in engines:
        if e.model.paced_tokens_per_s is not None:
            parts.append(f"{e.model.most_replicas} x {gib(PACED_BYTES)} for {e.model.name}, which runs no engine")
            continue
        kv = e.guarantee_bytes if e.model.elastic else e.static_bytes
        process = e.fixed_bytes - e.facts.weights_bytes - e.static_bytes
        parts.append(
            f"{e.model.most_replicas} x {gib(process + e.facts.weights_bytes + kv)} for {e.model.name}: process "
            f"{gib(process)}, weights {gib(e.facts.weights_bytes)}, KV of {e.facts.max_model_len} tokens "
            f"{gib(kv)}"
        )
    return "; ".join(parts)


def down(value: int, unit: int) -> int:
    """The largest multiple of ``unit`` up to ``value``."""
    return value // unit * unit


def gib(value: int) -> str:
    """For people, in GiB."""
    return f"{value / GIB:.2f} GiB"


def mib(value: int) -> str:
    """Rounded up, so that a value copied from a message is enough; a round one stays."""
    return f"{math.ceil(value / MIB)}MiB"
