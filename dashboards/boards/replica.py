"""One replica, or several side by side."""

from dashboards.board import Board
from dashboards.panel import Draw, Panel, Query
from dashboards.promql import DEVICE, MODEL, NODE, OF_MODEL, OF_REPLICA, RATE, REPLICA, rate

_BY_REPLICA = "* on (model_name, engine, ingress) group_left (replica) ellm_replica_info"
REPLICA_BOARD = Board(
    "ellm-replica",
    "ellm: replica",
    "One replica, or several side by side.",
    (
        Panel(
            "Requests",
            "short",
            (Query(f"sum by (replica, state) (ellm_replica_requests{OF_REPLICA})", "{{replica}} {{state}}"),),
            "Inside the engine.",
        ),
        Panel(
            "KV memory in use",
            "percentunit",
            (Query(f"max by (replica) (ellm_kv_usage_ratio{OF_REPLICA})", "{{replica}}"),),
            "Of what the lease makes reachable.",
        ),
        Panel(
            "KV blocks",
            "short",
            (Query(f"sum by (replica, state) (ellm_kv_blocks{OF_REPLICA})", "{{replica}} {{state}}"),),
            "With memory now, inside the lease, and at the ceiling.",
        ),
        Panel(
            "Memory by owner",
            "bytes",
            (Query(f"sum by (owner) (ellm_replica_memory_bytes{OF_REPLICA})", "{{owner}}"),),
            "Of the chosen replicas together.",
            Draw.STACKED,
        ),
        Panel(
            "Resident memory",
            "bytes",
            (Query(f"sum by (replica) (ellm_replica_resident_bytes{OF_REPLICA})", "{{replica}}"),),
            "Of the engine's processes, by the operating system.",
        ),
        Panel(
            "Time per output token",
            "s",
            (
                Query(f"max by (replica) (ellm_replica_tpot_seconds{OF_REPLICA})", "{{replica}}"),
                Query(f"max by (replica) (ellm_replica_tpot_target_seconds{OF_REPLICA})", "{{replica}} target"),
            ),
            "That one answer in ten exceeds lately, and the tightest target of a request here.",
        ),
        Panel(
            "Time to first token, used",
            "percentunit",
            (Query(f"max by (replica) (ellm_replica_ttft_used_ratio{OF_REPLICA})", "{{replica}}"),),
            "Of its target, what the prompt that is nearest to it has used.",
        ),
        Panel(
            "Tokens of a step, at most",
            "short",
            (Query(f"max by (replica) (ellm_target_step_tokens{OF_REPLICA})", "{{replica}}"),),
            "The controller's target; 0 for no bound.",
        ),
        Panel(
            "Prompt tokens computed",
            "short",
            (Query(f"sum by (replica) (ellm_replica_prompt_rate{OF_REPLICA})", "{{replica}}"),),
            "A second, over about half a minute.",
        ),
        Panel(
            "Preemptions",
            "ops",
            (Query(rate("ellm_preemptions_total", OF_REPLICA, "replica"), "{{replica}}"),),
            "A second.",
        ),
        Panel(
            "Attainment",
            "percentunit",
            (
                Query(
                    f"sum by (replica) (rate(ellm_slo_replica_kept_total{OF_MODEL}{RATE}) {_BY_REPLICA}) / "
                    f"sum by (replica) (rate(ellm_slo_replica_requests_total{OF_MODEL}{RATE}) {_BY_REPLICA})",
                    "{{replica}}",
                ),
            ),
            "Share of the requests that the replica answered which kept every target.",
        ),
        Panel(
            "Prefix cache",
            "percentunit",
            (
                Query(
                    f"sum by (replica) (rate(vllm:prefix_cache_hits_total{OF_MODEL}{RATE}) {_BY_REPLICA}) / "
                    f"sum by (replica) (rate(vllm:prefix_cache_queries_total{OF_MODEL}{RATE}) {_BY_REPLICA})",
                    "{{replica}}",
                ),
            ),
            "Share of prompt tokens that were found on the device.",
        ),
    ),
    (NODE, DEVICE, MODEL, REPLICA),
)
