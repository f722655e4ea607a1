"""The engine core that ``ClusterEngine`` talks to: a set of replicas behind a Ray Serve handle.

    AsyncLLM --add_request_async--> one Relay a request --generate()--> a replica, chosen by the request router
    AsyncLLM <--get_output_async--- everything that has arrived <------ one output channel a replica

The call to the replica lasts as long as the request and returns nothing: it is how Ray Serve bounds and counts
requests, cancels one, and notices that a replica has died. Outputs come over the replica's channel
(``cluster.output_inbox``), and the call returns when all have been received.

A relay (``cluster.relay``) holds the prompt and the token ids so far. A replica that dies, or does not answer before a
request's first token (``cluster.attempt_watch``), costs a retry on another one, which goes on after the last token
(``cluster.continuation``). Retries are bounded while no token comes, so that a request that kills its replicas ends
with an error, in vLLM's form, and is refused when it comes again (``cluster.suspects``); one that cannot be continued
ends so too. Each attempt has a ``Route``, by which it and the router know of each other.

A relay goes through the model's door (``cluster.door``), which may let it wait, before it goes to a replica. Where the
cluster ends a request by itself, refused or past its deadline, vLLM sees an abort, and the HTTP layer says why.

Requests move between replicas (``cluster.mover``): by hand, where a replica is to be empty (``cluster.evacuation``),
and from one that is full or late (``cluster.relief``).
"""

import asyncio
import contextvars
import inspect
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import msgspec
from ray.exceptions import ActorDiedError, RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from vllm.exceptions import VLLMValidationError
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import AsyncMPClient

from cluster.attempt_watch import unanswered
from cluster.bench.report import Slo
from cluster.continuation import continued
from cluster.crossing import CallAgent, Crossings
from cluster.door import Door
from cluster.engine_slots import EngineSlots
from cluster.errands import Errands
from cluster.evacuation import Evacuation
from cluster.migration import MigrationError
from cluster.move import Migrated, Trigger
from cluster.move_planner import MoveOrder
from cluster.mover import Mover
from cluster.output_inbox import OutputInbox
from cluster.prediction import PredictionError
from cluster.prompt_prefix import prefix_ids, prompt_length
from cluster.relay import ATTEMPTS_MOST, Relay
from cluster.relief import Relief
from cluster.replica_poll import follow_stats
from cluster.request_slo import CURRENT, Part
from cluster.resumption import Resumption
from cluster.route import Route
from cluster.routing_policy import RouteRequest
from cluster.suspects import Suspects
from cluster.tenancy import tenant_salt
from memory_agent.agent_calls import AgentCalls
from replicas.answer_journal import Mark
from replicas.channel_wire import InboxAddress
from replicas.hop import Frames, HopCodec
from replicas.migration_words import MOVED_PARAM, Arrival, Moved, with_word
from replicas.replica import ReplicaInfo, ReplicaStats

logger = logging.getLogger("ray.serve")

DRAIN_TIMEOUT_S = 3.0
WATCH_PERIOD_S = 0.5
AGAIN_S = 0.5
"""From an attempt that no replica has taken to the next one."""


@dataclass
class CoreResources:
    """The part of vLLM's client resources that AsyncLLM reads."""

    engine_dead: bool = False


class ClusterCore:
    """The replicas of one model as one engine core. Belongs to the event loop it is built on.

    Attributes:
        replicas: those that answered the last poll, as they were then; reachable: how many.
        retried: requests sent again before their first token; continued: likewise, after it.
        mover: what became of migrations; resumption: of requests whose clients have come again.
        ttft_error, tpot_error: of what the router has predicted.
    """

    def __init__(
        self,
        model: str,
        handle: DeploymentHandle[Any],
        info: ReplicaInfo,
        replicas: int,
        replica_limit: int,
        door: Door | None = None,
        may_rest: bool = False,
        routers: int = 1,
        call_agent: CallAgent | None = None,
    ) -> None:
        """``open`` is to be awaited before the first request.

        Args:
            model: name, for messages; info: what any replica says of itself.
            replicas: how many are meant to run at most: the number of engines that the metrics tell apart.
            replica_limit: requests that one replica takes at once.
            door: in front of them; None lets every request in at once.
            may_rest: there can be no replica, while nobody asks for one.
            routers: processes that have such a core of the model.
            call_agent: calls memory agents, by default through Ray.
        """
        self.door = door or Door()
        self.resources = CoreResources()
        self.engine_ranks_managed = list(range(replicas))
        self.reachable = replicas
        self.replicas: list[ReplicaStats] = []
        self.retried = self.continued = 0
        self.ttft_error, self.tpot_error = PredictionError(), PredictionError()
        self.model = model
        self._name = uuid4().hex
        self._handle = handle
        self._generate = handle.options(method_name="generate")
        self._info = info
        self._replica_limit = replica_limit
        self._may_rest = may_rest
        self._start: asyncio.Task[Any] | None = None
        self._codec = HopCodec()
        self._address: InboxAddress | None = None
        self._relays: dict[str, Relay] = {}
        self._by_ticket: dict[int, Relay] = {}
        self._tickets = itertools.count(1)
        self._inbox = OutputInbox(self._receive, lambda replica: self._errands.lost(replica))
        self._errands = Errands(self._inbox, self._call, self._tickets)
        crossings = Crossings(lambda: self.replicas, call_agent or AgentCalls())
        self.mover = Mover(
            model, self._relays, self._errands, lambda: self._slots.owners.values(), info.block_tokens, crossings
        )
        self._evacuation = Evacuation(self.mover, self._relays, self._recall)
        self._shut: set[str] = set()
        self._relief = Relief(self.mover, self._relays, self._recall, self._takes, 1 / routers)
        self._suspects = Suspects()
        self.resumption = Resumption(model, handle, self._put_out)
        self._outputs: list[EngineCoreOutput] = []
        self._stats: deque[EngineCoreOutputs] = deque()
        self._wake = asyncio.Event()
        self._slots = EngineSlots(replicas)
        poll = follow_stats(handle, self._name, lambda: self.door.waiting, self._take_stats)
        self._tasks = [asyncio.get_running_loop().create_task(work) for work in (poll, self._watch())]

    async def open(self, host: str) -> None:
        """Take outputs at ``host``, an address of this node that replicas can reach. Raises OSError."""
        self._address = await self._inbox.open(host)

    # What AsyncLLM calls

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Start relaying ``request``. Its outputs, errors among them, come out of ``get_output_async``."""
        if request.resumable or request.request_id in self._relays:
            raise VLLMValidationError("input that arrives in several parts does not work on a cluster of replicas yet")
        if (why := self._suspects.why_refused(request)) is not None:
            raise VLLMValidationError(why)
        owner = CURRENT.get()
        if owner is not None and owner.is_known:
            request.cache_salt = tenant_salt(owner.tenant, request.cache_salt)
        part = Part(len(request.prompt_token_ids or ()), partial(self._stop, request.request_id))
        mark = self.resumption.mark(owner, request)
        relay = self._relays[request.request_id] = Relay(request, part, mark)
        # A context of its own: Ray Serve would otherwise cancel the call with whatever request of its own happens to be
        # current here, beside the abort that vLLM sends anyway.
        relay.task = asyncio.get_running_loop().create_task(self._relay(relay), context=contextvars.Context())
        if owner is not None:
            owner.add(part)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._end(request_id)

    async def get_output_async(self) -> EngineCoreOutputs:
        """Everything received since the last call, as one step's outputs; waits for the first."""
        await self._wake.wait()
        if self._stats:
            return self._stats.popleft()
        self._wake.clear()
        outputs, self._outputs = self._outputs, []
        self._inbox.taken()
        return EngineCoreOutputs(outputs=outputs)

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return self._info.supported_tasks  # type: ignore[return-value]

    async def reset_mm_cache_async(self) -> None:
        """Nothing to do: multi-modal inputs do not cross the hop yet."""

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}

    def shutdown(self, timeout: float | None = None) -> None:
        self.resources.engine_dead = True
        for task in (*self._tasks, *([self._start] if self._start is not None else [])):
            task.cancel()
        self._evacuation.close()
        self._relief.close()
        self.door.close()
        self._inbox.close()
        for relay in self._relays.values():
            if relay.task is not None:
                relay.task.cancel()
        self._relays.clear()

    @property
    def replica_numbers(self) -> dict[int, str]:
        """Replicas by the engine number that vLLM's metrics have for each."""
        return self._slots.owners

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Everything else of vLLM's core client: a method that refuses with a client error (4xx)."""
        upstream = getattr(AsyncMPClient, name, None)
        if name.startswith("_") or not callable(upstream):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise VLLMValidationError(f"{name.removesuffix('_async')} does not work on a cluster of replicas yet")

        async def refuse_async(*args: Any, **kwargs: Any) -> Any:
            refuse()

        return refuse_async if inspect.iscoroutinefunction(upstream) else refuse

    # Capacity

    @property
    def rests(self) -> bool:
        """There is no replica, because nobody has asked for one."""
        return self._may_rest and self.reachable == 0

    async def wake(self, timeout_s: float) -> bool:
        """Have a replica where the model rests. False where none has started after so long; the start goes on."""
        if not self.rests:
            return True
        if self._start is None or self._start.done():
            # A call that waits for a replica is what Ray Serve starts one for.
            self._start = asyncio.get_running_loop().create_task(self._first_answer(), context=contextvars.Context())
        await asyncio.wait([self._start], timeout=timeout_s)
        return not self.rests

    async def _first_answer(self) -> None:
        try:
            await self._handle.info.remote()
            self.reachable = max(self.reachable, 1)  # the next poll counts them
            self.door.replicas(self.reachable, 0)
        except (RayError, RayServeException) as error:
            logger.warning("no replica of %s has started: %s", self.model, error)

    @property
    def in_flight(self) -> int:
        """Requests that replicas have, or are about to get; without those that wait at the door."""
        return len(self._relays) - self.door.waiting

    def why_full(self, n: int) -> str | None:
        """Why ``n`` more requests cannot be taken now, or None where they can."""
        if self.reachable == 0:
            return f"no replica of {self.model} can be reached now; try again in a few seconds"
        limit = self.reachable * self._replica_limit
        if self.in_flight + n > limit:
            return f"all replicas of {self.model} are full ({self.in_flight} of {limit} requests); try again later"
        return None

    # Relaying

    async def _relay(self, relay: Relay) -> None:
        request_id = relay.request.request_id
        try:
            if relay.mark is not None and await self.resumption.is_over(relay, self.door):
                return
            if not await self.door.enter(relay.part):
                return
            owner = relay.part.request
            slo = owner.slo if owner is not None else Slo()
            relay.tell_engine(slo)
            while (error := await self._try_in_turn(relay, slo)) is not None:
                if relay.moved is not None or relay.recalled:
                    await relay.await_kv()
                    continue
                if isinstance(error, RayActorError) and not relay.was_taken and relay.attempts < ATTEMPTS_MOST:
                    await self._wait_for_another(relay, error)
                    continue
                tokens = len(relay.token_ids)
                if isinstance(error, ActorDiedError) and not relay.has_answered:
                    self._suspect(relay)
                if (why := relay.why_over()) is not None:
                    logger.error("request %s ends in an error after %d tokens: %s; %s", request_id, tokens, error, why)
                    self._fail(relay)
                    return
                relay.retries_left -= 1
                self.retried += not tokens
                self.continued += tokens > 0
                logger.warning("request %s goes on elsewhere after %d tokens: %s", request_id, tokens, error)
        except Exception:  # a defect: its client must not wait for ever
            logger.exception("request %s ends in an error", request_id)
            self._fail(relay)
        finally:
            self.door.ended(relay.part)
            relay.landed.set()
            self._relays.pop(request_id, None)

    def _suspect(self, relay: Relay) -> None:
        """Its replica has died, and had given no token of it."""
        replica = relay.last_replica or ""
        party = sum(one.last_replica == replica and not one.has_answered for one in self._relays.values())
        relay.deaths += 1
        relay.is_cause = self._suspects.died_with(relay.request, relay.deaths, replica, party)

    async def _try_in_turn(self, relay: Relay, slo: Slo) -> Exception | None:
        async with self._suspects.in_turn(relay.request, relay.deaths):
            return await self._try_once(relay, slo)

    async def _wait_for_another(self, relay: Relay, error: RayActorError) -> None:
        """A dead replica, which Ray Serve takes to be there still, has not taken the request: as long as there is no
        other it waits, as it would for the first. Of deaths only so many may be, though: what kills a replica before it
        is taken must not go on for ever."""
        if not isinstance(error, ActorDiedError):
            relay.attempts -= 1
        logger.debug("request %s has not reached a replica: %s", relay.request_id, error)
        await asyncio.sleep(AGAIN_S)

    def _fail(self, relay: Relay) -> None:
        relay.part.failed = True
        self._put_out(EngineCoreOutput(relay.request.request_id, [], finish_reason=FinishReason.ERROR))

    async def _try_once(self, relay: Relay, slo: Slo) -> Exception | None:
        """Run the request, or what is left of it, on one replica. Returns what ended it early; None where it has
        finished."""
        request = continued(relay.request, relay.token_ids)
        owner = relay.part.request
        session = (owner.tenant, owner.session) if owner is not None and owner.session else None
        asks = RouteRequest(prompt_length(request), prefix_ids(request), slo, session)
        relay.ticket, relay.route = next(self._tickets), Route(asks, shut=self._shut)
        relay.fault, relay.given_up, relay.recalled = None, False, False
        relay.attempts, relay.base = relay.attempts + 1, len(relay.token_ids)
        relay.route.to, relay.wanted = relay.wanted if relay.wanted not in self._shut else None, None
        if (moved := relay.moved) is not None and request.sampling_params is not None:
            word = Arrival(moved.origin, moved.move, moved.computed)
            request = msgspec.structs.replace(request, sampling_params=with_word(request.sampling_params, word))
            relay.route.to, relay.moved, relay.attempts = relay.destination, None, relay.attempts - 1
        self._by_ticket[relay.ticket] = relay
        error: Exception | None = None
        call = self._call(self._codec.encode_request(request), relay.ticket, relay.route, relay.mark_so_far)
        try:
            await call
        except asyncio.CancelledError:
            if self._was_cancelled(relay):
                call.cancel()
                raise
            if relay.given_up:
                call.cancel()
            error = RuntimeError(relay.fault or "the replica cancelled the request")
        except (RayError, RayServeException) as caught:
            error = caught
        finally:
            self._by_ticket.pop(relay.ticket, None)  # what is still on its way from this replica is nobody's any more
            unreachable = isinstance(error, RayActorError)  # also in the middle of an answer
            if error is not None and not relay.recalled and (unreachable or not relay.has_answered):
                relay.route.failed()
            relay.route.ended(len(relay.token_ids) - relay.base)
        if relay.finished:
            self._check_prediction(relay.part, relay.route)
            return None
        return error or RuntimeError(relay.fault or "the replica ended the request early")

    def _call(self, frames: Frames, ticket: int, route: Route, mark: Mark | None = None) -> Any:
        """A replica's ``generate``, of the one that the router chooses."""
        return self._generate.remote(frames, self._address, ticket, route=route, mark=mark)

    def _give_up(self, relay: Relay, fault: str) -> None:
        """End its present attempt, which has that fault; there is none between two, and while it moves."""
        attempts = relay.route is not None and not relay.route.over and relay.moved is None
        if relay.task is not None and not relay.given_up and attempts:
            relay.fault, relay.given_up = fault, True
            self._by_ticket.pop(relay.ticket, None)
            relay.task.cancel()

    # Migration

    def _recall(self, relay: Relay, why: str) -> None:
        """End its present attempt, which has no fault."""
        relay.recalled = True
        self._give_up(relay, why)

    async def migrate(self, request_id: str, to: str) -> Migrated:
        """Move a running request to the replica ``to``, as somebody has asked. Raises MigrationError: it goes on where
        it is."""
        return await self.mover.move(request_id, to)

    def relieve(self, orders: Iterable[MoveOrder]) -> None:
        """Have requests go where the controller says that there is room for them; orders for other models count for
        nothing here."""
        self._relief.obey(orders)

    def _takes(self, replica: str) -> bool:
        """It is one of this model, and may get requests."""
        return replica in self._slots.owners.values() and replica not in self._shut

    def check_drain(self, replicas: Collection[str]) -> None:
        """Raises MigrationError where no other replica would take requests."""
        if not any(one for one in self.replicas if not one.draining and one.engine_id not in replicas):
            raise MigrationError(
                f"no other replica of {self.model} would take requests: have more of them first, or drain fewer"
            )

    async def drain(self, replicas: Collection[str], on: bool) -> None:
        """Have replicas of this model get no request while there are others, and their requests move; or let them have
        requests again. Raises MigrationError where one of them does not answer."""
        try:
            answers = await self._handle.broadcast("drain", sorted(replicas), on).results_async(
                timeout_s=DRAIN_TIMEOUT_S, return_exceptions=True
            )
        except (RayServeException, TimeoutError):
            answers = []
        if missing := set(replicas) - set(answers):
            raise MigrationError(f"{', '.join(sorted(missing))} did not answer", HTTPStatus.SERVICE_UNAVAILABLE)
        self._shut.update(replicas) if on else self._shut.difference_update(replicas)

    def stays_at(self, replica: str) -> dict[str, str]:
        """Why a request cannot leave that replica, by its id."""
        stays = self._evacuation.stays
        return {one: why for one, why in stays.items() if one in self._relays and self._relays[one].replica == replica}

    def _leaving(self) -> dict[str, Trigger]:
        """Replicas that are to be empty. Of those that Ray Serve ends it is the router that knows."""
        ending = [one.route.replica for one in self._relays.values() if one.route is not None]
        gone = {standing.replica_id: Trigger.STOP for standing in ending if standing is not None and standing.gone}
        return {**dict.fromkeys(self._shut, Trigger.DRAIN), **gone}

    def _check_prediction(self, part: Part, route: Route) -> None:
        self.ttft_error.observe(route.predicted_ttft_s, part.first_s - route.chosen_s)
        if part.tokens > 1:
            self.tpot_error.observe(route.predicted_tpot_s, part.tpot_s)

    @staticmethod
    def _was_cancelled(relay: Relay) -> bool:
        """Tells a cancellation of this task from one that came out of the stream, or that was ours: all are
        CancelledError."""
        task = asyncio.current_task()
        return task is not None and (task.uncancel() if relay.given_up else task.cancelling()) > 0

    def _end(self, request_id: str) -> bool:
        """Send it nowhere any more, and cancel it where it is. False where it has ended."""
        relay = self._relays.pop(request_id, None)
        if relay is None:
            return False
        self.door.ended(relay.part)
        if relay.task is not None:
            relay.task.cancel()
        return True

    def _stop(self, request_id: str) -> None:
        """The cluster ends it: vLLM sees an abort."""
        if self._end(request_id):
            self._put_out(EngineCoreOutput(request_id, [], finish_reason=FinishReason.ABORT))

    def _receive(self, ticket: int, offset: int, output: EngineCoreOutput, replica: str) -> None:
        """Called by the inbox with each output of a replica: it belongs behind the ``offset`` tokens that are there."""
        if self._errands.receive(ticket, output, replica):
            return
        relay = self._by_ticket.get(ticket)
        if relay is None or relay.finished or relay.fault is not None:
            return
        if offset != len(relay.token_ids) - relay.base:
            relay.fault = f"tokens from {offset} came after {len(relay.token_ids) - relay.base} tokens"
            return
        if (said := (output.kv_transfer_params or {}).get(MOVED_PARAM)) is not None:
            relay.moved = Moved(**said)
            output.finish_reason = output.kv_transfer_params = None
            if not output.new_token_ids:
                return
        elif relay.destination is not None and relay.replica == relay.destination and output.new_token_ids:
            relay.downtime_s = time.monotonic() - relay.token_s
            relay.landed.set()
        if not relay.has_answered and relay.route is not None:
            relay.route.first_token()
            self._suspects.answered(relay.request)
            relay.deaths = 0
        relay.token_ids.extend(output.new_token_ids)
        relay.part.tokens = len(relay.token_ids)
        relay.token_s = time.monotonic()
        if not offset and relay.token_ids:
            self.door.began(relay.part, replica)
        relay.finished = output.finished
        if relay.finished:
            self.door.ended(relay.part)
        self._put_out(output)

    def _put_out(self, output: EngineCoreOutput) -> None:
        self._outputs.append(output)
        self._wake.set()

    async def _watch(self) -> None:
        """Empty replicas that are to be empty, and give up attempts whose replica does not answer, for ever; not a
        request's last one: any answer is better then than none. A process that has stood still looks again before it
        blames others."""
        while True:
            looked_s = time.monotonic()
            await asyncio.sleep(WATCH_PERIOD_S)
            self._evacuation.look(self._leaving(), [one for one in self.replicas if not one.draining])
            if (now_s := time.monotonic()) - looked_s > 2 * WATCH_PERIOD_S:
                continue
            for relay, fault in unanswered(self._relays.values(), now_s):
                if not relay.is_last_attempt:
                    self._give_up(relay, fault)

    # Statistics and reachability

    def _take_stats(self, stats: list[ReplicaStats]) -> None:
        self.replicas, self.reachable = stats, len(stats)
        open_ones = [replica for replica in stats if not replica.draining] or stats
        self.door.replicas(len(open_ones), sum(replica.streams for replica in open_ones))
        self._shut.clear()
        self._shut.update(replica.engine_id for replica in stats if replica.draining)
        self._stats.extend(self._slots.place(stats))
        if self._stats:
            self._wake.set()
