"""The HTTP door in front of vLLM's own server: promises, refusals before a response begins, deadlines, counts."""

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from starlette.types import Message

from cluster.admission import AdmissionQueue, QueueLimits
from cluster.config import SloClass
from cluster.door import Door
from cluster.room import Room
from cluster.slo import Ending, Tally
from tests.unit.cluster.fake_replicas import Step, died
from tests.unit.cluster.vllm_front import MODEL, Front, VllmServer

DEADLINE_S = 20.0
CLASSES = [
    SloClass(name="chat", ttft_ms=60_000.0),
    SloClass(name="hasty", ttft_ms=60_000.0, deadline_ms=150.0),
    SloClass(name="batch", sheddable=False),
]
PROMPT: dict[str, Any] = {"prompt": "w3 w4", "max_tokens": 4}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "w3 w4"}], "max_tokens": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": PROMPT,
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "w3 w4", "max_output_tokens": 4},
    "/v1/messages": CHAT,
}
Open = Callable[..., AbstractAsyncContextManager[Front]]


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def front(server: VllmServer) -> Open:
    """Opens an API over one replica that runs one request; one more may wait."""

    def opened(*scripts: Sequence[Step], places: int = 1, waiting: int = 1) -> AbstractAsyncContextManager[Front]:
        door = Door(AdmissionQueue(CLASSES, QueueLimits(waiting)), Room(0.5, places, replicas=1))
        return server.front(scripts, CLASSES, door)

    return opened


async def ask(front: Front, path: str = "/v1/completions", headers: dict[str, str] | None = None, **body: Any) -> Any:
    return await front.http.post(path, json={"model": MODEL} | BODIES[path] | body, headers=headers)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not reached():  # noqa: ASYNC110  # what is waited for is plain state of the product, without an event
            await asyncio.sleep(0.001)


def tally(front: Front, slo_class: str) -> Tally:
    return front.ledger.account(MODEL).by_class.get(slo_class, Tally())


class Client:
    """One request by hand: what is sent to it, and a connection that can be hung up."""

    def __init__(self, front: Front, path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.sent: list[Message] = []
        whole = json.dumps({"model": MODEL} | body).encode()
        self._pieces: list[Message] = [
            {"type": "http.request", "body": whole[:10], "more_body": True},
            {"type": "http.request", "body": whole[10:]},
        ]
        self._gone = asyncio.Event()
        named = {"content-type": "application/json"} | headers
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()], "server": ("api", 80),
        }  # fmt: skip
        self.task = asyncio.ensure_future(front.api(scope, self._receive, self._send))

    async def hang_up(self) -> None:
        self._gone.set()
        async with asyncio.timeout(DEADLINE_S):
            await self.task

    async def _receive(self) -> Message:
        if self._pieces:
            return self._pieces.pop(0)
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self._gone.is_set():
            self.sent.append(message)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_comes_before_the_response_begins(front: Open, path: str, stream: bool) -> None:
    """Where the queue is full a request gets 429 and Retry-After and nothing else, stream or not, in every API."""
    async with front(["wait"]) as api:
        waiting = [asyncio.ensure_future(ask(api)) for _ in range(2)]
        await until(lambda: api.core.door.waiting == 1)
        answer = await ask(api, path, stream=stream)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert "1 requests of" in answer.json()["error"]["message"]
        assert tally(api, "chat").endings == {Ending.REJECTED: 1}
        for task in waiting:
            task.cancel()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_waits_is_answered_when_its_turn_comes(front: Open, path: str, stream: bool) -> None:
    """Nothing of its response is sent while it waits; then all of it, and its class and replica are counted."""
    async with front([5, "finish"], [5, 6, "finish"]) as api:
        first = Client(api, "/v1/completions", PROMPT, {})
        second = Client(api, path, BODIES[path] | {"stream": stream}, {"x-slo-class": "batch"})
        await until(lambda: api.core.door.waiting == 1 or second.task.done())
        await asyncio.gather(first.task, second.task)
        assert second.sent[0]["status"] == 200
        assert "w6" in b"".join(message.get("body", b"") for message in second.sent).decode()
        assert tally(api, "batch").endings == {Ending.ANSWERED: 1}
        assert api.ledger.account(MODEL).by_replica["replica-a"].counted == 2


@pytest.mark.parametrize("path", BODIES)
async def test_nothing_is_sent_to_a_stream_that_waits(front: Open, path: str) -> None:
    """vLLM has begun its response, and the client sees nothing of it until the request is admitted."""
    async with front(["wait"], [5, "finish"]) as api:
        first = Client(api, "/v1/completions", PROMPT, {})
        await until(lambda: api.core.in_flight == 1)
        second = Client(api, path, BODIES[path] | {"stream": True}, {})
        await until(lambda: api.core.door.waiting == 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert second.sent == []
        await first.hang_up()
        await second.task
        assert [message["type"] for message in second.sent[:2]] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_before_the_first_token_is_504(front: Open, path: str, stream: bool) -> None:
    """A request that outlives its class's deadline is aborted in the engine, and told so."""
    async with front(["wait"]) as api:
        answer = await ask(api, path, {"x-slo-class": "hasty"}, stream=stream)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == 504
        assert "the deadline of class hasty, 150 ms" in answer.text
        await until(lambda: api.handle.calls[0].cancelled)
        assert tally(api, "hasty").endings == {Ending.TIMED_OUT: 1}
        assert (api.core.in_flight, api.core.door.room.inside) == (0, 0)


@pytest.mark.parametrize("path", BODIES)
async def test_a_deadline_within_a_stream_is_its_last_event(front: Open, path: str) -> None:
    """What was sent stays; the end is an error in the form of the API, and no text after it."""
    async with front([5, 6, "wait"]) as api:
        answer = await ask(api, path, {"x-slo-class": "hasty"}, stream=True)
        assert answer.status_code == 200
        events = [event for event in answer.text.split("\n\n") if event]
        end = events.pop() if events[-1] == "data: [DONE]" else None
        assert (end is None) == (path in ("/v1/responses", "/v1/messages"))
        assert "the deadline of class hasty, 150 ms" in events[-1]
        assert any("w5" in event for event in events[:-1])
        assert tally(api, "hasty").endings == {Ending.TIMED_OUT: 1}


async def test_a_deadline_counts_at_the_door_too(front: Open) -> None:
    """A request that waits for its turn until its deadline leaves the queue with 504."""
    async with front(["wait"]) as api:
        first = Client(api, "/v1/completions", PROMPT, {})
        await until(lambda: api.core.in_flight == 1)
        answer = await ask(api, headers={"x-slo-class": "hasty"}, stream=True)
        assert (answer.status_code, api.core.door.waiting) == (504, 0)
        await first.hang_up()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_counts_as_neither(front: Open, stream: bool) -> None:
    """Whether it waits at the door or is answered: it leaves at once, and is no miss."""
    async with front([5, "wait"]) as api:
        inside = Client(api, "/v1/completions", PROMPT | {"stream": stream}, {})
        await until(lambda: api.core.in_flight == 1)
        waits = Client(api, "/v1/completions", PROMPT | {"stream": stream}, {"x-slo-class": "batch"})
        await until(lambda: api.core.door.waiting == 1)
        await waits.hang_up()
        await until(lambda: api.core.door.waiting == 0)
        assert (api.core.door.waiting_tokens, waits.sent) == (0, [])
        await inside.hang_up()
        await until(lambda: api.core.door.room.inside == 0)
        assert (tally(api, "batch").endings, tally(api, "chat").endings) == ({Ending.CANCELLED: 1},) * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_fails_is_a_miss(front: Open, stream: bool) -> None:
    """A replica that dies after the first token ends a request that cannot go on elsewhere, which is counted."""
    async with front([5, died()]) as api:
        await ask(api, stream=stream, presence_penalty=0.5)
        assert tally(api, "chat").endings == {Ending.FAILED: 1}


async def test_where_no_replica_is_reachable_requests_are_rejected(front: Open) -> None:
    """vLLM's own 503 stays, and counts as a rejection."""
    async with front() as api:
        api.core.reachable = 0
        answer = await ask(api)
        assert answer.status_code == 503
        assert tally(api, "chat").endings == {Ending.REJECTED: 1}


async def test_what_vllm_refuses_as_wrong_does_not_count(front: Open) -> None:
    """A request with nonsense in its body was promised nothing."""
    async with front() as api:
        assert (await ask(api, max_tokens=-1)).status_code == 400
        assert tally(api, "chat").endings == {}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms"])
async def test_nonsense_in_headers_is_400(front: Open, path: str, name: str) -> None:
    """Before anything is read: OpenAI's form, with what would have been right."""
    async with front() as api:
        answer = await ask(api, path, {name: "nonsense"}, stream=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{name}: ")
    assert "chat, hasty, batch" in answer.text or "such as 500" in answer.text


async def test_targets_of_the_request_decide_whether_it_was_kept(front: Open) -> None:
    """The same answer is a hit for the class and a miss for a request that asked for the impossible."""
    async with front([5, "finish"], [5, "finish"]) as api:
        await ask(api)
        await ask(api, headers={"x-slo-ttft-ms": "0.000001"})
        assert (tally(api, "chat").counted, tally(api, "chat").kept) == (2, 1)


@pytest.mark.parametrize("more", [{"n": 3}, {"prompt": ["w1", "w2 w3", "w4"]}])
async def test_several_answers_are_one_request(front: Open, more: dict[str, Any]) -> None:
    """Three answers enter together, take three places, and are counted once with the tokens of all."""
    async with front(*[[5, 6, "finish"]] * 3, places=3) as api:
        entered = list[int]()
        admit = api.core.door.room.sent
        api.core.door.room.sent = lambda *args: (entered.append(api.core.door.room.inside), admit(*args))[1]  # type: ignore[method-assign,func-returns-value]
        assert len((await ask(api, **more)).json()["choices"]) == 3
        assert entered == [0, 1, 2]
        assert (tally(api, "chat").counted, tally(api, "chat").good_tokens) == (1, 6)


async def test_a_stop_string_is_an_answer(front: Open) -> None:
    """vLLM ends the engine's request itself when it finds one: that is no cancellation, and has its times."""
    async with front([5, 6, 7, "wait"]) as api:
        answer = await ask(api, stop=["w6"])
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert (tally(api, "chat").endings, tally(api, "chat").kept) == ({Ending.ANSWERED: 1}, 1)


@pytest.mark.parametrize(
    ("headers", "user", "tenant"),
    [({}, None, ""), ({}, "ann", "ann"), ({"x-tenant-id": "shop"}, "ann", "shop"), ({}, 5, "")],
)
async def test_whose_request_it_is(front: Open, headers: dict[str, str], user: Any, tenant: str) -> None:
    """A header names the tenant, else the body's user; one that is no text is left to vLLM."""
    async with front([5, "finish"]) as api:
        offered = list[str]()
        queue: Any = api.core.door._queue
        offer = queue.offer
        queue.offer = lambda ticket, *args: (offered.append(ticket.tenant), offer(ticket, *args))[1]
        answer = await ask(api, headers=headers, user=user)
        assert offered == ([tenant] if answer.status_code == 200 else [])


async def test_other_routes_need_no_promise(front: Open) -> None:
    """A route that no engine answers is served without looking at the headers, and counts nowhere."""
    async with front() as api:
        headers = {"x-slo-class": "nonsense"}
        answer = await api.http.post("/tokenize", json={"model": MODEL, "prompt": "w3 w4"}, headers=headers)
        assert answer.json()["tokens"] == [3, 4]


async def test_clients_make_no_series(front: Open) -> None:
    """Whatever names clients make up, of classes, models, users, there are no more series than after one request."""

    def lines(text: str) -> set[str]:
        return {line.rpartition(" ")[0] for line in text.splitlines() if line.startswith("ellm_")}

    async with front(*[[5, "finish"]] * 4, places=2) as api:
        await until(lambda: bool(api.core.replica_numbers))
        await ask(api, user="user-0")
        before = lines((await api.http.get("/metrics")).text)
        for number in range(1, 4):
            await ask(api, user=f"user-{number}", headers={"x-request-id": f"r-{number}"})
            await ask(api, headers={"x-slo-class": f"class-{number}"})
            await api.http.post("/v1/completions", json={"model": f"model-{number}", "prompt": "w3"})
            await api.http.get(f"/path-{number}")
        assert lines((await api.http.get("/metrics")).text) == before
        assert (
            f'ellm_admission_requests_total{{model_name="{MODEL}",class="chat",verdict="queued",ingress="0"}}' in before
        )


async def test_metrics_and_status_show_how_requests_fared(front: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters by class, model and ending; histograms by class; a replica by its engine number; the account as JSON."""
    async with front([5, 6, "finish"]) as api:
        await until(lambda: bool(api.core.replica_numbers))
        number = next(iter(api.core.replica_numbers))
        monkeypatch.setattr(api.core._slots, "_owners", ["replica-a"])
        await ask(api)
        text = (await api.http.get("/metrics")).text
        for line in (
            f'ellm_slo_requests_total{{model_name="{MODEL}",class="chat",ending="answered",ingress="0"}} 1.0',
            f'ellm_slo_requests_total{{model_name="{MODEL}",class="chat",ending="timed_out",ingress="0"}} 0.0',
            f'ellm_slo_kept_total{{model_name="{MODEL}",class="chat",ingress="0"}} 1.0',
            f'ellm_slo_good_tokens_total{{model_name="{MODEL}",class="chat",ingress="0"}} 2.0',
            f'ellm_slo_ttft_seconds_count{{model_name="{MODEL}",class="chat",ingress="0"}} 1.0',
            f'ellm_slo_tpot_seconds_count{{model_name="{MODEL}",class="chat",ingress="0"}} 1.0',
            f'ellm_slo_replica_requests_total{{model_name="{MODEL}",engine="{number}",ingress="0"}} 1.0',
            f'ellm_slo_replica_kept_total{{model_name="{MODEL}",engine="{number}",ingress="0"}} 1.0',
            f'ellm_requests_waiting{{model_name="{MODEL}",ingress="0"}} 0.0',
            f'ellm_requests_limit{{model_name="{MODEL}",ingress="0"}} 1.0',
        ):
            assert line in text
