"""`ellm status`: the snapshot as tables."""

import io
from typing import Any

import pytest
from rich.console import Console

from cluster.bench.report import Slo
from cluster.slo import Ending, Outcome, SloAccount
from cluster.slo_ledger import SloReport, to_json
from cluster.status import format_bytes, render_status

NODE = "0123456789abcdef0123456789abcdef"
SLO = SloReport(SloAccount(), 10.0)
for ending in (Ending.ANSWERED, Ending.ANSWERED, Ending.ANSWERED, Ending.REJECTED, Ending.CANCELLED):
    SLO.account.add(Outcome("chat", "smol", "r", Slo(), ending, 0.1, 0.01, 1.0, 5))


def replica(engine_id: str, **values: Any) -> dict[str, Any]:
    known = {
        "engine_id": engine_id, "model": "smol", "state": "LIVE", "pressure": "NORMAL", "used_bytes": 20 << 20,
        "held_bytes_os": 50 << 20, "limit_bytes": 512 << 20, "ceiling_bytes": 1 << 30, "host_bytes": 8 << 20,
        "start_bytes": 0, "kv_usage": 0.25, "running": 2, "waiting": 3, "preemptions": 4, "set_aside": 5,
        "inflate_count": 17, "deflate_count": 16, "target": {"revision": 8},
    }  # fmt: skip
    return known | values


def model(name: str, **values: Any) -> dict[str, Any]:
    known = {
        "name": name, "phase": "serving", "elastic": True, "replicas": 2,
        "min_replicas": 2, "max_replicas": 2, "guarantee_bytes": 64 << 20,
        "ceiling_bytes": 1 << 30, "held_bytes": 50 << 20, "limit_bytes": 700 << 20, "running": 4, "waiting": 6,
    }  # fmt: skip
    return known | values


def snapshot(*replicas: dict[str, Any]) -> dict[str, Any]:
    device = {
        "device": "cpu", "agent_pid": 1, "pressure": "ELEVATED", "report_age_s": 0.14, "budget_bytes": 1 << 30,
        "dead_engines": 6, "running": 2, "waiting": 3, "replicas": list(replicas),
        "memory": {
            "weights_bytes": 538 << 20, "kv_used_bytes": 20 << 20, "kv_cached_bytes": 30 << 20,
            "activation_bytes": 0, "start_bytes": 0, "free_bytes": 974 << 20, "host_buffer_bytes": 0,
        },
    }  # fmt: skip
    return {
        "nodes": [{"node": NODE, "devices": [device]}],
        "absent_devices": [],
        "drains": [],
        "models": [model("smol"), model("fixed", elastic=False), {"name": "new", "phase": "sizing"}],
        "bounds": {"token_budget_max": 512, "active_max": 0},
        "slo": to_json([SLO]),
    }


def shown(value: dict[str, Any], width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render_status(value))
    return console.export_text()


def row_of(text: str, start: str) -> list[str]:
    """The cells of the table row whose first cell is ``start``."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [start])


def test_device_row_shows_memory_by_owner() -> None:
    """Each owner's bytes, the pressure and the report's age stand in the device's row."""
    expected = f"{NODE[:8]} cpu ELEVATED 20.0Mi 30.0Mi 0B 0B 974Mi 1.00Gi 538Mi 0B 0.1s"
    assert row_of(shown(snapshot(replica("app#model#abc12345"))), NODE[:8]) == expected.split()


def test_replica_row_shows_its_lease_and_work() -> None:
    """Pressure, held bytes, limit, host buffer, usage and counts stand in the replica's row."""
    expected = "abc12345 CRITICAL smol 20.0Mi 50.0Mi 512Mi 8.00Mi 25% 2 3 4 5 17/16"
    text = shown(snapshot(replica("app#model#abc12345", pressure="CRITICAL")))
    assert row_of(text, "abc12345") == expected.split()


def test_class_row_shows_how_its_requests_fared() -> None:
    """Attainment, goodput and endings stand in a class's row and in its model's; without requests there is no table."""
    text = shown(snapshot())
    assert row_of(text, "chat") == ["chat", "75.0%", "0.30/s", "3", "1", "0", "0", "1"]
    assert row_of(text[text.index("chat") :], "smol") == ["smol", "75.0%", "0.30/s", "3", "1", "0", "0", "1"]
    assert "kept every target" not in shown(snapshot() | {"slo": to_json([])})


def test_model_row_shows_its_limits_and_what_it_holds() -> None:
    """Guarantee and ceiling of each replica, held bytes and limit of all; static memory is both; a model that is not
    sized yet has only its phase."""
    text = shown(snapshot(replica("a")))
    assert row_of(text, "smol") == ["smol", "serving", "2", "64.0Mi", "1.00Gi", "50.0Mi", "700Mi", "4", "6"]
    assert row_of(text, "fixed") == ["fixed", "serving", "2", "1.00Gi", "1.00Gi"]
    assert row_of(text, "new") == ["new", "sizing"]


def test_a_registry_that_is_away_is_said() -> None:
    """Devices and replicas are shown all the same."""
    text = shown(snapshot(replica("app#model#abc12345")) | {"models": None})
    assert "the model registry is away" in text
    assert row_of(text, "abc12345")


def test_replica_that_is_not_live_shows_its_state() -> None:
    """While a replica starts or leaves, that is its status, not a pressure."""
    text = shown(snapshot(replica("a", state="STARTING", pressure="NORMAL", start_bytes=512 << 20)))
    assert row_of(text, "a")[1] == "STARTING"
    assert "waits" not in text


def test_replica_that_drains_says_so() -> None:
    """Whatever its pressure."""
    drains = [{"replica": "app#model#abc12345"}]
    text = shown(snapshot(replica("app#model#abc12345"), replica("app#model#b")) | {"drains": drains})
    assert (row_of(text, "abc12345")[1], row_of(text, "b")[1]) == ("DRAINING", "NORMAL")


def test_replica_that_waits_to_start_says_for_what() -> None:
    """Its status, and below the table what the start takes and what its lease holds of that."""
    text = shown(snapshot(replica("app#model#abc12345", state="STARTING", start_bytes=700 << 20)))
    assert row_of(text, "abc12345")[1] == "WAITING"
    assert "abc12345 waits to start: it takes 700Mi of the budget, and has 512Mi" in text


def test_headline_sums_up() -> None:
    """The first line counts replicas, dead engines and requests, and names the bounds, a missing one in words."""
    first = shown(snapshot(replica("a"), replica("b"))).splitlines()[0]
    assert first.startswith("nodes 1, devices 1, replicas 2, dead 6; requests running 4, waiting 6;")
    assert first.endswith("tokens a step 512, active unbound")


def test_cluster_without_reports_says_so() -> None:
    """Nothing reported, and a device that fell silent, are said in words instead of empty tables."""
    empty = snapshot() | {"nodes": [], "absent_devices": [{"node": NODE, "device": "cpu", "report_age_s": 7.25}]}
    text = shown(empty)
    assert "no memory agent has reported within 3 s" in text
    assert f"{NODE[:8]} cpu: no report for 7.2 s, counted as absent" in text


def test_eighty_columns_cut_no_number() -> None:
    """On a terminal of 80 columns every cell of both tables is still there in full."""
    value = snapshot(replica("app#model#abc12345", model="m"))
    narrow, wide = shown(value, width=80), shown(value)
    for start in (NODE[:8], "abc12345"):
        assert row_of(narrow, start) == row_of(wide, start)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0B"), (1023, "1023B"), (1024, "1.00Ki"), (1536 << 10, "1.50Mi"), (10 << 20, "10.0Mi"),
        (500 << 30, "500Gi"), (3 << 50, "3072Ti"),
    ],
)  # fmt: skip
def test_bytes_are_readable(value: int, text: str) -> None:
    """Sizes keep about three significant figures and the largest fitting unit."""
    assert format_bytes(value) == text
