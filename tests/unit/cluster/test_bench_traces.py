"""Reading traces: times, lengths and prefix reuse arrive in the requests; what does not fit is named by its line."""

import json
from pathlib import Path

import pytest

from cluster.bench.errors import BenchError
from cluster.bench.traces import BLOCK_TOKENS, Fit, TraceRow, read_trace, trace_workload

TRACES = Path(__file__).resolve().parents[4] / "shared" / "data" / "traces"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def written(folder: Path, text: str) -> Path:
    file = folder / "trace"
    file.write_text(text)
    return file


def mooncake(*rows: tuple[int, int, int, list[int]]) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


def test_azure_times_are_relative_to_the_first_request(tmp_path: Path) -> None:
    """Seven digits of a second, across midnight; blank lines are nothing."""
    text = AZURE + "2023-11-16 23:59:59.5000000,374,44\r\n\r\n2023-11-17 00:00:01.2500000,396,109\r\n"
    assert read_trace(written(tmp_path, text)) == [TraceRow(0.0, 374, 44), TraceRow(1.75, 396, 109)]


def test_azure_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    """The heading decides; zones are read, and other columns are left alone."""
    text = "GeneratedTokens,id,ContextTokens,TIMESTAMP\n7,x,9,2024-05-10 00:00:00.5+00:00\n"
    assert read_trace(written(tmp_path, text)) == [TraceRow(0.0, 9, 7)]


def test_mooncake_times_are_milliseconds(tmp_path: Path) -> None:
    """And the block ids come along."""
    rows = read_trace(written(tmp_path, mooncake((3000, 600, 5, [0, 1]), (4500, 10, 6, [0]))))
    assert rows == [TraceRow(0.0, 600, 5, (0, 1)), TraceRow(1.5, 10, 6, (0,))]


def test_equal_block_ids_give_equal_tokens_and_others_other_ones() -> None:
    """Two prompts that share their first two ids share exactly their first 1,024 tokens."""
    rows = [TraceRow(0, 1300, 1, (4, 5, 6)), TraceRow(1, 1536, 1, (4, 5, 7)), TraceRow(2, 1100, 1, (4, 5, 6))]
    one, two, three = (request.prompt.tolist() for request in trace_workload(rows).requests)
    shared = 2 * BLOCK_TOKENS
    assert one[:shared] == two[:shared]
    assert not any(a == b for a, b in zip(one[shared : shared + 20], two[shared:], strict=False))
    assert three == one[:1100]
    assert (len(one), len(two)) == (1300, 1536)


def test_requests_without_block_ids_share_nothing() -> None:
    """Azure's trace says nothing of reuse, so none is made up."""
    one, two = (
        request.prompt.tolist() for request in trace_workload([TraceRow(0, 64, 1), TraceRow(1, 64, 1)]).requests
    )
    assert one[0] != two[0]
    assert one != two


def test_clipping_cuts_long_requests_and_says_which() -> None:
    """The beginning of a prompt stays, so that reuse stays; a request that fits is untouched."""
    rows = [TraceRow(0, 600, 9, (1, 2)), TraceRow(1, 80, 3, (1,)), TraceRow(2, 50, 40, (3,))]
    whole = trace_workload(rows).requests
    cut = trace_workload(rows, max_input_len=100, max_output_len=10).requests
    assert [(len(request.prompt), request.output_len) for request in cut] == [(100, 9), (80, 3), (50, 10)]
    assert [request.clipped for request in cut] == [True, False, True]
    assert cut[0].prompt.tolist() == whole[0].prompt.tolist()[:100]


def test_scaling_shrinks_all_by_one_factor_and_keeps_the_reuse() -> None:
    """The longest just fits; the share of a prompt that is shared stays what it was."""
    rows = [TraceRow(0, 2048, 100, (1, 2, 3, 4)), TraceRow(1, 1024, 50, (1, 2)), TraceRow(2, 1024, 1, (1, 9))]
    one, two, three = trace_workload(rows, max_input_len=256, max_output_len=20, fit=Fit.SCALE).requests
    assert [(len(request.prompt), request.output_len) for request in (one, two, three)] == [
        (256, 20),
        (128, 10),
        (128, 1),
    ]
    assert one.prompt.tolist()[:128] == two.prompt.tolist()
    assert three.prompt.tolist()[:64] == two.prompt.tolist()[:64]
    assert three.prompt.tolist()[64:70] != two.prompt.tolist()[64:70]


def test_the_limit_reads_no_further(tmp_path: Path) -> None:
    """A bad line behind the limit does not matter."""
    text = AZURE + "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:47,374,44\nrubbish\n"
    assert len(read_trace(written(tmp_path, text), limit=2)) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (AZURE + "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:47,many,44\n", "line 3: .*many"),
        (AZURE + "yesterday,374,44\n", "line 2: .*yesterday"),
        (AZURE + "2023-11-16 18:15:46,374\n", "line 2: 2 cells instead of 3"),
        (AZURE + "2023-11-16 18:15:46,0,44\n", "line 2: a length of 0"),
        (AZURE + "2023-11-16 18:15:46,1,4\n2023-11-16 18:15:45,1,4\n", "line 3: .*sort"),
        (AZURE, "holds no requests"),
        ("", "line 1: no column"),
        ("when,in,out\n1,2,3\n", "line 1: no column TIMESTAMP, ContextTokens, GeneratedTokens; .*when,in,out"),
        (mooncake((0, 5, 5, [1])) + "{oops\n", "line 2: "),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": [1]}\n', "line 1: .*output_length"),
        (mooncake((0, 5, 5, [1]), (0, 600, 5, [1])), "line 2: 1 hash_ids for 600 tokens, which are 2 blocks"),
        (mooncake((0, 5, -1, [1])), "line 1: a length of -1"),
    ],
)
def test_what_does_not_fit_is_named_by_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    """The error says which line and what is wrong with it."""
    with pytest.raises(BenchError, match=complaint):
        read_trace(written(tmp_path, text))


def test_a_missing_file_and_bad_bounds_are_refused(tmp_path: Path) -> None:
    """Each with its name."""
    with pytest.raises(BenchError, match="no such trace"):
        read_trace(tmp_path / "none")
    with pytest.raises(BenchError, match="--limit 0"):
        read_trace(written(tmp_path, AZURE), limit=0)
    with pytest.raises(BenchError, match="--max-input-len 0"):
        trace_workload([TraceRow(0, 5, 5)], max_input_len=0)


@pytest.mark.parametrize(
    ("name", "count", "hours"), [("azure_2023_conv.csv", 19366, 0.97), ("mooncake_conversation.jsonl", 12031, 0.98)]
)
def test_the_published_traces_are_read_whole(name: str, count: int, hours: float) -> None:
    """Every line of the real files, about an hour each; their requests fit a small model after clipping."""
    file = TRACES / name
    if not file.exists():
        pytest.skip(f"{name} is not at hand")
    rows = read_trace(file)
    assert len(rows) == count
    assert rows[-1].arrival_s / 3600 == pytest.approx(hours, abs=0.03)
    requests = trace_workload(rows[:300], max_input_len=512, max_output_len=64).requests
    assert all(1 <= len(one.prompt) <= 512 and 1 <= one.output_len <= 64 for one in requests)
