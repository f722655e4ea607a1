"""docs/metrics.md, printed from the catalogue.

python -m dashboards.metrics_page > docs/metrics.md
"""

import sys

from dashboards.catalogue import GROUPS, labels_of
from memory_agent.metric import MetricSpec

_HEAD = """# Metrics

Printed by `python -m dashboards.metrics_page`; do not edit.

`GET /metrics` on the port of the API answers for the whole cluster, whichever ingress process gets the connection: one
address is all that Prometheus needs. Of a cluster with API keys it wants one with the scope `metrics`.

```yaml
scrape_configs:
  - job_name: ellm
    http_sd_configs: [{url: "http://127.0.0.1:8000/metrics/targets"}] # this address, and Ray's own metrics of each node
```

`/metrics/targets` is a list as Ray's own service discovery file is one; saved to a file it serves `file_sd_configs`. A
PodMonitor finds the same by ports: where several pods have an ingress process, each of them answers for all, so give
what they answer the same `instance` and no `pod` label.

- Labels are bounded: `node`, `device`, `replica` (at most 32 at once a device), `model_name` and `class` as configured,
  `engine` the number of a replica, `ingress` the rank of an ingress process. No tenant, user or request id is in any.
- Metrics of devices, leases and engines come from the agents' reports by the controller, once for the cluster. Those
  that ingress processes count have the label `ingress`: sum over it. Of vLLM's gauges each tells the same: take the
  maximum over it.
- vLLM has more metrics than are listed here, under its own names. `vllm:kv_cache_usage_perc` is the share of what the
  lease makes reachable. The Gateway API's model server protocol reads `vllm:num_requests_waiting`,
  `vllm:num_requests_running`, `vllm:kv_cache_usage_perc`, and of `vllm:cache_config_info` `block_size` and
  `num_gpu_blocks`, the blocks at the ceiling; those that are reachable now are `ellm_kv_blocks{state="reachable"}`.
"""


def metrics_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for group, metrics in GROUPS.items():
        rows = "\n".join(_row(group, metric) for metric in metrics)
        parts.append(f"\n## {group}\n\n| metric | type, unit | labels | |\n|---|---|---|---|\n{rows}\n")
    return "".join(parts)


def _row(group: str, metric: MetricSpec) -> str:
    labels = ", ".join(
        f"`{name}` ({', '.join(metric.values[name])})" if name in metric.values else f"`{name}`"
        for name in labels_of(group, metric)
    )
    return f"| `{metric.name}` | {metric.kind}, {metric.unit} | {labels or '-'} | {metric.help} |"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
