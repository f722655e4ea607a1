"""Bodies that cost more than they should: too long, too deep, too many answers, too much at once; and odd ones."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.renderers.inputs.preprocess import prompt_to_seq

from cluster import body_limits
from cluster.body_limits import CONTAINERS_MOST, NESTED_MOST, BodyLimits
from cluster.config import HttpLimits

DEADLINE_S = 30.0
MOST = 8
"""Answers that a request may ask for, here."""
COMPLETIONS, CHAT, BATCH = "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch"


async def _echo(request: Request) -> Response:
    return Response(await request.body())


def api(limits: HttpLimits | None = None, app: Callable[[Request], Awaitable[Response]] = _echo) -> httpx.AsyncClient:
    return client_of(Starlette(routes=[Route(COMPLETIONS, app, methods=["POST"])]), limits or HttpLimits())


def client_of(app: ASGIApp, limits: HttpLimits | None) -> httpx.AsyncClient:
    guarded = app if limits is None else BodyLimits(app, limits.max_body_bytes, limits.max_sequences)
    transport = httpx.ASGITransport(guarded, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://api")


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_beyond_the_bound_is_413(announced: bool) -> None:
    """Whether its length is announced or not; one that just fits passes unchanged."""

    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        for at in range(0, len(body), 256):
            yield body[at : at + 256]

    async with api(HttpLimits(max_body_bytes=2048)) as http:
        for size, status in ((2048, 200), (2304, 413)):
            body = b"{}".ljust(size)
            answer = await http.post(COMPLETIONS, content=body if announced else pieces(body))
            assert answer.status_code == status
            assert answer.content == body if status == 200 else "2048 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "n": 9}, {"prompt": ["a"] * 9}, {"prompt": [[1]] * 9}, {"prompt": ["a"] * 3, "n": 3},
        {"prompt": "a", "n": 10**30}, {"prompt": ["a", "b"], "n": 10**4300 - 1}, {"messages": [[{}]] * 9},
        {"prompt": "a", "messages": [[{}]] * 9}, {"prompt": ["a"] * 5, "prompt_embeds": ["a"] * 4},
        {"n": "9"}, {"n": " +9.0\n"}, {"n": "1_0"}, {"n": 9.0},
    ],
)  # fmt: skip
async def test_too_many_answers_are_refused(body: dict[str, Any]) -> None:
    """Prompts times n, however n is written."""
    async with api(HttpLimits(max_sequences=MOST)) as http:
        answer = await http.post(COMPLETIONS, json=body)
        assert answer.status_code == 400
        assert "8 that http.limits.max_sequences allows" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": list(range(1000))}, {"prompt": ["1"] + [2] * 999}, {"messages": [{"role": "user"}] * 50}, {},
        {"n": "9x"}, {"n": 9.5}, {"n": [9]}, {"n": None}, {"n": True}, {"n": "8"}, {"n": -9}, {"best_of": 9},
    ],
)  # fmt: skip
async def test_what_is_one_answer_passes(body: Any) -> None:
    """A prompt of many tokens, a long conversation, and what the application is to judge."""
    async with api(HttpLimits(max_sequences=MOST)) as http:
        assert (await http.post(COMPLETIONS, json=body)).json() == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"n": NaN}', b'{"a": -Infinity}', b'\xef\xbb\xbf{"n": 9}', '{"n": 9}'.encode("utf-16"),
        '{"n": 9}'.encode("utf-16-le"), '{"n": 9}'.encode("utf-32-be"), b'{"a": "\xff", "n": 9}',
        b'{"a": "\xed\xa0\x80", "n": 9}', b'{"prompt": "\xed\xa0\x80"}', b'{"a": "\\ud800", "n": 9}', b"[1]", b"9",
        b" ", b'{"n": 9', b'{"n": 9}x', b'{"n": 1e400}',
    ],
)  # fmt: skip
async def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    """Whatever Python's json makes of it; the reason says what would have been right."""
    async with api() as http:
        answer = await http.post(COMPLETIONS, content=body)
        assert answer.status_code == 400
        assert "should be a JSON object in UTF-8" in answer.json()["error"]["message"]
        assert (await http.post(COMPLETIONS)).content == b"", "no body is none of this"


def _vllm_parses() -> FastAPI:
    """An application that takes requests as vLLM's does, and answers how many answers they ask for."""
    app = FastAPI()

    @app.post(COMPLETIONS)
    async def completions(request: CompletionRequest) -> int:
        prompts = 0 if request.prompt is None else len(prompt_to_seq(request.prompt))
        embeds = 0 if request.prompt_embeds is None else len(prompt_to_seq(request.prompt_embeds))
        return (prompts + embeds) * request.n

    @app.post(CHAT)
    async def chat(request: ChatCompletionRequest) -> int:
        return request.n or 1

    @app.post(BATCH)
    async def batch(request: BatchChatCompletionRequest) -> int:
        return len(request.messages) * (request.n or 1)

    return app


PLAIN, GUARDED = client_of(_vllm_parses(), None), client_of(_vllm_parses(), HttpLimits(max_sequences=MOST))

_number = st.integers(1, 12).map(str)
counts = st.one_of(
    _number,
    _number.map(lambda text: f"{text}.0"),
    _number.map(lambda text: f"{text}e0"),
    _number.map(lambda text: f'" {text}\\t"'),
    _number.map(lambda text: f'"+{text}.00"'),
    st.sampled_from(["true", "null", '"1_2"', '"\\u0039"', '"٩"', "0.9e1", "9.5", "1e30", "[9]", "NaN", "Infinity"]),
)
items = st.sampled_from(['"a"', '"1"', "1", "2.0", "true", "[1]", '["1"]', "[]", "[true]", "null"])
message = '{"role": "user", "content": "a"}'
prompts = st.one_of(
    st.lists(items, max_size=10).map(lambda inner: f"[{','.join(inner)}]"),
    st.tuples(items, st.integers(0, 10)).map(lambda drawn: f"[{','.join([drawn[0]] * drawn[1])}]"),
    st.just('"a"'),
)
conversations = st.one_of(
    st.integers(0, 10).map(lambda many: f"[{','.join([f'[{message}]'] * many)}]"),
    st.integers(1, 10).map(lambda many: f"[{','.join([message] * many)}]"),
)
members = st.one_of(
    st.tuples(st.sampled_from(["n", "\\u006e"]), counts),
    st.tuples(st.just("prompt"), prompts),
    st.tuples(st.just("messages"), conversations),
    st.tuples(st.just("prompt_embeds"), st.sampled_from(["null", '"a"', '["a","a","a"]', "[]"])),
    st.tuples(
        st.sampled_from(["a", "\ud800", "N", "best_of", "use_beam_search"]),
        st.sampled_from(["NaN", '"\\ud800"', '"\ud800"', "1e999", "9" * 4400, '"\\u0000"', "true", '{"n": 9}', "01"]),
    ),
)
odd_bodies = st.builds(
    lambda drawn, encoding, around: around.replace(
        b"_", ("{" + ",".join(f'"{key}":{value}' for key, value in drawn) + "}").encode(encoding, "surrogatepass")
    ),
    st.lists(members, min_size=1, max_size=5),
    st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]),
    st.sampled_from([b"_"] * 5 + [b" \n_\t", b"_\x00", b"\xff_", b"[_]"]),
)


@given(st.sampled_from([COMPLETIONS, CHAT, BATCH]), odd_bodies)
@example(COMPLETIONS, '{"prompt": "a", "n": 9}'.encode("utf-16-le"))
@example(COMPLETIONS, b'{"prompt": "a", "n": "9", "a": NaN}')
@example(COMPLETIONS, b'{"n": 1, "prompt": "a", "n": 9.0}')
@example(BATCH, f'{{"prompt": "a", "messages": [{",".join([f"[{message}]"] * 9)}]}}'.encode())
async def test_the_limit_sees_what_the_application_does(path: str, body: bytes) -> None:
    """Whatever the application makes of a body, no more answers than allowed come of it; what it takes and is JSON
    passes."""
    json_type = {"content-type": "application/json"}
    taken = await PLAIN.post(path, content=body, headers=json_type)
    let_in = await GUARDED.post(path, content=body, headers=json_type)
    if let_in.status_code == 200:
        assert let_in.json() == taken.json() <= MOST
    elif taken.status_code == 200:
        message = let_in.json()["error"]["message"]
        assert let_in.status_code == 400
        assert taken.json() > MOST or "JSON object in UTF-8" in message or b"messages" in body


@pytest.mark.parametrize("piece", [b"[", b'{"a":', b'{"a":[', b'"[" ,['])
async def test_bodies_nested_without_end_are_refused(piece: bytes) -> None:
    """Before any parser recurses into them."""
    async with api() as http:
        for depth in (200, 100_000):
            answer = await http.post(COMPLETIONS, content=piece * depth)
            assert (answer.status_code, "deep" in answer.text) == (400, True)


@pytest.mark.parametrize(("piece", "of_it"), [(b"[]", 1), (b'{"":{}}', 2), (b'["]["]', 1)])
async def test_more_arrays_and_objects_than_parsers_do_quickly_are_refused(piece: bytes, of_it: int) -> None:
    """A body of a few megabytes would hold everybody up for seconds. As many as are allowed pass."""
    fit = (CONTAINERS_MOST - 2) // of_it
    async with api() as http:
        for count, status in ((fit, 200), (fit + 2, 400)):
            answer = await http.post(COMPLETIONS, content=b'{"a":[' + b",".join([piece] * count) + b"]}")
            assert (answer.status_code, "arrays and objects" in answer.text) == (status, status == 400)


@given(st.text(alphabet='[]{}"\\a ,', max_size=600))
async def test_brackets_in_strings_are_no_nesting(text: str) -> None:
    """A prompt of brackets is a prompt."""
    async with api() as http:
        body = json.dumps({"prompt": text, "a": [[1]] * NESTED_MOST}).encode()
        assert (await http.post(COMPLETIONS, content=body)).content == body


async def test_brackets_in_a_prompt_are_no_arrays() -> None:
    """Code has many; they are text, also behind more arrays than are nested."""
    body = json.dumps({"a": [[]] * NESTED_MOST, "prompt": '{"a[0]": "\\"}"} ' * CONTAINERS_MOST}).encode()
    async with api() as http:
        assert (await http.post(COMPLETIONS, content=body)).status_code == 200


async def test_looking_for_nesting_takes_no_longer_for_bad_bodies() -> None:
    """Strings that do not end, quotes and backslashes in a row, and ends of what never began are looked at once."""
    async with api() as http, asyncio.timeout(DEADLINE_S):
        for body in (
            b"[]" * 100 + b'"' + b'\\"' * 1_000_000,
            b"[]" * 100 + b'"' + b"\\" * 2_000_001,
            b'[]""' * 500_000,
            b"[]" * 100 + b"]" * 2_000_000,
            b"[" * 100 + b"a" * 2_000_000,
        ):
            assert (await http.post(COMPLETIONS, content=body)).status_code == 400


async def test_bodies_of_requests_that_run_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body counts until its request has ended, whether it was answered, failed, was refused or left; one that is
    too much is refused with 503 and can come again."""
    monkeypatch.setattr(body_limits, "BODIES_BYTES", 4096)
    begun, over = asyncio.Event(), asyncio.Event()

    async def held(request: Request) -> Response:
        await request.body()
        begun.set()
        await over.wait()
        raise RuntimeError("an application that fails")

    body = b"{}".ljust(3000)
    async with asyncio.timeout(DEADLINE_S), api(HttpLimits(max_body_bytes=3000), held) as http:
        for end in (over.set, None):
            begun.clear()
            over.clear()
            first = asyncio.create_task(http.post(COMPLETIONS, content=body))
            await begun.wait()
            second = await http.post(COMPLETIONS, content=body)
            assert (second.status_code, "retry-after" in second.headers) == (503, True)
            assert "4096 bytes" in second.json()["error"]["message"]
            third = asyncio.create_task(http.post(COMPLETIONS, content=body[:1000]))
            wrong = await http.post(COMPLETIONS, content=b"[]")
            assert wrong.status_code == 400
            if end is None:
                first.cancel()
                third.cancel()
            else:
                end()
                assert (await first).status_code == (await third).status_code == 500
            await asyncio.wait([first, third])
        over.set()
        assert (await http.post(COMPLETIONS, content=body)).status_code == 500, "nothing is held any more"


async def test_one_body_always_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one may be longer than all together, one after the other is taken."""
    monkeypatch.setattr(body_limits, "BODIES_BYTES", 1)
    async with api(HttpLimits(max_body_bytes=3000)) as http:
        for _ in range(2):
            assert (await http.post(COMPLETIONS, content=b"{}".ljust(3000))).status_code == 200
