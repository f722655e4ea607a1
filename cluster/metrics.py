"""The metrics of controller and ingress: the catalogue of this package, with those of vLLM's that are built upon.

Every series of an ingress process has the label ``ingress``, its rank, which ``cluster.api_metrics`` adds. No label
takes what a client sends: classes and models are those of the configuration, tenants and request ids are in none.
"""

from cluster.admission import Verdict
from cluster.move import MoveOutcome, Trigger
from cluster.slo import Ending
from memory_agent.metric import Kind, MetricSpec
from memory_agent.metrics import DEVICE_LABELS

INGRESS_LABEL = "ingress"
REPORT_OUTCOMES = ("applied", "stale", "invalid")
LATENCIES = ("ttft", "tpot")
_MODEL = ("model_name",)
_ENGINE = (*_MODEL, "engine")
_CLASS = (*_MODEL, "class")

# Of the controller

CONTROLLER_REACHABLE = MetricSpec(
    "ellm_controller_reachable", Kind.GAUGE, "boolean", (), "1 where the controller has answered this scrape."
)
CONTROLLER_START = MetricSpec(
    "ellm_controller_start_timestamp_seconds",
    Kind.GAUGE,
    "seconds",
    (),
    "Unix time at which this life of the controller began.",
)
CONTROLLER_REPORTS = MetricSpec(
    "ellm_controller_reports_total",
    Kind.COUNTER,
    "reports",
    ("outcome",),
    "Agents' reports, by what became of them: it plans with those applied.",
    {"outcome": REPORT_OUTCOMES},
)
CONTROLLER_DECISIONS = MetricSpec(
    "ellm_controller_decisions_total",
    Kind.COUNTER,
    "decisions",
    ("kind",),
    "Decisions, as `ellm explain` shows them.",
)
REPORT_AGE = MetricSpec(
    "ellm_device_report_age_seconds",
    Kind.GAUGE,
    "seconds",
    DEVICE_LABELS,
    "Age of the newest report of the device's agent; above 3 s it counts as absent, after 60 s it is forgotten.",
)

# Of an ingress process

REPLICAS_REACHABLE = MetricSpec(
    "ellm_replicas_reachable", Kind.GAUGE, "replicas", _MODEL, "Replicas that answered the last poll."
)
REPLICA_INFO = MetricSpec(
    "ellm_replica_info",
    Kind.GAUGE,
    "1",
    (*_ENGINE, "replica"),
    "1 for each replica: which number it has in vLLM's metrics of this ingress.",
)
REQUESTS_IN_FLIGHT = MetricSpec(
    "ellm_requests_in_flight", Kind.GAUGE, "requests", _MODEL, "Requests sent to replicas and not ended."
)
REQUESTS_RETRIED = MetricSpec(
    "ellm_requests_retried_total", Kind.COUNTER, "requests", _MODEL, "Requests sent again before their first token."
)
REQUESTS_CONTINUED = MetricSpec(
    "ellm_requests_continued_total",
    Kind.COUNTER,
    "requests",
    _MODEL,
    "Answers that went on elsewhere when their replica had failed.",
)
REQUESTS_RESUMED = MetricSpec(
    "ellm_requests_resumed_total",
    Kind.COUNTER,
    "requests",
    _MODEL,
    "Requests that came again with their Idempotency-Key, and got what had been computed.",
)
TOKENS_RESUMED = MetricSpec(
    "ellm_resumed_tokens_total", Kind.COUNTER, "tokens", _MODEL, "Tokens that these got and no engine computed again."
)
MIGRATIONS = MetricSpec(
    "ellm_migrations_total",
    Kind.COUNTER,
    "requests",
    (*_MODEL, "trigger", "outcome"),
    "Running requests that were to go on at another replica: why, and what became of it.",
    {"trigger": tuple(Trigger), "outcome": tuple(MoveOutcome)},
)
MIGRATION_DOWNTIMES = MetricSpec(
    "ellm_migration_downtimes_total", Kind.COUNTER, "requests", _MODEL, "Migrations whose downtime is known."
)
MIGRATION_DOWNTIME = MetricSpec(
    "ellm_migration_downtime_seconds_total",
    Kind.COUNTER,
    "seconds",
    _MODEL,
    "Time from the last token at the source to the first one of the destination, of these.",
)
REPLICAS_DRAINING = MetricSpec(
    "ellm_replicas_draining", Kind.GAUGE, "replicas", _MODEL, "Replicas that are to be empty."
)
REQUESTS_WAITING = MetricSpec(
    "ellm_requests_waiting", Kind.GAUGE, "requests", _MODEL, "Requests that wait for a replica, at the door."
)
TOKENS_WAITING = MetricSpec(
    "ellm_waiting_tokens", Kind.GAUGE, "tokens", _MODEL, "Tokens of these, with their expected answers."
)
REQUESTS_LIMIT = MetricSpec(
    "ellm_requests_limit", Kind.GAUGE, "requests", _MODEL, "Requests that this ingress lets into the replicas at once."
)
ADMISSION_REQUESTS = MetricSpec(
    "ellm_admission_requests_total",
    Kind.COUNTER,
    "requests",
    (*_CLASS, "verdict"),
    "Requests at the door: let in, had to wait first, refused. One that waited is let in or refused afterwards.",
    {"verdict": tuple(Verdict)},
)
ADMISSION_WAIT = MetricSpec(
    "ellm_admission_wait_seconds_total",
    Kind.COUNTER,
    "seconds",
    _CLASS,
    "Time that requests have waited at the door, of those that wait no more.",
)
PREDICTED_REQUESTS = MetricSpec(
    "ellm_predicted_requests_total",
    Kind.COUNTER,
    "requests",
    (*_MODEL, "latency"),
    "Requests whose latency was predicted, and came.",
    {"latency": LATENCIES},
)
PREDICTED_SECONDS = MetricSpec(
    "ellm_predicted_seconds_total",
    Kind.COUNTER,
    "seconds",
    (*_MODEL, "latency"),
    "Sum of what was predicted for them.",
    {"latency": LATENCIES},
)
ACTUAL_SECONDS = MetricSpec(
    "ellm_predicted_actual_seconds_total",
    Kind.COUNTER,
    "seconds",
    (*_MODEL, "latency"),
    "Sum of what came instead.",
    {"latency": LATENCIES},
)
PREDICTION_ERROR = MetricSpec(
    "ellm_predicted_error_ratio",
    Kind.GAUGE,
    "ratio",
    (*_MODEL, "latency"),
    "Median error of all predictions, as a part of what came: 0.1 is 10 % too long or too short.",
    {"latency": LATENCIES},
)
SLO_REQUESTS = MetricSpec(
    "ellm_slo_requests_total",
    Kind.COUNTER,
    "requests",
    (*_CLASS, "ending"),
    "Requests that have ended, by how they ended.",
    {"ending": tuple(Ending)},
)
SLO_KEPT = MetricSpec("ellm_slo_kept_total", Kind.COUNTER, "requests", _CLASS, "Requests that kept every target.")
SLO_GOOD_TOKENS = MetricSpec(
    "ellm_slo_good_tokens_total", Kind.COUNTER, "tokens", _CLASS, "Output tokens of requests that kept every target."
)
SLO_TTFT = MetricSpec(
    "ellm_slo_ttft_seconds", Kind.HISTOGRAM, "seconds", _CLASS, "Time from a request's arrival to its first token."
)
SLO_TPOT = MetricSpec(
    "ellm_slo_tpot_seconds", Kind.HISTOGRAM, "seconds", _CLASS, "Time per output token after the first."
)
SLO_REPLICA_REQUESTS = MetricSpec(
    "ellm_slo_replica_requests_total", Kind.COUNTER, "requests", _ENGINE, "Ended requests that the replica answered."
)
SLO_REPLICA_KEPT = MetricSpec(
    "ellm_slo_replica_kept_total", Kind.COUNTER, "requests", _ENGINE, "Of these, those that kept every target."
)

CONTROLLER_METRICS = (
    CONTROLLER_REACHABLE,
    CONTROLLER_START,
    CONTROLLER_REPORTS,
    CONTROLLER_DECISIONS,
    REPORT_AGE,
)
INGRESS_METRICS = (
    REPLICAS_REACHABLE,
    REPLICA_INFO,
    REQUESTS_IN_FLIGHT,
    REQUESTS_RETRIED,
    REQUESTS_CONTINUED,
    REQUESTS_RESUMED,
    TOKENS_RESUMED,
    MIGRATIONS,
    MIGRATION_DOWNTIMES,
    MIGRATION_DOWNTIME,
    REPLICAS_DRAINING,
    REQUESTS_WAITING,
    TOKENS_WAITING,
    REQUESTS_LIMIT,
    ADMISSION_REQUESTS,
    ADMISSION_WAIT,
    PREDICTED_REQUESTS,
    PREDICTED_SECONDS,
    ACTUAL_SECONDS,
    PREDICTION_ERROR,
    SLO_REQUESTS,
    SLO_KEPT,
    SLO_GOOD_TOKENS,
    SLO_TTFT,
    SLO_TPOT,
    SLO_REPLICA_REQUESTS,
    SLO_REPLICA_KEPT,
)


def _vllm(name: str, kind: Kind, unit: str, help: str, *labels: str) -> MetricSpec:
    return MetricSpec(f"vllm:{name}", kind, unit, (*_ENGINE, *labels), help)


VLLM_METRICS = (
    _vllm("num_requests_running", Kind.GAUGE, "requests", "Requests that the engine runs."),
    _vllm("num_requests_waiting", Kind.GAUGE, "requests", "Requests that wait inside the engine."),
    _vllm("kv_cache_usage_perc", Kind.GAUGE, "ratio", "Used share of the KV blocks that are reachable now, 0 to 1."),
    _vllm("num_preemptions_total", Kind.COUNTER, "requests", "Preemptions that vLLM has counted."),
    _vllm("prompt_tokens_total", Kind.COUNTER, "tokens", "Prompt tokens of requests."),
    _vllm("generation_tokens_total", Kind.COUNTER, "tokens", "Output tokens."),
    _vllm("prefix_cache_queries_total", Kind.COUNTER, "tokens", "Prompt tokens looked for in the prefix cache."),
    _vllm("prefix_cache_hits_total", Kind.COUNTER, "tokens", "Of these, found on the device."),
    _vllm("external_prefix_cache_queries_total", Kind.COUNTER, "tokens", "Looked for in the host buffer."),
    _vllm(
        "external_prefix_cache_hits_total",
        Kind.COUNTER,
        "tokens",
        "Of these, loaded from there; preempted requests are in neither.",
    ),
    _vllm("time_to_first_token_seconds", Kind.HISTOGRAM, "seconds", "From arrival in the API to the first token."),
    _vllm("inter_token_latency_seconds", Kind.HISTOGRAM, "seconds", "Between two pieces of an answer."),
    _vllm("e2e_request_latency_seconds", Kind.HISTOGRAM, "seconds", "From arrival to the end."),
    _vllm("request_success_total", Kind.COUNTER, "requests", "Requests that have ended.", "finished_reason"),
    MetricSpec(
        "vllm:cache_config_info",
        Kind.GAUGE,
        "1",
        ("engine", "block_size", "num_gpu_blocks"),
        "1; two of its labels are the tokens of a KV block and the blocks at the ceiling.",
    ),
)
"""Those that dashboards and the Gateway API's model server protocol read; vLLM has more."""
