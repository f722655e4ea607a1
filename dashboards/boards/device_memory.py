"""Who has the memory of each device, and how it moves."""

from dashboards.board import Annotation, Board
from dashboards.panel import Draw, Panel, Query
from dashboards.promql import DEVICE, NODE, OF_DEVICE, RATE, also, rate


def _moved(direction: str) -> str:
    return f"sum by (replica) (increase(ellm_kv_moved_bytes_total{also(OF_DEVICE, 'direction', direction)}{RATE})) > 0"


_KV = also(OF_DEVICE, "owner", "kv_used|kv_cached", "=~")

DEVICE_MEMORY = Board(
    "ellm-device-memory",
    "ellm: device memory",
    "Who has the memory of each device, and how it moves.",
    (
        Panel(
            "Memory by owner",
            "bytes",
            (Query(f"sum by (owner) (ellm_device_memory_bytes{OF_DEVICE})", "{{owner}}"),),
            "All but weights and host buffer sum to the budget, whatever is free included.",
            Draw.STACKED,
            24,
        ),
        Panel(
            "KV memory by replica",
            "bytes",
            (
                Query(
                    f"sum by (replica) (ellm_replica_memory_bytes{_KV})",
                    "{{replica}}",
                ),
            ),
            "Held by each replica, used and cached.",
            Draw.STACKED,
        ),
        Panel(
            "Leases",
            "bytes",
            (
                Query(f"sum by (replica) (ellm_lease_limit_bytes{OF_DEVICE})", "{{replica}} limit"),
                Query(f"sum by (replica) (ellm_lease_demand_bytes{OF_DEVICE})", "{{replica}} demand"),
                Query(f"sum by (replica) (ellm_lease_committed_bytes{OF_DEVICE})", "{{replica}} holds"),
                Query(f"sum by (replica) (ellm_lease_guarantee_bytes{OF_DEVICE})", "{{replica}} guarantee"),
                Query(f"sum by (replica) (ellm_lease_overdue_bytes{OF_DEVICE})", "{{replica}} overdue"),
            ),
            "What each replica may hold, could use and holds; overdue is owed to others for too long.",
        ),
        Panel(
            "On loan",
            "bytes",
            (Query(f"sum by (replica, loan) (ellm_lease_loan_bytes{OF_DEVICE})", "{{replica}} {{loan}}"),),
            "Limits above the guarantee (borrowed) and below it (lent).",
        ),
        Panel(
            "Loans",
            "Bps",
            (Query(rate("ellm_lease_moved_bytes_total", OF_DEVICE, "loan"), "{{loan}}"),),
            "Bytes a second that change hands by leases.",
        ),
        Panel(
            "Changes of leases",
            "ops",
            (Query(rate("ellm_lease_loans_total", OF_DEVICE, "loan"), "{{loan}}"),),
            "Raises above the guarantee and cuts below it, a second.",
        ),
        Panel(
            "Inflate and deflate",
            "Bps",
            (Query(rate("ellm_kv_moved_bytes_total", OF_DEVICE, "direction"), "{{direction}}"),),
            "KV memory mapped and unmapped, a second.",
        ),
        Panel(
            "Moves",
            "ops",
            (Query(rate("ellm_kv_moves_total", OF_DEVICE, "direction"), "{{direction}}"),),
            "Steps in which memory was mapped or unmapped, a second.",
        ),
        Panel(
            "Time of a move",
            "s",
            (
                Query(
                    f"{rate('ellm_kv_move_seconds_total', OF_DEVICE, 'direction')} / "
                    f"{rate('ellm_kv_moves_total', OF_DEVICE, 'direction')}",
                    "{{direction}}",
                ),
            ),
            "Of the slowest worker, on average.",
        ),
        Panel(
            "Pressure of replicas",
            "short",
            (Query(f"max by (replica) (ellm_replica_pressure{OF_DEVICE})", "{{replica}}"),),
            "0 normal, 1 elevated, 2 critical.",
        ),
    ),
    (NODE, DEVICE),
    (
        Annotation(
            "Inflate",
            _moved("inflate"),
            "inflate {{replica}}",
            "green",
        ),
        Annotation(
            "Deflate",
            _moved("deflate"),
            "deflate {{replica}}",
            "orange",
        ),
    ),
)
