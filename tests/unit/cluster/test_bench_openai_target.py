"""A real HTTP server as the target: what is sent to it, what is read from it, and how it can fail."""

from typing import Any

import pytest

from cluster.bench.arrivals import OpenLoop
from cluster.bench.errors import TargetError
from cluster.bench.load import run_load
from cluster.bench.openai_target import OpenAITarget, ServerOptions
from cluster.bench.report import LoadReport
from cluster.bench.workload import random_workload
from tests.unit.cluster.paced_server import PacedServer

WORK = random_workload(6, input_len=7, output_len=5)


async def measured(server: PacedServer, **options: Any) -> LoadReport:
    async with OpenAITarget(ServerOptions(server.url, **options)) as target:
        return await run_load(target, WORK, OpenLoop())


async def test_prompts_go_as_token_ids_and_counts_come_from_the_server() -> None:
    """The model is the server's first, every token is wanted, and usage says how many there were."""
    async with PacedServer(models=("one", "two")) as server:
        report = await measured(server, extra_body={"temperature": 0})
    assert [body["prompt"] for body in server.bodies[1:]] == [request.prompt.tolist() for request in WORK.requests]
    body = server.bodies[1]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == ("one", 5, True, 0)
    assert [(one.input_tokens, one.output_tokens, one.exact_tokens) for one in report.records] == [(7, 5, True)] * 6
    assert not report.warnings


async def test_a_server_without_token_ids_gets_words() -> None:
    """Equal ids are equal words; what the server made of them comes back as usage."""
    async with PacedServer(takes_ids=False) as server, OpenAITarget(ServerOptions(f"{server.url}/v1/")) as target:
        report = await run_load(target, WORK, OpenLoop())
        assert not target.takes_token_ids
        assert target.why_text == "status 400: prompt should be text"
    assert all(len(body["prompt"].split()) == 7 for body in server.bodies[1:])
    assert len({body["prompt"] for body in server.bodies[1:]}) == 6
    assert {record.input_tokens for record in report.records} == {7}


async def test_a_chats_first_token_is_not_the_announced_role() -> None:
    """The role comes at once, the first word 0.2 s later: TTFT is the word's, and there is a gap less than words."""
    async with PacedServer(first_s=0.2, gap_s=0.01, early_role=True) as server:
        report = await measured(server, chat=True, ignore_eos=False)
    assert server.bodies[1]["messages"][0]["role"] == "user"
    assert "ignore_eos" not in server.bodies[1]
    assert report.ttft.median_ms / report.itl.median_ms > 5
    assert {len(record.itls_s) for record in report.records} == {4}
    assert {record.output_tokens for record in report.records} == {5}


async def test_several_tokens_in_a_chunk_are_counted_by_usage() -> None:
    """Five tokens in three chunks: two gaps, and TPOT over four."""
    async with PacedServer(gap_s=0.04, tokens_per_chunk=2) as server:
        report = await measured(server)
    assert {(len(record.itls_s), record.output_tokens) for record in report.records} == {(2, 5)}
    assert report.itl.median_ms / report.tpot.median_ms == pytest.approx(2, rel=0.2)
    assert "1.67 tokens" in report.warnings[0]


async def test_without_usage_chunks_are_counted_and_that_is_said() -> None:
    """One token a chunk is a guess."""
    async with PacedServer(usage=False) as server:
        report = await measured(server)
    assert {(record.output_tokens, record.exact_tokens) for record in report.records} == {(5, False)}
    assert "6 answers came without a token count" in report.warnings[0]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"break_after": 2}, "the stream broke off without finish_reason or [DONE]"),
        ({"error_after": 2}, "the stream ended with an error: engine died"),
    ],
)
async def test_an_answer_that_is_not_complete_has_failed(fault: dict[str, int], reason: str) -> None:
    """Its tokens count nowhere, and the reason is in the report."""
    async with PacedServer(**fault) as server:  # type: ignore[arg-type]
        report = await measured(server)
    assert report.errors == {reason: 6}
    assert report.total_output_tokens == 0


async def test_a_request_beyond_its_time_has_failed() -> None:
    """The time limit is from sending to the last token. The first short request has one token and passes."""
    async with PacedServer(gap_s=5.0) as server:
        report = await measured(server, timeout_s=0.5)
    assert report.errors == {"no complete answer within 0.5 s": 6}


async def test_hundreds_of_streams_at_once_are_read_whole() -> None:
    """The server answers nothing until all are there: no pool of connections holds any back."""
    work = random_workload(300, input_len=3, output_len=4)
    async with PacedServer(together=300) as server, OpenAITarget(ServerOptions(server.url)) as target:
        report = await run_load(target, work, OpenLoop())
    assert (len(report.answered), report.max_concurrent_requests) == (300, 300)
    assert report.total_output_tokens == 1200


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model": "other"}, "does not serve 'other'; give --model one of: toy"),
        ({"api_key": "wrong"}, "refused the API key .*--api-key or OPENAI_API_KEY"),
    ],
)
async def test_what_the_server_does_not_have_is_refused_before_the_run(options: dict[str, str], complaint: str) -> None:
    """With what would fit."""
    async with PacedServer(key="right") as server:
        given: dict[str, Any] = {"api_key": "right"} | options
        with pytest.raises(TargetError, match=complaint):
            await measured(server, **given)
    assert server.bodies == []


@pytest.mark.parametrize(
    ("url", "complaint"),
    [("http://127.0.0.1:9", "no server answers at http://127.0.0.1:9 .*ellm serve"), ("127.0.0.1", "is no address")],
)
async def test_a_server_that_is_not_there_is_named(url: str, complaint: str) -> None:
    """With how to start or name one."""
    with pytest.raises(TargetError, match=complaint):
        async with OpenAITarget(ServerOptions(url)):
            pass


async def test_a_server_that_refuses_every_form_is_named_with_its_reason() -> None:
    """The first short request finds it out, so that no run of failures is started."""
    async with PacedServer(error_after=0) as server:
        with pytest.raises(TargetError, match=r"refused a first short request: .*engine died.*--no-ignore-eos"):
            await measured(server)
