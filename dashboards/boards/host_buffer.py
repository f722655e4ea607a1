"""KV memory that left the device: what is kept of it, and whether that pays."""

from dashboards.board import Board
from dashboards.panel import Draw, Panel, Query
from dashboards.promql import DEVICE, MODEL, NODE, OF_REPLICA, RATE, REPLICA, also, rate

HOST_BUFFER = Board(
    "ellm-host-buffer",
    "ellm: host buffer",
    "KV memory that left the device: what is kept of it, and whether that pays.",
    (
        Panel(
            "Size",
            "bytes",
            (Query(f"sum by (size) (ellm_host_buffer_bytes{OF_REPLICA})", "{{size}}"),),
            "Of the buffer, what requests may be set aside in, and what is taken.",
        ),
        Panel(
            "Found",
            "percentunit",
            (
                Query(
                    f"{rate('ellm_host_buffer_lookups_total', also(OF_REPLICA, 'result', 'hit'), 'replica')} / "
                    f"{rate('ellm_host_buffer_lookups_total', OF_REPLICA, 'replica')}",
                    "{{replica}}",
                ),
            ),
            "Share of the blocks asked for that were there.",
        ),
        Panel(
            "Blocks",
            "ops",
            (Query(rate("ellm_host_buffer_events_total", OF_REPLICA, "event"), "{{event}}"),),
            "Stored, loaded, pushed out by others, not found whole; a second.",
        ),
        Panel(
            "Lookups",
            "ops",
            (Query(rate("ellm_host_buffer_lookups_total", OF_REPLICA, "result"), "{{result}}"),),
            "Blocks that requests asked for, a second.",
        ),
        Panel(
            "Stores by decision",
            "ops",
            (Query(rate("ellm_host_buffer_stores_total", OF_REPLICA, "decision"), "{{decision}}"),),
            "Blocks that left the device: stored because it pays, to learn whether it does, or let go.",
            Draw.STACKED,
        ),
        Panel(
            "Loads by decision",
            "ops",
            (Query(rate("ellm_host_buffer_loads_total", OF_REPLICA, "decision"), "{{decision}}"),),
            "Blocks found: loaded because it pays, to learn whether it does, or computed again.",
            Draw.STACKED,
        ),
        Panel(
            "Tokens loaded instead of computed",
            "short",
            (
                Query(
                    f"sum by (replica) (rate(ellm_host_buffer_events_total{also(OF_REPLICA, 'event', 'loaded')}{RATE})"
                    f" * ignoring (event) ellm_kv_block_tokens{OF_REPLICA})",
                    "{{replica}}",
                ),
            ),
            "A second; the last, partly filled block of a preempted request counts as a whole one.",
        ),
        Panel(
            "Preempted and set aside",
            "ops",
            (
                Query(rate("ellm_preemptions_total", OF_REPLICA, "replica"), "{{replica}} preempted"),
                Query(rate("ellm_set_aside_total", OF_REPLICA, "replica"), "{{replica}} set aside"),
            ),
            "Requests whose KV memory went to the buffer, a second; set aside: for a prompt.",
        ),
    ),
    (NODE, DEVICE, MODEL, REPLICA),
)
