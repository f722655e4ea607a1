"""The replicas as one engine core, with replicas that follow scripts."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

import cluster.core_client
import cluster.replica_poll
from cluster.admission import AdmissionQueue
from cluster.attempt_watch import ACCEPT_S
from cluster.bench.report import Slo
from cluster.config import SloClass
from cluster.core_client import ClusterCore
from cluster.door import Door
from cluster.engine_slots import EngineSlots
from cluster.relay import ATTEMPTS_MOST
from cluster.request_slo import CURRENT, RequestSlo, Stop
from cluster.room import Room
from cluster.route import RouteEvent, Standing
from cluster.slo import Ending
from replicas.hop import TPOT_TARGET_ARG, TTFT_TARGET_ARG, HopCodec
from tests.unit.cluster.fake_replicas import FakeCall, FakeHandle, MakeCore, cores, died, request, stats


def task_error() -> Exception:
    return RayTaskError("generate", "trace", ValueError("bad"))  # type: ignore[no-untyped-call]


DEADLINE_S = 10.0
HALT = Stop(Ending.TIMED_OUT, HTTPStatus.GATEWAY_TIMEOUT, "too long")


@pytest.fixture
async def make_core() -> AsyncIterator[MakeCore]:
    async with cores("m") as make:
        yield make


async def outputs_until(core: ClusterCore, done: Callable[[list[EngineCoreOutput]], bool]) -> list[EngineCoreOutput]:
    """What the core puts out until ``done`` is content with it."""
    seen: list[EngineCoreOutput] = []
    async with asyncio.timeout(DEADLINE_S):
        while not done(seen):
            seen += (await core.get_output_async()).outputs
    return seen


def ended(count: int = 1) -> Callable[[list[EngineCoreOutput]], bool]:
    return lambda seen: sum(output.finished for output in seen) == count


def tokens(outputs: list[EngineCoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


async def test_outputs_arrive_in_order_and_the_request_is_forgotten(make_core: MakeCore) -> None:
    """A request's outputs come out as its replica sent them; after its end nothing is left of it."""
    core = await make_core(FakeHandle([[5, 6, "finish"]]))
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert tokens(outputs) == [5, 6]
    assert outputs[-1].finish_reason == FinishReason.LENGTH
    await until(lambda: core.in_flight == 0)


async def test_one_call_drains_all_requests(make_core: MakeCore) -> None:
    """Outputs of several requests that have arrived come out together."""
    core = await make_core(FakeHandle([[1, "finish"], [2, "finish"]]))
    for request_id in "ab":
        await core.add_request_async(request(request_id))
    await until(lambda: sum(output.finished for output in core._outputs) == 2)
    drained = (await outputs_until(core, bool), core._outputs)
    assert {output.request_id for output in drained[0]} == {"a", "b"}
    assert drained[1] == []


async def test_abort_cancels_the_call(make_core: MakeCore) -> None:
    """An aborted request's call is cancelled, and it puts out nothing more."""
    handle = FakeHandle([[1, "wait"]])
    core = await make_core(handle)
    await core.add_request_async(request())
    await outputs_until(core, bool)
    await core.abort_requests_async(["r", "unknown"])
    await until(lambda: handle.calls[0].cancelled)
    assert (core.in_flight, core._outputs) == (0, [])


async def test_a_request_that_the_cluster_ends_is_an_abort_to_vllm(make_core: MakeCore) -> None:
    """Stopped, it is cancelled at its replica, puts out one abort and nothing more, and its times are known."""
    handle = FakeHandle([[1, 2, "wait"]])
    core = await make_core(handle)
    owner = RequestSlo(SloClass(), Slo(), 0.0)
    token = CURRENT.set(owner)
    await core.add_request_async(request())
    CURRENT.reset(token)
    await outputs_until(core, lambda seen: len(tokens(seen)) == 2)
    owner.stop(HALT)
    (end,) = await outputs_until(core, ended())
    assert (end.finish_reason, end.new_token_ids) == (FinishReason.ABORT, [])
    await until(lambda: handle.calls[0].cancelled)
    (part,) = owner.parts
    assert (part.tokens, part.replica, part.first_s <= part.last_s) == (2, "replica-a", True)
    assert (core.in_flight, core._outputs, core.door.room.inside) == (0, [], 0)


async def test_a_request_that_was_ended_before_it_came_is_not_sent(make_core: MakeCore) -> None:
    """Its deadline may pass while vLLM reads its prompt: it is aborted without a call to a replica."""
    handle = FakeHandle([[1, "finish"]])
    core = await make_core(handle)
    owner = RequestSlo(SloClass(), Slo(), 0.0)
    owner.stop(HALT)
    token = CURRENT.set(owner)
    await core.add_request_async(request())
    CURRENT.reset(token)
    (end,) = await outputs_until(core, ended())
    assert (end.finish_reason, handle.calls) == (FinishReason.ABORT, [])


async def test_targets_reach_the_router_and_the_engine(make_core: MakeCore) -> None:
    """Those of the HTTP request that it came in, beside what the request has of its own; without one there are none."""
    handle = FakeHandle([["finish"]] * 2)
    core = await make_core(handle)
    token = CURRENT.set(RequestSlo(SloClass(), Slo(ttft_ms=500.0, tpot_ms=40.0), 0.0))
    made = request("a")
    assert made.sampling_params is not None
    made.sampling_params.extra_args = {"mine": 1}
    await core.add_request_async(made)
    CURRENT.reset(token)
    await core.add_request_async(request("b"))
    await until(lambda: len(handle.calls) == 2)
    sent = {one.request_id: one for one in (call.codec.decode_request(call.frames) for call in handle.calls)}
    told = {name: one.sampling_params.extra_args for name, one in sent.items() if one.sampling_params is not None}
    assert told == {"a": {"mine": 1, TTFT_TARGET_ARG: 500.0, TPOT_TARGET_ARG: 40.0}, "b": None}
    assert {call.route.request.slo for call in handle.calls} == {Slo(ttft_ms=500.0, tpot_ms=40.0), Slo()}


async def test_those_that_wait_at_the_door_are_not_in_flight(make_core: MakeCore) -> None:
    """The replicas' limit is about what replicas have: the queue has a bound of its own."""
    core = await make_core(FakeHandle([["wait"]]))
    await until(lambda: core.reachable == 1)
    core.door = Door(AdmissionQueue([SloClass(sheddable=False)]), Room(0.5, seqs=1, replicas=1))
    for number in range(9):
        token = CURRENT.set(RequestSlo(SloClass(), Slo(), 0.0))
        await core.add_request_async(request(str(number)))
        CURRENT.reset(token)
    await until(lambda: core.door.waiting == 8)
    assert (core.in_flight, core.why_full(3)) == (1, None)


async def test_death_before_the_first_token_is_retried(make_core: MakeCore) -> None:
    """A request whose replica dies before its first token is sent again, and its client sees nothing of it."""
    core = await make_core(FakeHandle([[died()], [7, "finish"]]))
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert (tokens(outputs), outputs[-1].finish_reason, core.retried) == ([7], FinishReason.LENGTH, 1)


async def test_a_request_that_kills_its_replicas_is_refused(make_core: MakeCore) -> None:
    """Two replicas that die under a request end it with an error, and the same one reaches no third."""
    handle = FakeHandle([[died()]] * 9)
    core = await make_core(handle)
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert outputs[-1].finish_reason == FinishReason.ERROR
    assert len(handle.calls) == 2
    await until(lambda: core.in_flight == 0)
    with pytest.raises(VLLMValidationError, match="2 replicas have died"):
        await core.add_request_async(request("again"))
    assert len(handle.calls) == 2


class OnReplicas(FakeHandle):
    """Each call at the replica that ``names`` says."""

    names: Sequence[str] = ()

    def remote(self, *args: Any, **kwargs: Any) -> FakeCall:
        call = super().remote(*args, **kwargs)
        call.route.replica = Standing(self.names[len(self.calls) - 1])
        return call


PROMPTS = {"x": [1, 2], "y": [3, 4]}


def asking(request_id: str, prompt: str) -> EngineCoreRequest:
    one = request(request_id)
    one.prompt_token_ids = PROMPTS[prompt]
    return one


async def test_who_waits_at_replicas_that_die_of_something_else_is_answered(make_core: MakeCore) -> None:
    """Two die, one soon after the other, with the same two requests waiting: each is tried by itself, and answered."""
    handle = OnReplicas([*[[died()]] * 4, [7, "finish"], [8, "finish"]])
    handle.names = "aabbcc"
    core = await make_core(handle)
    for name in PROMPTS:
        await core.add_request_async(asking(name, name))
    outputs = await outputs_until(core, ended(2))
    assert sorted(tokens(outputs)) == [7, 8]
    assert (len(handle.calls), len(core._suspects)) == (6, 0)


async def test_the_cause_among_those_who_wait_is_found(make_core: MakeCore) -> None:
    """Of two the first kills the third replica too, tried by itself: it is refused, the other one is answered."""
    handle = OnReplicas([*[[died()]] * 5, [8, "finish"]])
    handle.names = "aabbcd"
    core = await make_core(handle)
    for name in PROMPTS:
        await core.add_request_async(asking(name, name))
    outputs = await outputs_until(core, ended(2))
    ends = {one.request_id: one.finish_reason for one in outputs if one.finished}
    assert sorted(ends.values()) == sorted([FinishReason.ERROR, FinishReason.LENGTH])
    guilty = next(name for name, end in ends.items() if end is FinishReason.ERROR)
    with pytest.raises(VLLMValidationError, match="3 replicas have died"):
        await core.add_request_async(asking("again", guilty))


async def test_a_dead_replica_that_is_thought_to_live_is_waited_out(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only replica's node is lost, and it takes long until Ray knows: attempts that it does not take cost the
    request neither retries nor suspicion. Once there is another one it is answered."""
    monkeypatch.setattr(cluster.core_client, "AGAIN_S", 0.0)
    away = ActorUnavailableError("connection reset", None)
    handle = FakeHandle([*[[away]] * 20, [died()], [died()], [died()], [7, "finish"]], takes=False)
    core = await make_core(handle)
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert (tokens(outputs), outputs[-1].finish_reason) == ([7], FinishReason.LENGTH)
    assert (len(handle.calls), core.retried, len(core._suspects)) == (24, 0, 0)


async def test_deaths_before_a_request_is_taken_are_bounded(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kills replicas before they have taken it does not go on for ever."""
    monkeypatch.setattr(cluster.core_client, "AGAIN_S", 0.0)
    handle = FakeHandle([[died()]] * 20, takes=False)
    core = await make_core(handle)
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert (len(handle.calls), outputs[-1].finish_reason) == (ATTEMPTS_MOST, FinishReason.ERROR)


async def test_retries_are_bounded(make_core: MakeCore) -> None:
    """Three replicas that fail a request, and live, end it with an error."""
    handle = FakeHandle([[task_error()]] * 9)
    core = await make_core(handle)
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert outputs[-1].finish_reason == FinishReason.ERROR
    assert len(handle.calls) == 3


async def test_what_a_replica_does_not_take_is_made_elsewhere(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica hangs, so that its call neither ends nor can be taken: the attempt is given up, and counted against the
    replica; what it says later is nobody's."""
    monkeypatch.setattr(cluster.core_client, "WATCH_PERIOD_S", 0.01)
    handle = FakeHandle([["wait"], [7, "finish"]], takes=False)
    core = await make_core(handle)
    await core.add_request_async(request())
    await until(lambda: bool(handle.calls))
    route = handle.calls[0].route
    route.replica = Standing("a")
    route.sent_s = time.monotonic() - ACCEPT_S
    outputs = await outputs_until(core, ended())
    assert (tokens(outputs), core.retried, handle.calls[0].cancelled) == ([7], 1, True)
    heard = [event for event, one, _ in handle.news if one is route]
    assert heard == [RouteEvent.FAILED, RouteEvent.ENDED]
    await until(lambda: core.in_flight == 0)


async def test_the_last_attempt_is_waited_for(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no retry is left a slow answer is better than none."""
    monkeypatch.setattr(cluster.core_client, "WATCH_PERIOD_S", 0.01)
    handle = FakeHandle([["wait"]] * 9, takes=False)
    core = await make_core(handle)
    await core.add_request_async(request())
    for count in (1, 2, 3):
        await until(lambda count=count: len(handle.calls) == count)  # type: ignore[misc]
        handle.calls[-1].route.replica = Standing("a")
        handle.calls[-1].route.sent_s = time.monotonic() - ACCEPT_S
    await asyncio.sleep(0.1)
    assert (len(handle.calls), core.in_flight, handle.calls[-1].cancelled) == (3, 1, False)


async def test_an_abort_is_no_fault_of_the_replica(make_core: MakeCore) -> None:
    """The router hears that the request is over, and nothing else."""
    handle = FakeHandle([[1, "wait"]])
    core = await make_core(handle)
    await core.add_request_async(request())
    await outputs_until(core, bool)
    await core.abort_requests_async(["r"])
    await until(lambda: handle.calls[0].cancelled)
    assert [event for event, _, _ in handle.news] == [RouteEvent.FIRST_TOKEN, RouteEvent.ENDED]
    assert handle.calls[0].route.output_tokens == 1


async def test_a_replica_that_is_lost_in_the_middle_of_an_answer_has_failed(make_core: MakeCore) -> None:
    """The router hears of it before it chooses again: while Ray Serve holds the replica to be there still, what goes on
    would be sent to it once more. An answer that ends early for another reason says nothing of the replica."""
    lost = ActorUnavailableError("connection reset", None)
    handle = FakeHandle([[4, lost], [5, "end"], [6, "finish"]])
    core = await make_core(handle)
    await core.add_request_async(request())
    assert tokens(await outputs_until(core, ended())) == [4, 5, 6]
    first, second = ([event for event, route, _ in handle.news if route is call.route] for call in handle.calls[:2])
    assert first == [RouteEvent.FIRST_TOKEN, RouteEvent.FAILED, RouteEvent.ENDED]
    assert second == [RouteEvent.FIRST_TOKEN, RouteEvent.ENDED]


async def test_the_router_hears_what_a_request_is(make_core: MakeCore) -> None:
    """The length of the prompt and its prefix travel with the call."""
    handle = FakeHandle([["finish"]])
    core = await make_core(handle)
    made = request()
    made.prompt_token_ids = list(range(300))
    await core.add_request_async(made)
    await until(lambda: bool(handle.calls))
    asks = handle.calls[0].route.request
    assert (asks.prompt_tokens, len(asks.prefix)) == (300, 2)


async def test_predictions_are_held_against_what_came(make_core: MakeCore) -> None:
    """A request whose latency was predicted is measured at its end; one without a prediction, or a second token for
    TPOT, is not."""
    handle = FakeHandle([[4, 5, 6, "finish"], [4, "finish"], [4, 5, "finish"]])
    core = await make_core(handle)
    for number, predicted_s in enumerate((1e6, 1e6, math.nan)):
        await core.add_request_async(request(str(number)))
        await until(lambda number=number: len(handle.calls) > number)  # type: ignore[misc]
        route = handle.calls[-1].route
        route.chosen_s = time.monotonic() - 1.0
        route.predicted_ttft_s = route.predicted_tpot_s = predicted_s
        await outputs_until(core, ended())
        await until(lambda: core.in_flight == 0)
    assert (core.ttft_error.count, core.tpot_error.count) == (2, 1)
    assert core.ttft_error.bias > 1000


@pytest.mark.parametrize("end", [died(), "end", "cancel", BackPressureError(1, 1), task_error()])
async def test_an_answer_goes_on_elsewhere(make_core: MakeCore, end: Any) -> None:
    """Whatever ends the call in the middle of an answer, another replica goes on after the last token: it gets prompt
    and answer so far as its prompt and the rest of the length, and no token comes twice."""
    handle = FakeHandle([[4, 5, end], [6, "finish"]])
    core = await make_core(handle)
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert (tokens(outputs), outputs[-1].finish_reason) == ([4, 5, 6], FinishReason.LENGTH)
    rest = HopCodec().decode_request(handle.calls[1].frames)
    assert rest.sampling_params is not None
    assert (rest.request_id, rest.prompt_token_ids, rest.sampling_params.max_tokens) == ("r", [1, 2, 3, 4, 5], 6)
    assert handle.calls[1].route.request.prompt_tokens == 5
    assert (core.retried, core.continued) == (0, 1)


async def test_a_token_renews_the_retries(make_core: MakeCore) -> None:
    """An answer outlives more deaths than one attempt without a token may cost, as long as it gets on."""
    handle = FakeHandle([[died()], [4, died()], [died()], [5, died()], [died()], [6, "finish"]])
    core = await make_core(handle)
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert (tokens(outputs), outputs[-1].finish_reason) == ([4, 5, 6], FinishReason.LENGTH)


async def test_a_request_that_kills_its_replicas_ends(make_core: MakeCore) -> None:
    """Even where each of them gives a token before it dies."""
    handle = FakeHandle([[token, died()] for token in range(20)])
    core = await make_core(handle)
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert (tokens(outputs), outputs[-1].finish_reason) == (list(range(ATTEMPTS_MOST)), FinishReason.ERROR)


async def test_a_defect_ends_the_request(make_core: MakeCore) -> None:
    """Whatever goes wrong in here, no client waits for ever."""
    core = await make_core(FakeHandle([]))  # its next call raises IndexError
    await core.add_request_async(request())
    outputs = await outputs_until(core, ended())
    assert (outputs[-1].finish_reason, core.in_flight) == (FinishReason.ERROR, 0)


async def test_what_cannot_be_continued_is_an_error_not_a_repetition(make_core: MakeCore) -> None:
    """An answer whose next token depends on what its replica knew ends in an error, and no token is sent twice."""
    handle = FakeHandle([[4, died()]])
    core = await make_core(handle)
    guided = request()
    guided.sampling_params = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(regex="a+"))
    await core.add_request_async(guided)
    outputs = await outputs_until(core, ended())
    assert (tokens(outputs), outputs[-1].finish_reason) == ([4], FinishReason.ERROR)
    assert len(handle.calls) == 1


async def test_a_relay_knows_how_to_go_on(make_core: MakeCore) -> None:
    """While a request runs, its prompt and its tokens so far are at hand."""
    core = await make_core(FakeHandle([[4, 5, "wait"]]))
    await core.add_request_async(request())
    await outputs_until(core, lambda seen: tokens(seen) == [4, 5])
    relay = core._relays["r"]
    assert (relay.request.prompt_token_ids, relay.token_ids) == ([1, 2, 3], [4, 5])


async def test_input_in_parts_is_refused(make_core: MakeCore) -> None:
    """A request id that is already running, which is how vLLM streams input, is refused and disturbs nothing."""
    core = await make_core(FakeHandle([[1, "wait"]]))
    await core.add_request_async(request())
    with pytest.raises(VLLMValidationError, match="several parts"):
        await core.add_request_async(request())
    assert core.in_flight == 1


async def test_what_does_not_work_is_a_client_error(make_core: MakeCore) -> None:
    """Every other call of vLLM's core client refuses with a client error that names it; unknown names do not exist."""
    core = await make_core(FakeHandle())
    with pytest.raises(VLLMValidationError, match=r"^sleep does not work"):
        await core.sleep_async(1)
    with pytest.raises(VLLMValidationError, match="collective_rpc"):
        await core.collective_rpc_async("method")
    with pytest.raises(VLLMValidationError, match="dp_engines_running"):
        core.dp_engines_running()
    with pytest.raises(AttributeError):
        core.no_such_method()


async def test_refuses_where_no_replica_answers(make_core: MakeCore) -> None:
    """With no replica there is a reason to refuse, which goes away when one answers."""

    def nobody() -> list[Any]:
        raise DeploymentUnavailableError(DeploymentID(name="m"))

    handle = FakeHandle(answers=nobody)
    core = await make_core(handle)
    await until(lambda: core.reachable == 0)
    assert "no replica of m" in (core.why_full(1) or "")


async def test_refuses_where_all_are_full(make_core: MakeCore) -> None:
    """A request that would not fit beside those in flight is refused with the numbers."""
    core = await make_core(FakeHandle([["wait"]] * 3))
    await until(lambda: core.reachable == 1)
    for request_id in "abc":
        await core.add_request_async(request(request_id))
    assert core.why_full(1) is None
    assert "3 of 4 requests" in (core.why_full(2) or "")


async def test_a_model_that_rests_is_started_by_who_waits(make_core: MakeCore) -> None:
    """Without a replica, where that is meant to be, nothing is refused: the first ones who wait cause a start, all of
    them the same one, and go on when a replica answers."""

    def nobody() -> list[Any]:
        raise DeploymentUnavailableError(DeploymentID(name="m"))

    handle = FakeHandle(answers=nobody)
    core = await make_core(handle)
    core._may_rest = True
    await until(lambda: core.rests)
    assert not await core.wake(0.01)
    waiting = [asyncio.create_task(core.wake(DEADLINE_S)) for _ in range(3)]
    await asyncio.sleep(0.01)
    handle.answers = lambda: [stats("a")]
    handle.started.set()
    assert await asyncio.gather(*waiting) == [True] * 3
    assert (handle.asked, core.why_full(1)) == (1, None)


async def test_a_model_that_should_not_rest_is_not_woken(make_core: MakeCore) -> None:
    """Its replicas are away for another reason, and it is refused."""
    handle = FakeHandle(answers=list)
    core = await make_core(handle)
    await until(lambda: core.reachable == 0)
    assert await core.wake(0.0)
    assert handle.asked == 0 and core.why_full(1)


async def test_a_stuck_replica_does_not_hide_the_others(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll that times out keeps the last count; only long silence reads as nobody."""
    monkeypatch.setattr(cluster.replica_poll, "POLL_PERIOD_S", 0.01)
    polls = iter(range(10**6))

    def answers() -> list[Any]:
        if next(polls) == 0:
            return [stats("a"), stats("b"), RuntimeError("one that failed")]
        raise TimeoutError

    core = await make_core(FakeHandle(answers=answers))
    await until(lambda: next(polls) > 5)
    assert core.reachable == 2
    monkeypatch.setattr(cluster.replica_poll, "STALE_AFTER_S", 0.0)
    await until(lambda: core.reachable == 0)


async def test_numbers_of_each_replica_are_put_out(make_core: MakeCore) -> None:
    """Each replica's scheduler statistics come out under an engine number of its own."""
    core = await make_core(FakeHandle(answers=lambda: [stats("a", running=3), stats("b", running=1, waiting=2)]))
    async with asyncio.timeout(DEADLINE_S):
        numbers = [await core.get_output_async() for _ in range(2)]
    assert sorted(map(gauges, numbers)) == [(0, 3, 0), (1, 1, 2)]


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not reached():  # noqa: ASYNC110  # what is waited for is plain state of the product, without an event
            await asyncio.sleep(0.001)


def gauges(outputs: EngineCoreOutputs) -> tuple[int, int, int]:
    scheduler = outputs.scheduler_stats
    assert scheduler is not None
    return outputs.engine_index, scheduler.num_running_reqs, scheduler.num_waiting_reqs


def test_engine_numbers_stay_with_their_replicas() -> None:
    """A replica keeps its number while it lives; a lost one's is set to zero once, and given to its successor."""
    slots = EngineSlots(2)
    first = {index: running for index, running, _ in map(gauges, slots.place([stats("a", 1), stats("b", 2)]))}
    assert sorted(first.values()) == [1, 2]
    number_of_b = next(index for index, running in first.items() if running == 2)
    lost = list(map(gauges, slots.place([stats("b", 5)])))
    assert sorted(lost) == sorted([(number_of_b, 5, 0), (1 - number_of_b, 0, 0)])
    assert list(map(gauges, slots.place([stats("b", 5)]))) == [(number_of_b, 5, 0)]
    assert (1 - number_of_b, 7, 0) in map(gauges, slots.place([stats("b", 5), stats("c", 7)]))


def test_more_replicas_than_numbers_wait() -> None:
    """A replica too many gets no number and takes none away."""
    slots = EngineSlots(1)
    assert list(map(gauges, slots.place([stats("a", 1)]))) == [(0, 1, 0)]
    assert list(map(gauges, slots.place([stats("a", 2), stats("b", 9)]))) == [(0, 2, 0)]
