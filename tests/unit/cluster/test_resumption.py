"""Requests that come again with their key: the same answer, from where it broke off, and nobody else's."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import pytest_asyncio
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

import cluster.resumption
from cluster.admission import AdmissionQueue, QueueLimits
from cluster.bench.report import Slo
from cluster.config import SloClass
from cluster.core_client import ClusterCore
from cluster.door import Door
from cluster.request_slo import CURRENT, RequestSlo
from cluster.room import Room
from cluster.slo import Ending
from replicas.answer_journal import AnswerJournal, Mark
from tests.unit.cluster.fake_replicas import FakeHandle, MakeCore, Step, cores, died, request
from tests.unit.cluster.test_slo_layer import BODIES, Client, ask, tally, until
from tests.unit.cluster.vllm_front import MODEL, Front, VllmServer

DEADLINE_S = 10.0
KEY = {"idempotency-key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
Open = Callable[..., AbstractAsyncContextManager[Front]]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def front(server: VllmServer) -> Open:
    """Opens an API over one replica."""

    def opened(*scripts: Sequence[Step]) -> AbstractAsyncContextManager[Front]:
        return server.front(scripts, [SloClass(), SloClass(name="batch")], Door())

    return opened


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for another one's client to go."""
    monkeypatch.setattr(cluster.resumption, "GONE_S", 0.05)
    monkeypatch.setattr(cluster.resumption, "ASK_AGAIN_S", 0.01)


async def broken_off(front: Front, path: str, headers: dict[str, str], tokens: int, **body: Any) -> None:
    """A stream whose client goes when its replica has given so many tokens."""
    before = front.handle.journals[0].tokens
    client = Client(front, path, BODIES[path] | {"stream": True} | body, headers)
    await until(lambda: front.handle.journals[0].tokens == before + tokens)
    await client.hang_up()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_goes_on_where_it_broke_off(front: Open, path: str, stream: bool) -> None:
    """What was computed comes first, and the rest is asked for after it: the client gets the whole answer, in every
    API, streamed or not, whether the first request was streamed or not."""
    async with front([5, 6, "wait"], [7, "finish"]) as api:
        await broken_off(api, path, KEY, tokens=2)
        answer = await ask(api, path, KEY, stream=stream)
        assert answer.status_code == 200
        assert all(word in answer.text for word in ("w5", "w6", "w7"))
        first, rest = (call.codec.decode_request(call.frames) for call in api.handle.calls)
        assert rest.prompt_token_ids == [*(first.prompt_token_ids or []), 5, 6]
        assert (first.sampling_params.max_tokens, rest.sampling_params.max_tokens) == (4, 2)
        assert api.handle.calls[1].route.to == "replica-a"
        assert (tally(api, "standard").endings, api.core.door.room.inside) == (
            {Ending.CANCELLED: 1, Ending.ANSWERED: 1},
            0,
        )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_whole_answer_asks_no_engine(front: Open, stream: bool) -> None:
    """It is given again as it was, to the usage and the reason of its end."""
    async with front([5, 6, "finish"]) as api:
        more = {"stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
        answers = [await ask(api, "/v1/completions", KEY, **more) for _ in range(3)]
        assert len(api.handle.calls) == 1
        ends = [_end_of(answer) for answer in answers]
        assert ends[0] == ends[1] == ends[2] == ("w5 w6", "length", 2, 2)
        assert api.core.resumption.requests >= 2
        assert tally(api, "standard").endings == {Ending.ANSWERED: 3}


def _end_of(answer: Any) -> tuple[str, str, int, int]:
    """Text, why it ended, tokens of prompt and answer."""
    events = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
    said = [json.loads(event) for event in events] or [answer.json()]
    text = "".join(choice["text"] for one in said for choice in one["choices"])
    (why,) = {choice["finish_reason"] for one in said for choice in one["choices"]} - {None}
    (usage,) = [one["usage"] for one in said if one.get("usage")]
    return text.strip(), why, usage["prompt_tokens"], usage["completion_tokens"]


async def test_it_does_not_wait_at_the_door_again(server: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was let in before, and a whole answer needs no place; one that is new waits."""
    door = Door(AdmissionQueue([SloClass()], QueueLimits(1)), Room(0.5, 1, replicas=1))
    async with server.front([[5, "wait"], [6, "finish"]], [SloClass()], door) as api:
        await broken_off(api, "/v1/completions", KEY, tokens=1)
        monkeypatch.setattr(door.room, "has_room", lambda requests, now_s: False)
        waits = Client(api, "/v1/completions", BODIES["/v1/completions"], {})
        await until(lambda: door.waiting == 1)
        for _ in range(2):
            assert _end_of(await ask(api, "/v1/completions", KEY))[0] == "w5 w6"
        assert (door.waiting, door.room.inside, len(api.handle.calls)) == (1, 0, 2)
        await waits.hang_up()


async def test_a_stop_string_ends_it_at_the_same_token(front: Open) -> None:
    """The replica had gone on a little: what it had beyond the stop string is in no answer and in no count."""
    async with front([5, 6, 7, 8, "wait"], ["wait"]) as api:
        first, again = [await ask(api, "/v1/completions", KEY, max_tokens=50, stop=["w6"]) for _ in range(2)]
        assert _end_of(first) == _end_of(again) == ("w5", "stop", 2, 2)
        await until(lambda: api.core.in_flight == 0)


async def test_a_key_belongs_to_its_tenant(front: Open) -> None:
    """Another tenant with the same key and the same request gets an answer of its own."""
    async with front([5, "finish"], [6, "finish"]) as api:
        answers = [await ask(api, "/v1/completions", KEY | {"x-tenant-id": one}) for one in ("a", "b", "a")]
        assert [_end_of(answer)[0] for answer in answers] == ["w5", "w6", "w5"]


async def test_another_request_with_the_key_is_refused(front: Open) -> None:
    """Another prompt or other parameters: 422. Streaming and targets make no other request of it."""
    async with front([5, "finish"]) as api:
        await ask(api, "/v1/completions", KEY)
        for body in ({"prompt": "w9"}, {"temperature": 0.5}, {"max_tokens": 5}, {"stop": ["w1"]}):
            answer = await ask(api, "/v1/completions", KEY, **body)
            assert answer.status_code == 422
            assert "another prompt or other parameters" in answer.json()["error"]["message"]
        headers = KEY | {"x-slo-class": "batch", "x-slo-tpot-ms": "90"}
        assert (await ask(api, "/v1/completions", headers, stream=True)).status_code == 200
        assert len(api.handle.calls) == 1
        assert tally(api, "standard").endings == {Ending.ANSWERED: 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_one_whose_client_is_there_is_not_given_twice(front: Open, hurried: None, stream: bool) -> None:
    """409 while it runs; when its client has gone, the next one goes on."""
    async with front([5, "wait"], [6, "finish"]) as api:
        first = Client(api, "/v1/completions", BODIES["/v1/completions"] | {"stream": True}, KEY)
        await until(lambda: api.handle.journals[0].tokens == 1)
        answer = await ask(api, "/v1/completions", KEY, stream=stream)
        assert answer.status_code == 409
        assert "its client is connected" in answer.json()["error"]["message"]
        assert (await ask(api, "/v1/completions", KEY, prompt="w9")).status_code == 422
        await first.hang_up()
        answer = await ask(api, "/v1/completions", KEY, stream=stream)
        assert all(word in answer.text for word in ("w5", "w6"))


@pytest.mark.parametrize("body", [{"n": 2}, {"prompt": ["w3", "w4"]}, {"n": 2, "stream": True}])
async def test_several_answers_have_no_key(front: Open, body: dict[str, Any]) -> None:
    """400, and nothing is computed."""
    async with front() as api:
        answer = await ask(api, "/v1/completions", KEY, **body)
        assert answer.status_code == 400
        assert "one prompt and one answer" in answer.json()["error"]["message"]
        await until(lambda: api.core.in_flight == 0)
        assert api.handle.calls == []


@pytest.mark.parametrize("key", ["", "a" * 256, "a\tb", "a\x7f"])
async def test_a_key_that_does_not_fit_is_refused(front: Open, key: str) -> None:
    """400, with what would."""
    async with front() as api:
        answer = await ask(api, "/v1/completions", {"idempotency-key": key})
        assert answer.status_code == 400
        assert "give 1 to 255 printable ones" in answer.json()["error"]["message"]


async def test_what_cannot_be_continued_is_computed_from_its_start(front: Open) -> None:
    """A beginning of it is no use; a whole answer is."""
    async with front([5, "wait"], [6, 7, "finish"]) as api:
        sampled = {"seed": 3, "temperature": 1.0}
        await broken_off(api, "/v1/completions", KEY, tokens=1, **sampled)
        answers = [await ask(api, "/v1/completions", KEY, **sampled) for _ in range(2)]
        assert [_end_of(answer)[0] for answer in answers] == ["w6 w7"] * 2
        assert len(api.handle.calls) == 2


async def test_log_probabilities_are_computed_again(front: Open) -> None:
    """They are not remembered, so a whole answer is of no use either."""
    async with front([5, "finish"], [5, "finish"]) as api:
        answers = [await ask(api, "/v1/completions", KEY, logprobs=1) for _ in range(2)]
        assert [len(answer.json()["choices"][0]["logprobs"]["tokens"]) for answer in answers] == [1, 1]
        assert len(api.handle.calls) == 2


# Of the core


async def add(core: ClusterCore, key: str = "k", **params: Any) -> RequestSlo:
    """A request with that key: what its client is promised."""
    owner = RequestSlo(SloClass(), Slo(), 0.0, idempotency_key=key)
    token = CURRENT.set(owner)
    made = request(f"r-{id(owner)}")
    made.sampling_params = SamplingParams(max_tokens=8, **params)
    await core.add_request_async(made)
    CURRENT.reset(token)
    return owner


async def outputs(core: ClusterCore, tokens: int | None = None) -> list[list[int]]:
    """The tokens that come, piece by piece, until so many have; until the answer's end without a number."""
    seen: list[EngineCoreOutput] = []
    async with asyncio.timeout(DEADLINE_S):
        while not (seen[-1:] and seen[-1].finished) and (tokens is None or _count(seen) < tokens):
            seen += (await core.get_output_async()).outputs
    return [one.new_token_ids for one in seen if one.new_token_ids]


def _count(seen: list[EngineCoreOutput]) -> int:
    return sum(len(one.new_token_ids) for one in seen)


@pytest_asyncio.fixture(loop_scope="module")
async def make_core() -> AsyncIterator[MakeCore]:
    async with cores(MODEL) as make:
        yield make


async def test_an_ingress_that_is_gone_holds_nothing(make_core: MakeCore) -> None:
    """Its clients' answers go on at another ingress at once, without waiting until the replica gives it up; and the
    replica ends what it runs for it."""
    handle = FakeHandle([[5, 6, "wait"], [7, "finish"]])
    gone, there = await make_core(handle), await make_core(handle)
    await add(gone)
    await outputs(gone, 2)
    gone._inbox.close()
    await add(there)
    assert await outputs(there) == [[5, 6], [7]]
    assert (there.resumption.requests, there.resumption.tokens, there.continued) == (1, 2, 0)
    assert handle.calls[0].gave_up


async def test_an_answer_is_whole_after_a_replica_has_died(make_core: MakeCore) -> None:
    """The journal of the one that went on has the tokens of both."""
    handle = FakeHandle([[5, died()], [6, "finish"]])
    core = await make_core(handle)
    await add(core)
    await outputs(core)
    await until(lambda: core.in_flight == 0)
    await add(core)
    assert await outputs(core) == [[5, 6]]
    assert len(handle.calls) == 2


async def test_the_longest_beginning_counts_and_its_replica_is_wanted(make_core: MakeCore) -> None:
    """Of several replicas' journals; one that is whole before one that is longer."""
    handle = FakeHandle([[9, "finish"]], journals=[AnswerJournal("a"), AnswerJournal("b"), AnswerJournal("c")])
    core = await make_core(handle)
    assert await _remembered(handle, core, {"a": [5], "b": [5, 6], "c": []}, whole="") == [[5, 6], [9]]
    assert handle.calls[0].route.to == "b"
    assert await _remembered(handle, core, {"a": [5, 6, 7], "b": [5, 6]}, whole="b", key="other") == [[5, 6]]
    assert len(handle.calls) == 1


async def _remembered(
    handle: FakeHandle, core: ClusterCore, known: dict[str, list[int]], whole: str, key: str = "k"
) -> list[list[int]]:
    """What comes of a request of which journals know so much."""
    mark = core.resumption.mark(RequestSlo(SloClass(), Slo(), 0.0, idempotency_key=key), _plain())
    assert mark is not None
    for journal in handle.journals:
        if (tokens := known.get(journal._replica)) is not None:
            entry = journal.begin(Mark(mark.key, mark.request, []), None)  # type: ignore[arg-type]
            reason = FinishReason.LENGTH if journal._replica == whole else None
            journal.write(entry, EngineCoreOutput("r", tokens, finish_reason=reason))
            journal.end(entry)
    await add(core, key)
    return await outputs(core)


def _plain() -> EngineCoreRequest:
    made = request()
    made.sampling_params = SamplingParams(max_tokens=8)
    return made


async def test_a_stuck_replica_keeps_nobody_waiting(make_core: MakeCore) -> None:
    """Where the replicas do not all answer, the request is as any other."""
    handle = FakeHandle([[5, "finish"]])
    core = await make_core(handle)

    def stuck(*args: Any) -> None:
        raise TimeoutError

    handle.journals[0].find = stuck  # type: ignore[method-assign,assignment]
    await add(core)
    assert await outputs(core) == [[5]]


async def test_a_prompt_that_is_not_of_tokens_has_no_key(make_core: MakeCore) -> None:
    """What was asked could not be told from another request."""
    core = await make_core(FakeHandle())
    owner = RequestSlo(SloClass(), Slo(), 0.0, idempotency_key="k")
    made = _plain()
    made.prompt_token_ids = None
    token = CURRENT.set(owner)
    await core.add_request_async(made)
    CURRENT.reset(token)
    assert owner.halt is not None and owner.halt.status == 400


async def test_times_are_of_the_tokens_that_are_computed(make_core: MakeCore) -> None:
    """So are the tokens that a key's quota counts."""
    handle = FakeHandle([[5, 6, "wait"], [7, 8, "finish"]])
    core = await make_core(handle)
    first = await add(core)
    await outputs(core, 2)
    core._end(next(iter(core._relays)))
    second = await add(core)
    await outputs(core)
    await until(lambda: core.in_flight == 0)
    (part,) = second.parts
    assert (part.tokens, part.resumed, second.tokens, first.tokens) == (4, 2, 3 + 2, 3 + 2)
    assert part.tpot_s == part.last_s - part.first_s
