"""The metrics of devices, leases and pressure: the catalogue of this package, read from the agents' reports.

An engine is named by its model and its replica's id, of which a device has at most ``MAX_ROWS`` at once.
"""

from collections.abc import Callable, Mapping

from memory_agent.metric import Kind, MetricSpec, Reading
from memory_agent.reports import DeviceReport, EngineReport, PressureLevel, replica_name

DEVICE_LABELS = ("node", "device")
ENGINE_LABELS = (*DEVICE_LABELS, "model_name", "replica")
DEVICE_OWNERS = ("weights", "kv_used", "kv_cached", "activation", "start", "free", "host_buffer")
ENGINE_OWNERS = ("weights", "kv_used", "kv_cached", "activation", "start", "host_buffer")
LOANS = ("borrowed", "lent")
STATES = ("STARTING", "LIVE", "LEAVING")
_LEVELS = ", ".join(f"{level.value} {level.name}" for level in PressureLevel)


def device_labels(report: DeviceReport) -> dict[str, str]:
    return {"node": report.node, "device": report.device}


def engine_labels(report: DeviceReport, engine: EngineReport) -> dict[str, str]:
    return {**device_labels(report), "model_name": engine.model, "replica": replica_name(engine.engine_id)}


def device_metric(
    name: str, kind: Kind, unit: str, help: str, read: Callable[[DeviceReport], float]
) -> Reading[DeviceReport]:
    return Reading(MetricSpec(name, kind, unit, DEVICE_LABELS, help), read)


def engine_metric(
    name: str, kind: Kind, unit: str, help: str, read: Callable[[EngineReport], float]
) -> Reading[EngineReport]:
    return Reading(MetricSpec(name, kind, unit, ENGINE_LABELS, help), read)


def engine_metric_by(
    label: str,
    values: tuple[str, ...],
    name: str,
    kind: Kind,
    unit: str,
    help: str,
    read: Callable[[EngineReport], Mapping[str, float]],
) -> Reading[EngineReport]:
    """One with a label more, which has these values."""
    return Reading(MetricSpec(name, kind, unit, (*ENGINE_LABELS, label), help, {label: values}), read)


DEVICE_METRICS: tuple[Reading[DeviceReport], ...] = (
    device_metric(
        "ellm_device_budget_bytes",
        Kind.GAUGE,
        "bytes",
        "KV memory and activations that the engines of the device share.",
        lambda report: report.budget_bytes,
    ),
    Reading(
        MetricSpec(
            "ellm_device_memory_bytes",
            Kind.GAUGE,
            "bytes",
            (*DEVICE_LABELS, "owner"),
            "Memory by owner; all but weights and host_buffer sum to the budget.",
            {"owner": DEVICE_OWNERS},
        ),
        lambda report: report.bytes_by_owner,
    ),
    device_metric(
        "ellm_device_pressure",
        Kind.GAUGE,
        "level",
        f"How short of memory the device is: {_LEVELS}.",
        lambda report: report.pressure,
    ),
    device_metric(
        "ellm_device_pressure_since_timestamp_seconds",
        Kind.GAUGE,
        "seconds",
        "Unix time from which the device has had this level, as far as this life of its agent knows.",
        lambda report: report.pressure_since_s,
    ),
    Reading(
        MetricSpec(
            "ellm_device_engines",
            Kind.GAUGE,
            "engines",
            (*DEVICE_LABELS, "state"),
            "Engines registered on the device, by state.",
            {"state": STATES},
        ),
        lambda report: {state: sum(engine.state == state for engine in report.engines) for state in STATES},
    ),
    device_metric(
        "ellm_device_dead_engines_total",
        Kind.COUNTER,
        "engines",
        "Engines that ended without having unregistered.",
        lambda report: report.dead_engines,
    ),
    device_metric(
        "ellm_agent_start_timestamp_seconds",
        Kind.GAUGE,
        "seconds",
        "Unix time at which this life of the memory agent began.",
        lambda report: report.agent_epoch_ns / 1e9,
    ),
)

ENGINE_METRICS: tuple[Reading[EngineReport], ...] = (
    engine_metric_by(
        "owner",
        ENGINE_OWNERS,
        "ellm_replica_memory_bytes",
        Kind.GAUGE,
        "bytes",
        "Memory of the replica by owner.",
        lambda engine: {
            "weights": engine.weights_bytes,
            "kv_used": engine.used_bytes,
            "kv_cached": engine.kv_cached_bytes,
            "activation": engine.activation_held_bytes,
            "start": 0 if engine.waits_to_start else engine.start_bytes,
            "host_buffer": engine.host_bytes,
        },
    ),
    engine_metric(
        "ellm_replica_resident_bytes",
        Kind.GAUGE,
        "bytes",
        "Resident memory of the engine's processes, by the operating system.",
        lambda engine: engine.rss_bytes,
    ),
    engine_metric(
        "ellm_replica_waits_to_start",
        Kind.GAUGE,
        "boolean",
        "1 while its start waits for memory.",
        lambda engine: engine.waits_to_start,
    ),
    engine_metric(
        "ellm_replica_pressure",
        Kind.GAUGE,
        "level",
        f"How short of memory the replica is: {_LEVELS}.",
        lambda engine: engine.pressure,
    ),
    engine_metric(
        "ellm_replica_pressure_since_timestamp_seconds",
        Kind.GAUGE,
        "seconds",
        "Unix time from which the replica has had this level, as far as this life of the agent knows.",
        lambda engine: engine.pressure_since_s,
    ),
    engine_metric(
        "ellm_lease_limit_bytes",
        Kind.GAUGE,
        "bytes",
        "What the replica may hold now, KV memory and activations.",
        lambda engine: engine.limit_bytes,
    ),
    engine_metric(
        "ellm_lease_guarantee_bytes",
        Kind.GAUGE,
        "bytes",
        "What it gets whenever it asks.",
        lambda engine: engine.guarantee_bytes,
    ),
    engine_metric(
        "ellm_lease_ceiling_bytes",
        Kind.GAUGE,
        "bytes",
        "What it may hold at most.",
        lambda engine: engine.ceiling_bytes,
    ),
    engine_metric(
        "ellm_lease_committed_bytes",
        Kind.GAUGE,
        "bytes",
        "What it holds by its own count, moves under way included.",
        lambda engine: engine.committed_bytes + engine.activation_bytes,
    ),
    engine_metric(
        "ellm_lease_demand_bytes",
        Kind.GAUGE,
        "bytes",
        "What its requests could use now.",
        lambda engine: engine.demand_bytes,
    ),
    engine_metric(
        "ellm_lease_overdue_bytes",
        Kind.GAUGE,
        "bytes",
        "Owed to others for longer than giving back may take.",
        lambda engine: engine.overdue_bytes,
    ),
    engine_metric(
        "ellm_lease_revision",
        Kind.GAUGE,
        "revision",
        "Of the lease; it grows with each change.",
        lambda engine: engine.lease_revision,
    ),
    engine_metric(
        "ellm_lease_applied_revision",
        Kind.GAUGE,
        "revision",
        "Of the lease that the engine follows.",
        lambda engine: engine.applied_revision,
    ),
    engine_metric_by(
        "loan",
        LOANS,
        "ellm_lease_loan_bytes",
        Kind.GAUGE,
        "bytes",
        "What its limit is above its guarantee (borrowed) or below it (lent).",
        lambda engine: {
            "borrowed": max(0, engine.limit_bytes - engine.guarantee_bytes),
            "lent": max(0, engine.guarantee_bytes - engine.limit_bytes),
        },
    ),
    engine_metric_by(
        "loan",
        LOANS,
        "ellm_lease_loans_total",
        Kind.COUNTER,
        "loans",
        "Raises of its limit above its guarantee, and cuts below it.",
        lambda engine: {"borrowed": engine.borrow_count, "lent": engine.lend_count},
    ),
    engine_metric_by(
        "loan",
        LOANS,
        "ellm_lease_moved_bytes_total",
        Kind.COUNTER,
        "bytes",
        "Bytes of these raises and cuts.",
        lambda engine: {"borrowed": engine.borrow_bytes, "lent": engine.lend_bytes},
    ),
)
