"""What the cluster does, and whether something is wrong with it."""

from dashboards.board import Board
from dashboards.panel import Draw, Panel, Query
from dashboards.promql import MODEL, OF_MODEL, RATE, also, rate

_COUNTED = also(OF_MODEL, "ending", "cancelled", "!=")
CLUSTER = Board(
    "ellm-cluster",
    "ellm: cluster",
    "What the cluster does, and whether something is wrong with it.",
    (
        Panel(
            "Replicas that answer",
            "short",
            (Query(f"max by (model_name) (ellm_replicas_reachable{OF_MODEL})", "{{model_name}}"),),
            "Replicas that answered the ingress's last poll.",
            Draw.NUMBER,
            6,
        ),
        Panel(
            "Requests in the replicas",
            "short",
            (Query(f"sum by (model_name) (ellm_requests_in_flight{OF_MODEL})", "{{model_name}}"),),
            "Sent to replicas and not ended.",
            Draw.NUMBER,
            6,
        ),
        Panel(
            "Engines that died",
            "short",
            (Query("sum by (node, device) (increase(ellm_device_dead_engines_total[$__range]))", "{{device}}"),),
            "Engines that ended without having unregistered, in the time shown.",
            Draw.NUMBER,
            6,
        ),
        Panel(
            "Kept targets",
            "percentunit",
            (
                Query(
                    f"sum(increase(ellm_slo_kept_total{OF_MODEL}[$__range])) / "
                    f"sum(increase(ellm_slo_requests_total{_COUNTED}[$__range]))",
                    "kept",
                ),
            ),
            "Share of the requests that kept every target, in the time shown.",
            Draw.NUMBER,
            6,
        ),
        Panel(
            "Requests by how they end",
            "reqps",
            (Query(rate("ellm_slo_requests_total", OF_MODEL, "ending"), "{{ending}}"),),
            "Rejected: refused at the door. Failed: no replica could answer.",
            Draw.STACKED,
        ),
        Panel(
            "Tokens",
            "short",
            (
                Query(rate("vllm:generation_tokens_total", OF_MODEL, "model_name"), "{{model_name}} output"),
                Query(rate("vllm:prompt_tokens_total", OF_MODEL, "model_name"), "{{model_name}} prompt"),
            ),
            "Tokens a second, of answers and of prompts.",
        ),
        Panel(
            "Requests that wait and run",
            "short",
            (
                Query(f"sum by (model_name) (ellm_requests_waiting{OF_MODEL})", "{{model_name}} at the door"),
                Query(
                    f"sum by (model_name, state) (ellm_replica_requests{OF_MODEL})",
                    "{{model_name}} {{state}} in engines",
                ),
            ),
            "At the door of the cluster, and inside the engines.",
        ),
        Panel(
            "Memory in use",
            "percentunit",
            (
                Query(
                    'sum by (node, device) (ellm_device_memory_bytes{owner="kv_used"}) / '
                    "sum by (node, device) (ellm_device_budget_bytes)",
                    "{{device}}",
                ),
            ),
            "KV memory that requests use, of each device's budget.",
        ),
        Panel(
            "Memory pressure",
            "short",
            (Query("max by (node, device) (ellm_device_pressure)", "{{device}}"),),
            "0 normal, 1 elevated, 2 critical: more is wanted than there is.",
        ),
        Panel(
            "Preemptions",
            "ops",
            (Query(rate("ellm_preemptions_total", OF_MODEL, "model_name"), "{{model_name}}"),),
            "Requests that had to give their KV memory back, a second.",
        ),
        Panel(
            "Requests that went on elsewhere",
            "short",
            (
                Query(
                    f"sum by (model_name) (increase(ellm_requests_retried_total{OF_MODEL}{RATE}))",
                    "{{model_name}} before their first token",
                ),
                Query(
                    f"sum by (model_name) (increase(ellm_requests_continued_total{OF_MODEL}{RATE}))",
                    "{{model_name}} after it",
                ),
                Query(
                    f"sum by (model_name) (increase(ellm_requests_resumed_total{OF_MODEL}{RATE}))",
                    "{{model_name}} when their client came again",
                ),
            ),
            "Because their replica had died or did not answer; or their connection had ended, and they have a key.",
        ),
        Panel(
            "Engines",
            "short",
            (Query("sum by (state) (ellm_device_engines)", "{{state}}"),),
            "Registered with the memory agents.",
            Draw.STACKED,
        ),
    ),
    (MODEL,),
)
