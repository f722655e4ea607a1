"""The pieces that panels' queries are made of: selectors by Grafana's variables, rates, quantiles."""

from dashboards.board import Variable

RATE = "[$__rate_interval]"
OF_MODEL = '{model_name=~"$model"}'
OF_DEVICE = '{node=~"$node", device=~"$device"}'
OF_REPLICA = '{node=~"$node", device=~"$device", model_name=~"$model", replica=~"$replica"}'
OF_CLASS = '{model_name=~"$model", class=~"$class"}'

MODEL = Variable("model", "ellm_replicas_reachable", "model_name")
NODE = Variable("node", "ellm_device_budget_bytes", "node")
DEVICE = Variable("device", "ellm_device_budget_bytes", "device")
REPLICA = Variable("replica", "ellm_lease_limit_bytes", "replica")
CLASS = Variable("class", "ellm_slo_requests_total", "class")


def rate(metric: str, selector: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}{selector}{RATE}))"


def quantile(share: float, histogram: str, selector: str, *by: str) -> str:
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', selector, 'le', *by)})"


def also(selector: str, label: str, value: str, match: str = "=") -> str:
    """The selector with one matcher more."""
    return f'{selector[:-1]}, {label}{match}"{value}"}}'
