"""A device too small for its load, and all variants on it: what the scenarios under pressure have in common.

The device has just the bytes with which A serves its longest request: activations of that prompt in one step, and its
KV memory.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.elastic.bounds import Job, Speed, best_chunk
from benchmarks.elastic.calibrate import measure_memory, measure_speed
from benchmarks.elastic.race import Racer, racers
from benchmarks.elastic.variants import (
    MIB,
    Device,
    bench_model,
    elastic_spec,
    host_variants,
    static_variants,
)
from cluster.bench.report import Slo
from replicas.step_memory import Memory

_ROOM = 4
"""The lease while speed is measured, over the device's bytes: nothing then waits for memory."""


@dataclass(frozen=True)
class Setting:
    """What a scenario asks of its engines.

    Attributes:
        job: shape of its requests; what B's step size is tuned for.
        chunks: step sizes that B may have; batches: of decode steps that are measured.
        block_tokens: of a KV block. host_over_device: host bytes, over the device's.
        slo_over_unloaded: see ``slo``.
    """

    max_model_len: int
    max_num_seqs: int
    job: Job
    chunks: tuple[int, ...]
    batches: tuple[int, ...]
    block_tokens: int = 128
    host_over_device: float = 1.0
    slo_over_unloaded: float = 0.0

    def slo(self, speed: Speed) -> Slo:
        """``slo_over_unloaded`` times the latencies of an engine with one request; no bounds where that is 0."""
        if not self.slo_over_unloaded:
            return Slo()
        ttft_s, tpot_s = min(speed.prefill_s.values()), speed.decode_step_s(1, self.job.context)
        return Slo(ttft_ms=1000 * self.slo_over_unloaded * ttft_s, tpot_ms=1000 * self.slo_over_unloaded * tpot_s)

    def room(self, device: Device, chunk: int) -> dict[str, tuple[int, int]]:
        """Each variant's bytes, and the tokens of the step that its KV memory leaves room for. The elastic ones
        need room for the smallest step alone, a token of each request."""
        both = device.device_bytes + device.host_bytes
        return {
            "A": (device.device_bytes, self.max_model_len),
            "B": (device.device_bytes, chunk),
            "C": (both, chunk),
            "host": (device.device_bytes, chunk),
            "elastic": (device.device_bytes, self.max_num_seqs),
            "both": (device.device_bytes, self.max_num_seqs),
        }

    def held(self, memory: Memory, device: Device, chunk: int, request_tokens: int) -> dict[str, int]:
        """Requests of ``request_tokens`` that each variant can hold at once."""
        return {
            name: min(self.max_num_seqs, memory.held(*place, request_tokens))
            for name, place in self.room(device, chunk).items()
        }


@dataclass(frozen=True)
class Contest:
    """The variants, ready to run, and what was measured before they were made.

    Attributes:
        chunk: step size of B and C.
        held: requests of the job that each variant can hold at once.
    """

    setting: Setting
    memory: Memory
    speed: Speed
    device: Device
    chunk: int
    held: Mapping[str, int]
    slo: Slo
    field: Mapping[str, Racer]

    def to_json(self) -> dict[str, Any]:
        parts = {name: asdict(getattr(self, name)) for name in ("setting", "memory", "speed", "device", "slo")}
        return parts | {"chunk": self.chunk, "held_bound": dict(self.held)}


@asynccontextmanager
async def contest(setting: Setting, folder: Path) -> AsyncIterator[Contest]:
    """Measure memory and speed, tune B, start all variants, tighten the elastic ones' lease to the device. Their steps
    are bound by what is fastest; memory bounds them as they run."""
    longest, seqs = setting.max_model_len, setting.max_num_seqs
    model = bench_model(longest, setting.block_tokens)
    memory = await measure_memory(model)
    device_bytes = memory.activation_bytes(longest) + model.longest_blocks * model.block_bytes
    device = Device(device_bytes, host_bytes=round(setting.host_over_device * device_bytes))
    async with racers({"elastic": elastic_spec(model, seqs, _ROOM * device_bytes, longest)}, folder) as ours:
        speed = await measure_speed(ours["elastic"], setting.job, setting.chunks, setting.batches)
        chunk = best_chunk(setting.job, device_bytes, memory, speed, model.longest_blocks)
        held = setting.held(memory, device, chunk, setting.job.request_tokens)
        slo = setting.slo(speed)
        _print(setting.job, memory, speed, device, chunk)
        others = static_variants(model, seqs, memory, device, chunk)
        others |= host_variants(model, seqs, memory, device, chunk, slo)
        async with racers(others, folder) as field:
            for one in (ours["elastic"], field["both"]):
                one.bound_steps(speed.fastest_step)
                await one.lease(device_bytes)
            yield Contest(setting, memory, speed, device, chunk, held, slo, field | ours)


def _print(job: Job, memory: Memory, speed: Speed, device: Device, chunk: int) -> None:
    print(
        f"device {device.device_bytes / MIB:.0f} MiB, C {device.host_bytes / MIB:.0f} MiB more; activations "
        f"{memory.step_bytes / MIB:.1f} MiB + {memory.token_bytes / 1024:.1f} KiB a token, KV block "
        f"{memory.block_bytes / MIB:.2f} MiB"
    )
    prefill = ", ".join(f"{step}: {seconds:.2f} s" for step, seconds in speed.prefill_s.items())
    print(f"prefill of {job.prompt} tokens by step size: {prefill}; B and C take steps of {chunk}")
    print(
        f"a decode step: {1000 * speed.step_s:.0f} ms + {1000 * speed.row_s:.1f} ms a request + "
        f"{1e6 * speed.context_s:.1f} ms a request and 1,000 tokens of context",
        flush=True,
    )
