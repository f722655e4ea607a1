"""The API with keys: who gets in where, for how much, as whom; and what another tenant can find out."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from cluster.api_key import Scope, new_key
from cluster.api_routes import API_ROUTES
from cluster.auth_layer import scopes_for
from cluster.config import HttpLimits, SloClass
from cluster.door import Door
from cluster.key_file import changing
from cluster.key_ring import KeyRing
from cluster.prompt_prefix import PREFIX_TOKENS, prefix_ids
from replicas.hop import HopCodec
from tests.unit.cluster.fake_replicas import Step, died
from tests.unit.cluster.vllm_front import MODEL, Front, VllmServer

CLASSES = [SloClass(name="chat"), SloClass(name="batch"), SloClass(name="gold")]
BODY = {"model": MODEL, "prompt": "w3 w4", "max_tokens": 2}
Open = Callable[..., AbstractAsyncContextManager[Front]]
ANSWER: list[Step] = [5, "finish"]

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Keys:
    """A keys file, and the texts of its keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[str, str] = {}

    def add(self, name: str, **fields: Any) -> str:
        text, key = new_key(**({"tenant": name} | fields))
        with changing(self.path) as keys:
            keys.append(key)
        self.texts[name] = text
        return text

    def ring(self) -> KeyRing:
        return KeyRing(self.path, [one.name for one in CLASSES])


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.yaml")


@pytest.fixture
def front(server: VllmServer, keys: Keys) -> Open:
    def opened(answers: int = 1, limits: HttpLimits | None = None) -> AbstractAsyncContextManager[Front]:
        return server.front([ANSWER] * answers, CLASSES, Door(), keys.ring(), limits)

    return opened


def shown(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def requests_of(api: Front) -> list[EngineCoreRequest]:
    """What the replicas were asked."""
    return [HopCodec().decode_request(call.frames) for call in api.handle.calls]


async def ask(api: Front, key: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await api.http.post("/v1/completions", json=BODY | body, headers=shown(key) | (headers or {}))


def is_refused(answer: httpx.Response, status: int) -> bool:
    """By us, in OpenAI's form."""
    return answer.status_code == status and set(answer.json()["error"]) >= {"message", "type", "param", "code"}


async def test_without_a_key_nothing_but_probes_and_the_page_is_answered(front: Open, keys: Keys) -> None:
    """No route of vLLM's or ours lets a stranger in, whatever the method; /health and /ping are for probes, and the
    files of the live page hold nothing of the cluster."""
    keys.add("acme")
    async with front() as api:
        for route in {route.path.replace("{name}", "m").replace("{response_id}", "r") for route in API_ROUTES}:
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
                answer = await api.http.request(method, route)
                page = route.startswith("/ui") and method in ("GET", "HEAD")
                if page or route in ("/health", "/ping"):
                    assert answer.status_code != 401
                else:
                    assert (route, method, answer.status_code) == (route, method, 401)
                    assert answer.headers["www-authenticate"] == "Bearer"
        for path in (
            "//ellm/status",
            "/ELLM/status",
            "/ellm//models",
            "/health/",
            "/health/../ellm/status",
            "/ui/../ellm/status",
            "/ui//ellm/status",
            "/uix",
            "/%65llm/status",
        ):
            assert is_refused(await api.http.get(path), 401), path
        assert not api.handle.calls


@pytest.mark.parametrize("path", ["/metricsx", "/metrics%0A", "/load%0A", "/ellm/status%0A", "/v1/completions%0A"])
async def test_no_spelling_of_a_path_widens_a_key(front: Open, keys: Keys, path: str) -> None:
    """What is routed as another path, or answered like one, takes the scope of that one."""
    key = keys.add("acme")
    async with front() as api:
        for method in ("GET", "POST"):
            answer = await api.http.request(method, path, headers={"authorization": f"Bearer {key}"}, json=BODY)
            assert answer.status_code in (403, 404), method
        assert not api.handle.calls


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
async def test_a_key_lets_in(front: Open, keys: Keys, header: str) -> None:
    """As OpenAI's clients show it, and as Anthropic's do."""
    key = keys.add("acme")
    async with front() as api:
        value = key if header == "x-api-key" else f"bearer  {key}"
        answer = await api.http.post("/v1/completions", json=BODY, headers={header: value})
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, " w5")


async def test_what_is_no_key_does_not(front: Open, keys: Keys) -> None:
    """Other schemes, cut keys, two in one header, another's id with an own secret."""
    key, other = keys.add("acme"), keys.add("beta")
    mixed = "_".join([*key.split("_", 2)[:2], other.split("_", 2)[2]])
    async with front() as api:
        for value in (key, f"Basic {key}", f"Bearer {key[:-1]}", f"Bearer {key},{other}", "Bearer", f"Bearer {mixed}"):
            answer = await api.http.post("/v1/completions", json=BODY, headers={"authorization": value})
            assert is_refused(answer, 401)
        headers = {"authorization": "Basic eDp5", "x-api-key": key}
        assert (await api.http.post("/v1/completions", json=BODY, headers=headers)).status_code == 401


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
async def test_no_header_lets_in_or_breaks(front: Open, keys: Keys, value: bytes) -> None:
    """Any bytes as credentials are 401, no error of ours."""
    if not keys.texts:
        keys.add("acme")
    async with front() as api:
        for name in (b"authorization", b"x-api-key"):
            for prefix in (b"", b"Bearer "):
                answer = await api.http.get("/ellm/status", headers=[(name, prefix + value)])
                assert answer.status_code == 401


async def test_scopes_divide_the_api(front: Open, keys: Keys) -> None:
    """A key for inference is told 403 by everything under /ellm and by metrics; one for metrics and one for admins by
    inference. The refusal names what is missing."""
    by_scope = {scope: keys.add(scope, scopes=[scope]) for scope in Scope}
    async with front() as api:

        async def status(scope: Scope, path: str, method: str = "GET") -> int:
            return (await api.http.request(method, path, headers=shown(by_scope[scope]))).status_code

        for path, method in (
            ("/ellm/models", "POST"), ("/ellm/models/m", "DELETE"), ("/ellm/models/m", "PATCH"),
            ("/ellm/decisions", "GET"), ("/ellm/status", "GET"), ("/ellm/anything-new", "POST"),
        ):  # fmt: skip
            assert await status(Scope.INFERENCE, path, method) == 403
            assert await status(Scope.METRICS, path, method) == 403
        assert [await status(scope, "/metrics") for scope in Scope] == [403, 200, 200]
        assert [await status(scope, "/v1/models") for scope in Scope] == [200, 403, 403]
        refusal = await api.http.get("/ellm/status", headers=shown(by_scope[Scope.INFERENCE]))
        assert "this takes admin" in refusal.json()["error"]["message"]
    assert scopes_for("/ellmo") == (Scope.INFERENCE,)


async def test_beyond_its_requests_a_key_is_told_when_to_come(front: Open, keys: Keys) -> None:
    """429 with Retry-After in whole seconds; another key of the same tenant is not concerned, nor is reading."""
    key, other = keys.add("acme", requests_per_min=2), keys.add("acme2", tenant="acme")
    async with front(3) as api:
        assert [(await ask(api, key)).status_code for _ in range(2)] == [200, 200]
        refused = await ask(api, key)
        assert is_refused(refused, 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert "2 requests a minute" in refused.json()["error"]["message"]
        assert (await api.http.get("/v1/models", headers=shown(key))).status_code == 200
        assert (await ask(api, other)).status_code == 200
        assert len(api.handle.calls) == 3


async def test_tokens_are_counted_as_they_are_computed(front: Open, keys: Keys) -> None:
    """Prompts and answers, of refused requests too where something was computed; 429 names tokens."""
    key = keys.add("acme", tokens_per_min=4)
    async with front(2) as api:
        assert (await ask(api, key)).status_code == 200  # two and one
        assert (await ask(api, key)).status_code == 200
        refused = await ask(api, key)
        assert is_refused(refused, 429)
        assert "4 tokens a minute" in refused.json()["error"]["message"]


async def test_classes_come_from_the_key(front: Open, keys: Keys) -> None:
    """A request without a class has its key's; one that names a class its key is not for is refused with 403."""
    key = keys.add("acme", slo_classes=["batch", "chat"])
    fixed, free = keys.add("beta", slo_class="gold", slo_classes=["gold"]), keys.add("gamma")
    async with front(5) as api:
        for headers, name in (
            ({}, fixed),
            ({}, key),
            ({"x-slo-class": "chat"}, key),
            ({"x-slo-class": "gold"}, free),
            ({}, free),
        ):
            assert (await ask(api, name, headers)).status_code == 200
        refused = await ask(api, key, {"x-slo-class": "gold"})
        assert is_refused(refused, 403)
        assert "but for batch, chat" in refused.json()["error"]["message"]
        assert (await ask(api, free, {"x-slo-class": "silver"})).status_code == 400
        account = api.ledger.account(MODEL)
        assert {name: tally.counted for name, tally in account.by_class.items()} == {"gold": 2, "batch": 1, "chat": 2}


async def test_nobody_speaks_for_another_tenant(front: Open, keys: Keys) -> None:
    """Neither x-tenant-id nor the body's user changes whose turn a request takes, whose cache it uses, or whose session
    it goes on with."""
    mine, theirs = keys.add("mine"), keys.add("theirs")
    async with front(4) as api:
        await ask(api, theirs, {"x-session-id": "s"})
        await ask(api, mine, {"x-tenant-id": "theirs", "x-session-id": "s"}, user="theirs")
        await ask(api, mine, {"x-tenant-id": "theirs"}, cache_salt="theirs")
        await ask(api, mine)
        victim, *attempts = requests_of(api)
        assert victim.cache_salt not in {attempt.cache_salt for attempt in attempts}
        assert attempts[0].cache_salt == attempts[2].cache_salt != attempts[1].cache_salt
        sessions = [call.route.request.session for call in api.handle.calls]
        assert sessions == [("theirs", "s"), ("mine", "s"), None, None]


async def test_nobody_gets_another_tenants_answer(front: Open, keys: Keys) -> None:
    """With the other one's Idempotency-Key and the very same request a tenant's answer is computed; two keys of one
    tenant find the same one."""
    mine, theirs, also_mine = keys.add("mine"), keys.add("theirs"), keys.add("mine")
    async with front(3) as api:
        for key, computed in ((theirs, 1), (mine, 2), (also_mine, 2), (theirs, 2)):
            answer = await ask(api, key, {"idempotency-key": "k", "x-tenant-id": "theirs"}, user="theirs")
            assert (answer.status_code, len(api.handle.calls)) == (200, computed)


async def test_no_salt_of_a_tenant_leads_to_anothers_cache(front: Open, keys: Keys) -> None:
    """With the very salts that other requests have used in the engine, told as its own, a tenant still gets other
    hashes: vLLM's, by which device and host buffer find KV, and the router's. Its own requests share theirs."""
    init_none_hash(_digest)
    hasher = get_request_block_hasher(16, _digest)
    mine, theirs = keys.add("mine"), keys.add("theirs")
    prompt = [3] * 127
    async with front(6) as api:
        await ask(api, theirs, prompt=prompt, max_tokens=1)
        await ask(api, theirs, prompt=prompt, max_tokens=1, cache_salt="theirs")
        known = [request.cache_salt for request in requests_of(api)]
        for salt in (*known, json.dumps(["theirs", None]), "theirs"):
            await ask(api, mine, prompt=prompt, max_tokens=1, cache_salt=salt)
        asked = requests_of(api)
        hashes = [set(Request.from_engine_core_request(request, hasher).block_hashes) for request in asked]
        assert all(hashes)
        for attempt in hashes[2:]:
            assert not attempt & (hashes[0] | hashes[1])
        long = [request_with(request, [3] * 2 * PREFIX_TOKENS) for request in asked]
        assert all(not set(prefix_ids(one)) & set(prefix_ids(long[0])) for one in long[1:])
    async with front(2) as api:
        for _ in range(2):
            await ask(api, mine, prompt=prompt, max_tokens=1)
        one, two = (Request.from_engine_core_request(request, hasher).block_hashes for request in requests_of(api))
        assert one == two


async def test_prompts_and_keys_are_not_logged(front: Open, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    """Not of what is answered, nor of what is refused, nor of what fails."""
    key = keys.add("acme")
    secret = "w9 w9 w9 w9 w9"
    wrong: list[dict[str, Any]] = [
        {}, {"n": secret}, {"max_tokens": secret}, {"prompt": {"a": secret}}, {"temperature": -1}, {"logprobs": 999},
        {"guided_json": secret}, {"stream": True}, {"stop": [secret], "max_tokens": 100_000},
        {"response_format": secret},
    ]  # fmt: skip
    vllm = logging.getLogger("vllm")  # it does not pass on what it logs
    vllm.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO), ExitStack() as stack:
        stack.callback(vllm.removeHandler, caplog.handler)
        async with front(4) as api:
            api.handle.scripts[:] = [ANSWER, ANSWER, [died()], [died()], [died()], [died()]]
            for body in wrong:
                await ask(api, key, **({"prompt": secret} | body))
            await api.http.post("/v1/completions", content=f'{{"prompt": "{secret}"'.encode(), headers=shown(key))
            await api.http.post(
                "/v1/chat/completions", json={"model": MODEL, "messages": [{"role": secret}]}, headers=shown(key)
            )
            assert len(api.handle.calls) >= 4
    loggers = {record.name.partition(".")[0] for record in caplog.records}
    assert {"ray", "vllm"} <= loggers, "something is logged, so the test sees logs"
    said = caplog.text + repr([record.args for record in caplog.records])
    assert secret not in said
    assert not re.search(r"9(,\s*9){3}", said), "nor its tokens"
    assert key not in said


async def test_a_strangers_body_is_not_read(front: Open, keys: Keys) -> None:
    """The refusal comes before the body, however large it is."""
    keys.add("acme")
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            assert read < 1000
            yield b"x" * 1000

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [],
        "query_string": b"",
        "root_path": "",
    }
    sent: list[Any] = []
    body = endless()

    async def receive() -> Any:
        return {"type": "http.request", "body": await anext(body), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    async with front() as api:
        await api.api(scope, receive, send)
    assert (sent[0]["status"], read) == (401, 0)


async def test_no_websocket_is_let_in(front: Open, keys: Keys) -> None:
    """There is no way around by an upgrade."""
    keys.add("acme")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with front() as api:
        await api.api({"type": "websocket", "path": "/v1/realtime", "headers": []}, asyncio.Event().wait, send)  # type: ignore[arg-type]
    assert sent[0]["type"] == "websocket.close"


def request_with(request: EngineCoreRequest, prompt: list[int]) -> EngineCoreRequest:
    request.prompt_token_ids = prompt
    return request


def _digest(value: Any) -> bytes:
    from vllm.utils.hashing import sha256

    return sha256(value)
