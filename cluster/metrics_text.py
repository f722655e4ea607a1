"""Metrics as Prometheus' text format, by family, so that what several processes have can be put together as it is.

prometheus_client's own writer takes four times as long, which matters with thousands of series of many replicas.
"""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TextFamilies = dict[str, tuple[str, str]]
"""Head (HELP and TYPE) and lines of each family, by its name."""


def text_families(metrics: Iterable[Metric], labels: Mapping[str, str] | None = None) -> TextFamilies:
    """These metrics, with further ``labels``, and without the times at which prometheus_client has made them. Several
    of one name are one family."""
    more = "".join(f',{name}="{_escaped(value)}"' for name, value in (labels or {}).items())
    heads: dict[str, str] = {}
    lines: dict[str, list[str]] = {}
    for metric in metrics:
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        if name not in heads:
            heads[name] = f"# HELP {name} {_one_line(metric.documentation)}\n# TYPE {name} {_type(metric.type)}\n"
        into = lines.setdefault(name, [])
        for sample in metric.samples:
            if sample.name.endswith("_created"):
                continue
            text = ",".join([f'{label}="{_escaped(value)}"' for label, value in sample.labels.items()]) + more
            braced = f"{{{text.lstrip(',')}}}" if text else ""
            into.append(f"{sample.name}{braced} {floatToGoString(sample.value)}\n")  # type: ignore[no-untyped-call]
    return {name: (heads[name], "".join(into)) for name, into in lines.items()}


def merged_text(sources: Sequence[TextFamilies]) -> str:
    """One text of all, each family in one piece, as the format wants it."""
    names = dict.fromkeys(name for source in sources for name in source)
    parts = []
    for name in names:
        having = [source[name] for source in sources if name in source]
        parts += [having[0][0], *(lines for _, lines in having)]
    return "".join(parts)


def _type(kind: str) -> str:
    """That the text format knows."""
    return {"unknown": "untyped", "info": "gauge", "stateset": "gauge", "gaugehistogram": "histogram"}.get(kind, kind)


def _one_line(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _escaped(value: str) -> str:
    return _one_line(value).replace('"', r"\"")
