"""The catalogue and the page that is printed from it."""

from pathlib import Path

import pytest

from dashboards.catalogue import GROUPS
from dashboards.metrics_page import metrics_page
from memory_agent.errors import SettingsError
from memory_agent.metric import Kind, MetricSpec


def test_the_page_is_current() -> None:
    """docs/metrics.md is what the catalogue says."""
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metrics_page(), "python -m dashboards.metrics_page > docs/metrics.md"


def test_a_name_is_one_metric() -> None:
    """No two entries share a name, and a counter's name without its ending is nobody's."""
    names = [metric.name for group in GROUPS.values() for metric in group]
    families = {name.removesuffix("_total") for name in names}
    assert len(names) == len(families)


@pytest.mark.parametrize(
    ("name", "kind", "unit"),
    [
        ("ellm_requests", Kind.COUNTER, "requests"),
        ("ellm_requests_total", Kind.GAUGE, "requests"),
        ("ellm_memory", Kind.GAUGE, "bytes"),
        ("ellm_wait_total", Kind.COUNTER, "seconds"),
    ],
)
def test_a_name_that_hides_what_it_is_is_refused(name: str, kind: Kind, unit: str) -> None:
    """Counters end in _total, and a base unit is in the name."""
    with pytest.raises(SettingsError, match=name):
        MetricSpec(name, kind, unit, (), "Help.")
