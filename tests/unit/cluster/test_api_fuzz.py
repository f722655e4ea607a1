"""The whole API of an ingress, before played replicas, asked at random: by its own description, and by headers and
values that make no sense. Nothing that a client sends is an error of ours (5xx), hangs, or leaves something behind."""

import asyncio
from collections.abc import AsyncIterator
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
SLO_HEADERS = ("x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-tenant-id", "x-session-id", "x-request-id")

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
    right = {"model": MODEL, "max_tokens": 2, "max_output_tokens": 2}
    right |= {"prompt": "w3", "input": "w3", "messages": [{"role": "user", "content": "w3"}]}
    try:
        answer = await ask(api, "POST", path, json=right | wrong)
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
async def test_the_api_keeps_to_its_own_description(api: Front) -> None:
    """Requests that are made from vLLM's OpenAPI document, right and wrong ones."""
    document = (await ask(api, "GET", "/openapi.json")).json()
    schema = schemathesis.openapi.from_dict(document)
    broken: list[str] = []
    for found in schema.get_all_operations():
        try:
            operation = found.ok()
        except InvalidSchema:
            continue
        for case in _drawn(operation.as_strategy()):
            request = case.as_transport_kwargs(base_url="http://api")
            if isinstance(body := request.get("json"), dict) and body.get("use_beam_search"):
                continue  # it needs log probabilities, which played replicas do not send
            try:
                answer = await ask(api, **_sendable(request))
            except (TypeError, ValueError, httpx.InvalidURL):  # cannot be put into a request
                continue
            if answer.status_code >= 500 and not _is_deliberate(answer):
                broken.append(f"{request}: {answer.status_code} {answer.text[:300]}")
    assert not broken, "\n".join(broken[:10])


def _drawn(strategy: st.SearchStrategy[Any]) -> list[Any]:
    """Cases of an operation. Sent afterwards: hypothesis runs no coroutine inside a loop that runs."""
    cases: list[Any] = []

    @settings(QUIET, max_examples=60)
    @given(strategy)
    def draw(case: Any) -> None:
        cases.append(case)

    draw()
    return cases


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
