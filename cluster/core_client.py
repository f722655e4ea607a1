"""The engine core that ``ClusterEngine`` talks to: a set of replicas behind a Ray Serve handle.

    AsyncLLM --add_request_async--> one Relay a request --generate()--> a replica, chosen by the request router
    AsyncLLM <--get_output_async--- everything that has arrived <------ one output channel a replica

The call to the replica lasts as long as the request and returns nothing: it is how Ray Serve bounds and counts
requests, cancels one, and notices that a replica has died. Outputs come over the replica's channel
(``cluster.output_inbox``), and the call returns when all have been received.

A relay holds the prompt and the token ids so far. A replica that dies, or does not answer before a request's first
token (``cluster.attempt_watch``), costs a retry on another one, which goes on after the last token
(``cluster.continuation``). Retries are bounded while no token comes, so that a request that kills its replicas ends
with an error, in vLLM's form; so does one that cannot be continued. Each attempt has a ``Route``, by which it and the
router know of each other.

A relay goes through the model's door (``cluster.door``), which may let it wait, before it goes to a replica. Where the
cluster ends a request by itself, refused or past its deadline, vLLM sees an abort, and the HTTP layer says why.
"""

import asyncio
import contextvars
import inspect
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from vllm.exceptions import VLLMValidationError
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import AsyncMPClient

from cluster.attempt_watch import unanswered
from cluster.bench.report import Slo
from cluster.continuation import continued, why_final
from cluster.door import Door
from cluster.engine_slots import EngineSlots
from cluster.migration import Migrated, MigrationError, Rounds
from cluster.output_inbox import OutputInbox
from cluster.prediction import PredictionError
from cluster.prompt_prefix import prefix_ids, prompt_length
from cluster.request_slo import CURRENT, Part
from cluster.route import Route
from cluster.routing_policy import RouteRequest
from cluster.tenancy import tenant_salt
from replicas.channel_wire import InboxAddress
from replicas.hop import TPOT_TARGET_ARG, TTFT_TARGET_ARG, HopCodec
from replicas.migration_words import MOVED_PARAM, Arrival, Moved, with_word, without_words
from replicas.replica import ReplicaInfo, ReplicaStats

logger = logging.getLogger("ray.serve")

RETRIES = 2
"""Of a request that gets no token meanwhile."""
ATTEMPTS_MOST = 8
"""Of any request: one that kills its replica after a token each time must not go on for ever."""
POLL_PERIOD_S = 1.0
POLL_TIMEOUT_S = 3.0
STALE_AFTER_S = 15.0
WATCH_PERIOD_S = 0.5
ERRAND_S = 10.0
"""For a replica to do its part of a migration's round."""


@dataclass
class Relay:
    """One request on its way: enough to send it again."""

    request: EngineCoreRequest
    part: Part
    """Of the HTTP request whose context it came in: its targets are ``part.request.slo``."""
    task: "asyncio.Task[None] | None" = None
    token_ids: list[int] = field(default_factory=list)
    """Output ids received so far; prompt and these are what another replica would need to go on."""
    finished: bool = False
    fault: str | None = None
    """What is wrong with its outputs, or with its replica, where something is."""
    retries_left: int = RETRIES
    attempts: int = 0
    base: int = 0
    """Tokens that there were when the present attempt began."""
    route: Route | None = None
    """Of the present attempt; ticket: likewise."""
    ticket: int = 0
    given_up: bool = False
    """The present attempt is being cancelled for its fault, and not by the client."""
    seen: int = 0
    """Tokens at the last look of ``cluster.attempt_watch``."""
    destination: str | None = None
    """The replica that it is being moved to."""
    moved: Moved | None = None
    """Its replica has let it go, and no attempt has followed yet."""
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    """After it has moved it has brought a token, or has ended."""

    @property
    def has_answered(self) -> bool:
        """The present attempt has brought a token."""
        return len(self.token_ids) > self.base

    @property
    def is_last_attempt(self) -> bool:
        """No other may follow the present one, unless it brings a token."""
        return not self.retries_left or self.attempts == ATTEMPTS_MOST

    def is_at(self, replica: str) -> bool:
        """The present attempt runs, or is meant to run, there."""
        standing = self.route.replica if self.route is not None else None
        return standing is not None and standing.replica_id == replica

    def why_over(self) -> str | None:
        """Why the attempt that has failed was the last; None where another one may help."""
        if self.has_answered:
            self.retries_left = RETRIES
        if self.is_last_attempt:
            return f"{self.attempts} attempts have failed"
        return why_final(self.request) if self.token_ids else None


@dataclass
class CoreResources:
    """The part of vLLM's client resources that AsyncLLM reads."""

    engine_dead: bool = False


class ClusterCore:
    """The replicas of one model as one engine core. Belongs to the event loop it is built on.

    Attributes:
        reachable: replicas that answered the last poll.
        retried: requests sent again before their first token; continued: likewise, after it; migrated: requests that
            have left their replica for another one.
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
    ) -> None:
        """``open`` is to be awaited before the first request.

        Args:
            model: name, for messages; info: what any replica says of itself.
            replicas: how many are meant to run at most: the number of engines that the metrics tell apart.
            replica_limit: requests that one replica takes at once.
            door: in front of them; None lets every request in at once.
            may_rest: there can be no replica, while nobody asks for one.
        """
        self.door = door or Door()
        self.resources = CoreResources()
        self.engine_ranks_managed = list(range(replicas))
        self.reachable = replicas
        self.retried = self.continued = self.migrated = 0
        self.ttft_error, self.tpot_error = PredictionError(), PredictionError()
        self._model = model
        self._name = uuid4().hex
        self._handle = handle
        self._generate = handle.options(method_name="generate")
        self._info = info
        self._replica_limit = replica_limit
        self._may_rest = may_rest
        self._start: asyncio.Task[Any] | None = None
        self._codec = HopCodec()
        self._inbox = OutputInbox(self._receive)
        self._address: InboxAddress | None = None
        self._relays: dict[str, Relay] = {}
        self._by_ticket: dict[int, Relay] = {}
        self._errands: dict[int, asyncio.Future[tuple[str, EngineCoreOutput]]] = {}
        self._tickets = itertools.count(1)
        self._outputs: list[EngineCoreOutput] = []
        self._stats: deque[EngineCoreOutputs] = deque()
        self._wake = asyncio.Event()
        self._slots = EngineSlots(replicas)
        self._tasks = [asyncio.get_running_loop().create_task(work) for work in (self._poll(), self._watch())]

    async def open(self, host: str) -> None:
        """Take outputs at ``host``, an address of this node that replicas can reach. Raises OSError."""
        self._address = await self._inbox.open(host)

    # What AsyncLLM calls

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Start relaying ``request``. Its outputs, errors among them, come out of ``get_output_async``."""
        if request.resumable or request.request_id in self._relays:
            raise VLLMValidationError("input that arrives in several parts does not work on a cluster of replicas yet")
        owner = CURRENT.get()
        if owner is not None and owner.is_known:
            request.cache_salt = tenant_salt(owner.tenant, request.cache_salt)
        part = Part(len(request.prompt_token_ids or ()), partial(self._stop, request.request_id))
        relay = self._relays[request.request_id] = Relay(request, part)
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
            logger.warning("no replica of %s has started: %s", self._model, error)

    @property
    def in_flight(self) -> int:
        """Requests that replicas have, or are about to get; without those that wait at the door."""
        return len(self._relays) - self.door.waiting

    def why_full(self, n: int) -> str | None:
        """Why ``n`` more requests cannot be taken now, or None where they can."""
        if self.reachable == 0:
            return f"no replica of {self._model} can be reached now; try again in a few seconds"
        limit = self.reachable * self._replica_limit
        if self.in_flight + n > limit:
            return f"all replicas of {self._model} are full ({self.in_flight} of {limit} requests); try again later"
        return None

    # Relaying

    async def _relay(self, relay: Relay) -> None:
        request_id = relay.request.request_id
        try:
            if not await self.door.enter(relay.part):
                return
            owner = relay.part.request
            slo = owner.slo if owner is not None else Slo()
            _tell_engine(relay.request, slo)
            while (error := await self._try_once(relay, slo)) is not None:
                if relay.moved is not None:
                    continue
                tokens = len(relay.token_ids)
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
        relay.ticket, relay.route = next(self._tickets), Route(asks)
        relay.fault, relay.given_up = None, False
        relay.attempts, relay.base = relay.attempts + 1, len(relay.token_ids)
        if (moved := relay.moved) is not None and request.sampling_params is not None:
            word = Arrival(moved.origin, moved.move, moved.computed)
            request = msgspec.structs.replace(request, sampling_params=with_word(request.sampling_params, word))
            relay.route.to, relay.moved, relay.attempts = relay.destination, None, relay.attempts - 1
        self._by_ticket[relay.ticket] = relay
        error: Exception | None = None
        call: Any = self._generate.remote(
            self._codec.encode_request(request), self._address, relay.ticket, route=relay.route
        )
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
            if error is not None and not relay.has_answered:
                relay.route.failed()
            relay.route.ended(len(relay.token_ids) - relay.base)
        if relay.finished:
            self._check_prediction(relay.part, relay.route)
            return None
        return error or RuntimeError(relay.fault or "the replica ended the request early")

    # Migration

    async def migrate(self, request_id: str, to: str) -> Migrated:
        """Move a running request to the replica ``to`` while its tokens stream; returns when it has a token from there,
        or has ended. Raises MigrationError: it goes on where it is."""
        relay = self._movable(request_id, to)
        assert relay.route is not None and relay.route.replica is not None
        source = relay.route.replica.replica_id
        rounds = Rounds(self._run_at, relay.request, relay.token_ids, source, to, self._info.block_tokens)
        relay.destination = to
        relay.landed.clear()
        try:
            await rounds.push()
            await rounds.switch()
            await asyncio.wait_for(relay.landed.wait(), ERRAND_S)
        except TimeoutError:
            raise MigrationError(f"{to} has brought no token after {ERRAND_S:.0f} s; it may go on elsewhere") from None
        finally:
            relay.destination = None
            await rounds.end()
        return Migrated(request_id, source, to, rounds.ahead, rounds.done)

    def has(self, request_id: str) -> bool:
        """A request of this id runs here."""
        return bool(self._named(request_id))

    def _named(self, request_id: str) -> list[Relay]:
        """The relays of a request: vLLM makes one of each answer, and adds to its client's id."""
        return [
            relay
            for one, relay in self._relays.items()
            if not relay.finished
            and (one == request_id or one.startswith(f"{request_id}-") or relay.request.external_req_id == request_id)
        ]

    def _movable(self, request_id: str, to: str) -> Relay:
        """The relay of a request that can be moved to ``to``. Raises MigrationError."""
        mine = self._named(request_id)
        if not mine:
            raise MigrationError(
                f"no request {request_id} runs here: it has finished, or never was", HTTPStatus.NOT_FOUND
            )
        if len(mine) > 1:
            raise MigrationError(f"{request_id} has {len(mine)} answers: name one of {sorted(map(_id_of, mine))}")
        relay, there = mine[0], sorted(self._slots.owners.values())
        if to not in there:
            raise MigrationError(
                f"{self._model} has no replica {to}; it has {', '.join(there) or 'none now'}", HTTPStatus.NOT_FOUND
            )
        if relay.destination is not None:
            raise MigrationError(f"request {request_id} is being moved to {relay.destination} already")
        if relay.route is None or relay.route.replica is None:
            raise MigrationError(f"request {request_id} waits for a replica: there is nothing to move")
        if relay.is_at(to):
            raise MigrationError(f"request {request_id} is at {to} already")
        if (why := why_final(relay.request)) is not None:
            raise MigrationError(f"request {request_id} cannot be moved: {why}")
        return relay

    async def _run_at(self, replica: str, request: EngineCoreRequest) -> EngineCoreOutput:
        """Run a request of our own there. Raises MigrationError."""
        ticket, route = next(self._tickets), Route(RouteRequest(1), to=replica, only=True)
        errand: asyncio.Future[tuple[str, EngineCoreOutput]] = asyncio.get_running_loop().create_future()
        self._errands[ticket] = errand
        call: Any = self._generate.remote(self._codec.encode_request(request), self._address, ticket, route=route)
        work: asyncio.Future[Any] = asyncio.ensure_future(_awaited(call))
        try:
            waiting: list[asyncio.Future[Any]] = [errand, work]
            await asyncio.wait(waiting, timeout=ERRAND_S, return_when=asyncio.FIRST_COMPLETED)
            if not errand.done():
                why = work.exception() if work.done() and not work.cancelled() else "it is full, or does not answer"
                raise MigrationError(f"replica {replica} cannot be used: {why}", HTTPStatus.SERVICE_UNAVAILABLE)
            who, output = errand.result()
            if who != replica:
                raise MigrationError(f"replica {replica} cannot be reached", HTTPStatus.SERVICE_UNAVAILABLE)
            return output
        finally:
            self._errands.pop(ticket, None)
            route.ended(0)
            if not errand.done():
                errand.cancel()
                call.cancel()
                work.cancel()

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
        if (errand := self._errands.get(ticket)) is not None:
            if output.finished and not errand.done():
                errand.set_result((replica, output))
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
            self.migrated += 1
            if not output.new_token_ids:
                return
        elif relay.destination is not None and relay.is_at(relay.destination) and output.new_token_ids:
            relay.landed.set()
        if not relay.has_answered and relay.route is not None:
            relay.route.first_token()
        relay.token_ids.extend(output.new_token_ids)
        relay.part.tokens = len(relay.token_ids)
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
        """Give up attempts whose replica does not answer, for ever; not a request's last one: any answer is better then
        than none. A process that has stood still looks again before it blames others."""
        while True:
            looked_s = time.monotonic()
            await asyncio.sleep(WATCH_PERIOD_S)
            if (now_s := time.monotonic()) - looked_s > 2 * WATCH_PERIOD_S:
                continue
            for relay, fault in unanswered(self._relays.values(), now_s):
                if relay.task is not None and not relay.is_last_attempt and not relay.given_up:
                    relay.fault, relay.given_up = fault, True
                    self._by_ticket.pop(relay.ticket, None)
                    relay.task.cancel()

    # Statistics and reachability

    async def _poll(self) -> None:
        """Ask every replica for its numbers once a second, for ever."""
        answered_s = time.monotonic()
        while True:
            started_s = time.monotonic()
            try:
                answers = await self._handle.broadcast("stats", self._name, self.door.waiting).results_async(
                    timeout_s=POLL_TIMEOUT_S, return_exceptions=True
                )
                answered_s = started_s
            except RayServeException:  # there is no replica at all
                answers, answered_s = [], started_s
            except TimeoutError:
                answers = None  # one of them is stuck, which says nothing of the others: keep the last count a while
            if answers is not None:
                self._take_stats([answer for answer in answers if isinstance(answer, ReplicaStats)])
            elif started_s - answered_s > STALE_AFTER_S:
                self._take_stats([])
            await asyncio.sleep(max(0.0, started_s + POLL_PERIOD_S - time.monotonic()))

    def _take_stats(self, stats: list[ReplicaStats]) -> None:
        self.reachable = len(stats)
        self.door.replicas(len(stats), sum(replica.streams for replica in stats))
        self._stats.extend(self._slots.place(stats))
        if self._stats:
            self._wake.set()


def _tell_engine(request: EngineCoreRequest, slo: Slo) -> None:
    """Put the targets where the engine looks for them."""
    if (params := request.sampling_params) is None:
        return
    params.extra_args = without_words(params.extra_args)
    targets = {TTFT_TARGET_ARG: slo.ttft_ms, TPOT_TARGET_ARG: slo.tpot_ms}
    known = {name: target for name, target in targets.items() if target is not None}
    if known:
        params.extra_args = {**(params.extra_args or {}), **known}


async def _awaited(call: Any) -> None:
    await call


def _id_of(relay: Relay) -> str:
    return relay.request.request_id
