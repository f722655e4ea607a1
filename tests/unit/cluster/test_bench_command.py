"""``ellm bench``: what it writes, what it refuses, and its exit status."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from tests.unit.cluster.paced_server import PacedServer


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, result.output


@contextmanager
def serving(**options: Any) -> Iterator[PacedServer]:
    """A server in a thread of its own: the command has an event loop of its own."""
    server, ready, stop = PacedServer(**options), threading.Event(), threading.Event()

    async def serve() -> None:
        async with server:
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield server
    finally:
        stop.set()
        thread.join()


def test_the_json_file_holds_settings_figures_and_records(tmp_path: Path) -> None:
    """And the table shows the figures."""
    file = tmp_path / "out.json"
    shape = ("--input-len", "8", "--output-len", "4", "--range-ratio", "0.5", "--prefix-len", "3", "--seed", "5")
    with serving(gap_s=0.002) as server:
        target = ("--base-url", server.url, "--json", str(file), "--records", "--goodput", "e2el:60000")
        code, text = bench(
            *target, *shape, "-n", "9", "--warmup", "2", "--request-rate", "50", "--percentiles", "50,99"
        )
    assert code == 0, text
    assert "TPOT" in text
    tree = json.loads(file.read_text())
    assert (tree["completed"], tree["failed"], tree["attainment"]) == (9, 0, 1.0)
    assert [record["index"] for record in tree["records"]] == list(range(2, 11))
    assert tree["total_output_tokens"] == sum(record["output_tokens"] for record in tree["records"])
    assert tree["settings"]["arrivals"] == {"kind": "OpenLoop", "rate": 50, "burstiness": 1}
    assert tree["settings"]["target"]["model"] == "toy"
    assert {"p50_ttft_ms", "p99_e2el_ms", "p99_schedule_lag_ms"} <= set(tree)
    assert len(server.bodies) == 1 + 2 + 9
    assert len({tuple(body["prompt"][:3]) for body in server.bodies[1:]}) == 1


def test_json_is_all_that_is_printed_where_it_is_asked_for() -> None:
    """`--json -` prints what a file would hold, and no table beside it."""
    with serving() as server:
        shape = ["--input-len", "8", "--output-len", "4", "-n", "3"]
        result = CliRunner().invoke(app, ["bench", "--base-url", server.url, *shape, "--json", "-"])
    assert (result.exit_code, json.loads(result.stdout)["completed"]) == (0, 3)


def test_a_trace_is_replayed_at_its_own_times(tmp_path: Path) -> None:
    """Faster by the scale; the requests that were clipped are named."""
    trace, file = tmp_path / "azure.csv", tmp_path / "out.json"
    rows = "".join(f"2023-11-16 18:15:{20 + 2 * i}.0000000,{10 + 90 * (i == 2)},3\n" for i in range(4))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    with serving() as server:
        options = ("--trace", str(trace), "--time-scale", "20", "--max-input-len", "32", "--limit", "3")
        code, text = bench("--base-url", server.url, *options, "--json", str(file), "--records")
    assert code == 0, text
    tree = json.loads(file.read_text())
    assert [record["due_s"] for record in tree["records"]] == pytest.approx([0, 0.1, 0.2])
    assert tree["clipped_requests"] == [2]
    assert "1 of 3 requests are shorter than in the trace: 2" in text


def test_the_exit_status_is_one_when_no_request_was_answered(tmp_path: Path) -> None:
    """The figures are written all the same, with the reason. A server that dies after its first answers does this."""
    file = tmp_path / "out.json"
    with serving(break_after=1) as server:
        code, text = bench("--base-url", server.url, "-n", "3", "--output-len", "4", "--json", str(file))
    assert code == 1
    assert "3 failed: the stream broke off" in text
    tree = json.loads(file.read_text())
    assert tree["median_ttft_ms"] is None
    assert tree["settings"]["arrivals"]["rate"] == "inf"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--base-url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        (("--limit", "5"), "--limit belongs to a trace"),
        (("--trace", "none.csv", "-n", "5"), "--num-requests belongs to random prompts"),
        (("--trace", "none.csv"), "no such trace: none.csv"),
        (("--concurrency", "4", "--request-rate", "2"), "--request-rate belongs to an open loop"),
        (("--burstiness", "2"), "--burstiness needs a finite --request-rate"),
        (("--request-rate", "0"), "--request-rate 0 does not fit"),
        (("-n", "0"), "--num-requests 0 is too small"),
        (("--warmup", "-1"), "--warmup -1 does not fit"),
        (("--records",), "--records needs a place"),
        (("--json", "/nowhere/out.json"), "cannot write /nowhere/out.json"),
        (("--extra-body", "[1]"), "--extra-body should be a JSON object"),
        (("--extra-body", "{"), "--extra-body is not JSON"),
        (("--goodput", "ttft"), "--goodput 'ttft' does not fit"),
        (("--percentiles", "500"), "--percentiles '500' does not fit"),
        (("--input-len", "0"), "a prompt would be empty"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(arguments: tuple[str, ...], complaint: str) -> None:
    """Exit status 1, one error, no traceback."""
    code, text = bench(*arguments)
    assert code == 1
    assert text.startswith("error: ")
    assert complaint in text
