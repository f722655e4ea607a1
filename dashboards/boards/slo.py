"""Who misses their targets, and why."""

from dashboards.board import Board
from dashboards.panel import Draw, Panel, Query
from dashboards.promql import CLASS, MODEL, OF_CLASS, OF_MODEL, also, quantile, rate

_COUNTED = also(OF_CLASS, "ending", "cancelled", "!=")


def _predictions(latency: str) -> Panel:
    of = also(OF_MODEL, "latency", latency)
    count = rate("ellm_predicted_requests_total", of, "model_name")
    return Panel(
        f"Predicted and actual {latency.upper()}",
        "s",
        (
            Query(f"{rate('ellm_predicted_seconds_total', of, 'model_name')} / {count}", "{{model_name}} predicted"),
            Query(
                f"{rate('ellm_predicted_actual_seconds_total', of, 'model_name')} / {count}", "{{model_name}} actual"
            ),
        ),
        "On average, of requests whose replica was chosen by prediction; without the wait at the door.",
    )


SLO = Board(
    "ellm-slo",
    "ellm: SLO and latency",
    "Who misses their targets, and why.",
    (
        Panel(
            "Attainment",
            "percentunit",
            (
                Query(
                    f"{rate('ellm_slo_kept_total', OF_CLASS, 'class')} / "
                    f"{rate('ellm_slo_requests_total', _COUNTED, 'class')}",
                    "{{class}}",
                ),
            ),
            "Share of requests that kept every target, by class.",
        ),
        Panel(
            "Goodput",
            "reqps",
            (Query(rate("ellm_slo_kept_total", OF_CLASS, "class"), "{{class}}"),),
            "Requests a second that kept every target.",
        ),
        Panel(
            "Good tokens",
            "short",
            (Query(rate("ellm_slo_good_tokens_total", OF_CLASS, "class"), "{{class}}"),),
            "Output tokens a second of requests that kept every target.",
        ),
        Panel(
            "Requests by how they end",
            "reqps",
            (Query(rate("ellm_slo_requests_total", OF_CLASS, "class", "ending"), "{{class}} {{ending}}"),),
            "By class.",
            Draw.STACKED,
        ),
        Panel(
            "Time to first token",
            "s",
            tuple(
                Query(quantile(share, "ellm_slo_ttft_seconds", OF_CLASS, "class"), f"{{{{class}}}} p{name}")
                for share, name in ((0.5, "50"), (0.9, "90"), (0.99, "99"))
            ),
            "From a request's arrival, waiting at the door included.",
        ),
        Panel(
            "Time per output token",
            "s",
            tuple(
                Query(quantile(share, "ellm_slo_tpot_seconds", OF_CLASS, "class"), f"{{{{class}}}} p{name}")
                for share, name in ((0.5, "50"), (0.9, "90"), (0.99, "99"))
            ),
            "After the first, on average over an answer.",
        ),
        Panel(
            "At the door",
            "reqps",
            (Query(rate("ellm_admission_requests_total", OF_CLASS, "class", "verdict"), "{{class}} {{verdict}}"),),
            "Let in, had to wait first, refused.",
        ),
        Panel(
            "Wait at the door",
            "s",
            (
                Query(
                    f"{rate('ellm_admission_wait_seconds_total', OF_CLASS, 'class')} / "
                    f"{rate('ellm_admission_requests_total', also(OF_CLASS, 'verdict', 'queued'), 'class')}",
                    "{{class}}",
                ),
            ),
            "Of those that had to wait, on average.",
        ),
        Panel(
            "Waiting, and places",
            "short",
            (
                Query(f"sum by (model_name) (ellm_requests_waiting{OF_MODEL})", "{{model_name}} wait"),
                Query(f"sum by (model_name) (ellm_requests_in_flight{OF_MODEL})", "{{model_name}} inside"),
                Query(f"sum by (model_name) (ellm_requests_limit{OF_MODEL})", "{{model_name}} places"),
            ),
            "Requests at the door, requests in the replicas, and how many are let in at once.",
        ),
        Panel(
            "Tokens that wait",
            "short",
            (Query(f"sum by (model_name) (ellm_waiting_tokens{OF_MODEL})", "{{model_name}}"),),
            "Of the requests at the door, with their expected answers.",
        ),
        *(_predictions(latency) for latency in ("ttft", "tpot")),
        Panel(
            "Error of predictions",
            "percentunit",
            (
                Query(
                    f"max by (model_name, latency) (ellm_predicted_error_ratio{OF_MODEL})", "{{model_name}} {{latency}}"
                ),
            ),
            "Median since the start, as a part of what came.",
        ),
        Panel(
            "Time between tokens",
            "s",
            tuple(
                Query(quantile(share, "vllm:inter_token_latency_seconds", OF_MODEL, "model_name"), name)
                for share, name in ((0.5, "{{model_name}} p50"), (0.99, "{{model_name}} p99"))
            ),
            "Between two pieces of an answer, as vLLM's server sees them.",
        ),
    ),
    (MODEL, CLASS),
)
