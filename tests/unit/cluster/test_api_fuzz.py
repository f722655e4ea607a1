"""The whole API of an ingress, before played replicas, asked at random: by its own description, and by headers and
values that make no sense. Nothing that a client sends is an error of ours (5xx), hangs, or leaves something behind."""

import asyncio
import ctypes
import gc
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.core.errors import InvalidSchema

from cluster.config import SloClass
from cluster.door import Door
from tests.unit.cluster.fake_replicas import Step
from tests.unit.cluster.vllm_front import MODEL, Front, VllmServer, small_checkpoint

CLASSES = [SloClass(), SloClass(name="batch")]
ANSWER: list[Step] = [5, "finish"]
DEADLINE_S = 30.0
QUIET = settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
CASES = 25
"""Of each operation."""
RIGHT = {"model": MODEL, "max_tokens": 2, "max_output_tokens": 2, "prompt": "w3", "input": "w3"} | {
    "messages": [{"role": "user", "content": "w3"}]
}
ODD_BYTES = [
    b"", b"", b"0", b"-", b"9" * 20, b"1e400", b"NaN", b'"', b"\\", b"\\ud800", b"\x00", b"\xff", b"{}", b"[", b"]",
    b"}", b",", b":", b"null", b"true", b'"n": "9", ', b'"a": [[]], ', "ä😀".encode(), b"\xed\xa0\x80",
]  # fmt: skip
SLACK_BYTES, BYTES_A_REQUEST = 24 << 20, 256
"""Memory that allocators and caches may take after the first third of the requests."""
SLO_HEADERS = (
    "x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-tenant-id", "x-session-id", "x-request-id", "idempotency-key"
)  # fmt: skip

pytestmark = pytest.mark.asyncio(loop_scope="module")


class _Endless(list[Any]):
    """Scripts without end, each the same."""

    def __getitem__(self, at: Any) -> Any:
        return ANSWER


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Front]:
    server = VllmServer(small_checkpoint(tmp_path_factory.mktemp("words")))
    await server.open()
    async with server.front([], CLASSES, Door()) as front:
        front.handle.scripts = _Endless()
        yield front
        assert front.core.in_flight == 0, "every request has ended"
    await server.close()


async def ask(api: Front, method: str, path: str, **content: Any) -> httpx.Response:
    api.handle.calls.clear()
    transport = httpx.ASGITransport(api.api, raise_app_exceptions=False)
    async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient(transport=transport, base_url="http://api") as http:
        return await http.request(method, path, **content)


values = st.one_of(
    st.binary(max_size=40),
    st.floats().map(lambda number: repr(number).encode()),
    st.sampled_from(
        [b"batch", b"default", b"standard", b"1e400", b"-0", b"\xff", b"a" * 5000, "ä".encode(), b"1_000", b" 5 "]
    ),
)


@QUIET
@given(st.lists(st.tuples(st.sampled_from(SLO_HEADERS), values), max_size=6))
async def test_no_headers_break_a_request(api: Front, headers: list[tuple[str, bytes]]) -> None:
    """Classes, targets, tenants, sessions and ids of any bytes, also twice: an answer, or what is wrong with them."""
    body = {"model": MODEL, "prompt": "w3", "max_tokens": 1}
    shown = [(name.encode(), value) for name, value in headers]
    answer = await ask(api, "POST", "/v1/completions", json=body, headers=shown)
    assert answer.status_code in (200, 400), answer.text
    assert ("choices" if answer.status_code == 200 else "error") in answer.json()


@pytest.mark.parametrize("logprobs", [True, 1, 5])
async def test_log_probabilities_are_played_too(api: Front, logprobs: int) -> None:
    """So that fuzzing asks for them."""
    body = RIGHT | {"logprobs": logprobs}
    answer = await ask(api, "POST", "/v1/completions", json=body)
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"] == [-1.0]
    answer = await ask(api, "POST", "/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 2})
    assert answer.json()["choices"][0]["logprobs"]["content"][0]["logprob"] == -1.0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = """
    prompt messages n best_of max_tokens temperature top_p stop stream stream_options logprobs top_logprobs seed user
    echo suffix logit_bias min_tokens ignore_eos tools tool_choice response_format cache_salt priority prompt_logprobs
    use_beam_search structured_outputs kv_transfer_params vllm_xargs bad_words input max_output_tokens model
""".split()  # noqa: SIM905


@QUIET
@given(
    st.sampled_from(
        ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/invocations"]
    ),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5),
)
async def test_no_values_break_a_request(api: Front, path: str, wrong: dict[str, Any]) -> None:
    """Values of any kind in the fields that the API knows, beside a request that is right."""
    try:
        answer = await ask(api, "POST", path, json=RIGHT | wrong)
    except ValueError:  # what is no JSON (NaN) is not sent
        return
    assert answer.status_code < 500, f"{path} {wrong}: {answer.text}"


@QUIET
@given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "", "multipart/form-data"]))
async def test_no_bytes_break_a_request(api: Front, body: bytes, kind: str) -> None:
    """Bodies that are nothing at all, to our routes and vLLM's."""
    for method, path in (("POST", "/v1/chat/completions"), ("POST", "/ellm/models"), ("PATCH", "/ellm/models/m")):
        answer = await ask(api, method, path, content=body, headers={"content-type": kind})
        assert 400 <= answer.status_code < 500 or _is_deliberate(answer), answer.text


@pytest.mark.slow
async def test_the_api_keeps_to_its_own_description(api: Front, pytestconfig: pytest.Config) -> None:
    """Requests that are made from vLLM's OpenAPI document, right and wrong ones, then others like them: no error of
    ours, no hang, and no more memory after many than after a few."""
    wanted: int = pytestconfig.getoption("fuzz_requests")
    document = (await ask(api, "GET", "/openapi.json")).json()
    cases = [case for found in schemathesis.openapi.from_dict(document).get_all_operations() for case in _drawn(found)]
    assert len({case["path"] for case in cases}) > 10
    statuses, broken, warm_at, warm_bytes, sent = Counter[int](), list[str](), wanted // 3, 0, 0
    for request in itertools.islice(itertools.chain(cases, _like(cases, random.Random(0))), max(wanted, len(cases))):
        try:
            answer = await ask(api, **request)
        except (TypeError, ValueError, httpx.InvalidURL):  # cannot be put into a request
            continue
        sent += 1
        statuses[int(answer.status_code)] += 1
        if answer.status_code >= 500 and not _is_deliberate(answer):
            broken.append(f"{request}: {answer.status_code} {answer.text[:300]}")
        if sent == warm_at:
            warm_bytes = _resident_bytes()
    grown = _resident_bytes() - warm_bytes
    print(  # noqa: T201  # what `make fuzz` is run for
        f"\n{sent} requests, answers {dict(sorted(statuses.items()))}; {warm_bytes >> 20} MiB resident after {warm_at} "
        f"requests, {grown / 2**20:+.1f} MiB since"
    )
    assert not broken, f"{len(broken)} such as\n" + "\n".join(broken[:10])
    assert statuses[200] > sent // 20, "some make sense"
    assert grown < SLACK_BYTES + BYTES_A_REQUEST * (sent - warm_at)


def _drawn(found: Any) -> list[dict[str, Any]]:
    """Requests of an operation. Sent afterwards: hypothesis runs no coroutine inside a loop that runs."""
    requests: list[dict[str, Any]] = []
    try:
        strategy = found.ok().as_strategy()
    except InvalidSchema:
        return []

    @settings(QUIET, max_examples=CASES)
    @given(strategy)
    def draw(case: Any) -> None:
        request = _sendable(case.as_transport_kwargs(base_url="http://api"))
        if isinstance(request.get("json"), dict):
            request["json"].pop(
                "use_beam_search", None
            )  # it needs log probabilities, which played replicas do not send
        requests.append(request)

    draw()
    return requests


def _like(cases: list[dict[str, Any]], dice: random.Random) -> Iterator[dict[str, Any]]:
    """Without end: requests with fields of others, headers of any kind, and bytes of their bodies changed."""
    bodies = [case["json"] for case in cases if case.get("json") and isinstance(case["json"], dict)]
    while True:
        request = dict(dice.choice(cases))
        body = request.pop("json", None)
        headers = httpx.Headers(request.get("headers"))
        for _ in range(dice.choice([0, 0, 1, 3])):
            headers[dice.choice(SLO_HEADERS)] = dice.choice(["batch", "standard", "1e400", "-0", "nan", "5", "a" * 300])
        if isinstance(body, dict):
            body = dice.choice([body, RIGHT | body, body | RIGHT, RIGHT])
            for _ in range(dice.choice([0, 1, 1, 3])):
                other = dice.choice(bodies)
                name = dice.choice(sorted(other))
                body = body | {name: other[name]}
            content = bytearray(json.dumps(body).encode())
            for _ in range(dice.choice([0, 0, 0, 1, 3])):
                at = dice.randint(0, len(content))
                content[at : at + dice.choice([0, 1, 8])] = dice.choice(ODD_BYTES)
            headers["content-type"] = "application/json"
            request["content"] = bytes(content)
        yield request | {"headers": headers}


def _resident_bytes() -> int:
    """Of this process, without what only waits to be collected or given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _sendable(request: dict[str, Any]) -> dict[str, Any]:
    known = {"method", "url", "params", "headers", "json", "content", "data"}
    kept = {name: value for name, value in request.items() if name in known and value is not None}
    kept["path"] = kept.pop("url")
    if isinstance(kept.get("data"), bytes):
        kept["content"] = kept.pop("data")
    return kept


def _is_deliberate(answer: httpx.Response) -> bool:
    """Ours, told with a reason: no controller or registry runs beside these tests."""
    return answer.status_code == 503 and "error" in answer.json()
