"""What an expression of PromQL speaks of."""

import re

_METRIC = re.compile(r"\b(?:ellm|vllm):?[a-z0-9_:]*[a-z0-9]\b(?=[\s){\[,]|$)")
_SELECTED = re.compile(r"\b((?:ellm_|vllm:)[a-z0-9_]+)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)")


def metrics_in(expr: str) -> set[str]:
    return set(_METRIC.findall(re.sub(r'"[^"]*"', '""', expr)))


def matchers_in(expr: str) -> list[tuple[str, set[str]]]:
    """(metric, labels that it is selected by)."""
    return [(metric, set(_MATCHER.findall(inside))) for metric, inside in _SELECTED.findall(expr)]


def grouping_in(expr: str) -> set[str]:
    return {label.strip() for labels in _GROUPING.findall(expr) for label in labels.split(",") if label.strip()}
