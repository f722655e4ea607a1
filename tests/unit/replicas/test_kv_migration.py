"""A running request moves from one engine to another with its KV. Engines without a model, in which every position of
every block counts, so that a token that is wrong, lost or told twice is found."""

import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from memory_agent.lease_board import AgentWord, Lease, LeaseBoard
from replicas.kv_arrivals import PIN_S, WAIT_S
from replicas.kv_push import IDLE_S
from replicas.migration_words import (
    ANSWER_PARAM,
    MOVED_PARAM,
    Arrival,
    Moved,
    PushAnswer,
    PushOrder,
    with_word,
)
from replicas.vllm_adapter import preempt
from tests.unit.replicas.fake_transport import FakeTransport, Shared
from tests.unit.replicas.modelless_engine import BLOCK_TOKENS, STEP_S, Clock, ModellessEngine, modelless_spec
from tests.unit.replicas.modelless_worker import expected_tokens

LIMIT_BLOCKS = 40

both_schedulers = pytest.mark.parametrize("asynchronous", [False, True])


class Pair:
    """A source, a destination, and what the cluster does between them: a request's tokens end up in ``told``."""

    def __init__(self, folder: Path, asynchronous: bool, ranks: int = 1, host_blocks: int = 0) -> None:
        spec = replace(modelless_spec(folder, ranks, host_blocks=host_blocks), async_scheduling=asynchronous)
        board, clock = LeaseBoard.create(folder / "board", 4 * ranks * spec.kv_ceiling_bytes), Clock()
        other = self.other_board(board, 4 * ranks * spec.kv_ceiling_bytes)
        for row in (board.row(0), other.row(1)):
            row.set(AgentWord.LEASE, Lease(spec.kv_guarantee_bytes, 1).pack())
        self.source = ModellessEngine(board.path, 0, clock, spec, ranks)
        self.destination = ModellessEngine(other.path, 1, clock, spec, ranks)
        for engine in self.engines:
            engine.set_limit(LIMIT_BLOCKS)
            engine.migration.push._clock = engine.migration.arrivals._clock = clock
        self._numbers = itertools.count()
        self.moved: Moved | None = None
        self.prompt: list[int] = []
        self.params = SamplingParams(max_tokens=1, ignore_eos=True)
        self.adapter: LoRARequest | None = None
        self.salt: str | None = None

    def other_board(self, board: LeaseBoard, budget_bytes: int) -> LeaseBoard:
        """The destination's: on one node, that of the source."""
        return board

    def bring(self, origin: str, until: str = "") -> str:
        """What is staged at the source's ``origin`` gets to the destination's node: the origin there."""
        return origin

    @property
    def engines(self) -> tuple[ModellessEngine, ModellessEngine]:
        return self.source, self.destination

    @property
    def told(self) -> list[int]:
        return self.source.tokens["r"] + self.destination.tokens["r"]

    def with_fakes(self) -> tuple[FakeTransport, FakeTransport]:
        """Replace the transports of both engines, of one rank, by fakes."""
        shared: Shared = {}
        fakes = FakeTransport("source", shared), FakeTransport("destination", shared)
        for engine, fake in zip(self.engines, fakes, strict=True):
            engine.workers[0].migration._transport = fake
            engine.migration.arrivals._arrived = fake.arrived
            engine.migration.push._origin = fake.origin
        return fakes

    def ask(self, prompt: int, tokens: int) -> None:
        """Request "r" at the source."""
        self.prompt = random.Random("r").choices(range(100), k=prompt)
        self.params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        self._add(self.source, "r", self.prompt, self.params)

    def step(self, count: int = 1) -> None:
        """Of both engines, with their books checked."""
        for _ in range(count):
            for engine in self.engines:
                engine.step()
                engine.check()

    def decode(self, tokens: int) -> None:
        """Until the client has so many tokens of "r"."""
        while len(self.told) < tokens:
            self.step()

    def order(self, **fields: object) -> PushAnswer:
        """Give the source an order; its answer."""
        command = f"order-{next(self._numbers)}"
        order = PushOrder(**{"request_id": "r", "move": "m", **fields})  # type: ignore[arg-type]
        self._add(self.source, command, [0], with_word(SamplingParams(max_tokens=1), order))
        for _ in range(200):
            if command in self.source.ended:
                return PushAnswer(**self.source.ended[command].kv_transfer_params[ANSWER_PARAM])
            self.step()
        raise AssertionError("no answer")

    def ahead(self, answer: PushAnswer) -> None:
        """The destination takes what is staged."""
        name = f"warm-up-{next(self._numbers)}"
        computed = answer.staged * BLOCK_TOKENS
        word = Arrival(self.bring(answer.origin), "m", computed, pin=True)
        tokens = (self.prompt + self.told)[: computed + 1]
        self._add(self.destination, name, tokens, with_word(SamplingParams(max_tokens=1, ignore_eos=True), word))
        for _ in range(400):
            if name in self.destination.finished:
                return
            self.step()
        raise AssertionError("the destination has no room")

    def rounds(self) -> PushAnswer:
        """Until all but a block or so is at the destination."""
        taken = 0
        while True:
            answer = self.order(taken=taken)
            if answer.error is not None or answer.staged == taken:
                return answer
            self.ahead(answer)
            taken = answer.staged

    def switch(self) -> PushAnswer:
        """The request stops at the source, and goes on at the destination where it does."""
        answer = self.order(switch=True)
        if answer.error is None:
            self.go_on()
        return answer

    def go_on(self) -> None:
        params = self.source.ended["r"].kv_transfer_params
        assert params is not None
        self.moved = Moved(**params[MOVED_PARAM])
        told = self.source.tokens["r"]
        rest = self.params.clone()
        assert self.params.max_tokens is not None
        rest.max_tokens = self.params.max_tokens - len(told)
        word = Arrival(self.bring(self.moved.origin, self.moved.last), self.moved.move, self.moved.computed)
        self._add(self.destination, "r", self.prompt + told, with_word(rest, word))

    def run(self) -> None:
        """Both engines, until they have nothing to do."""
        while any(engine.scheduler.has_requests() for engine in self.engines):
            self.step()

    def finish(self) -> None:
        """Both engines to their end; then nothing is held, and the client has what it would have had."""
        self.run()
        if self.source.migration.push.name:
            self.order(end=True)
        self.source.clock.now_s += PIN_S + IDLE_S
        self.ask_something_else()
        for engine in self.engines:
            engine.run()
            engine.settle(1.0)
            engine.check()
            assert not engine.migration.busy
            assert not engine.migration.arrivals.doubts
            assert engine.migration.arrivals.pinned_blocks == 0
            assert not engine.migration.arrivals._asked
            assert engine.migration.push.free_places == engine.scheduler._elastic_connector._staging_places
        assert self.told == expected_tokens(tuple(self.prompt), self.params.max_tokens or 0)

    def ask_something_else(self) -> None:
        for engine in self.engines:
            self._add(engine, f"other-{next(self._numbers)}", [1] * 40, SamplingParams(max_tokens=2, ignore_eos=True))

    def _add(self, engine: ModellessEngine, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        engine.prompts[request_id] = list(prompt)
        engine.scheduler.add_request(
            Request(
                request_id,
                list(prompt),
                params,
                None,
                lora_request=self.adapter,
                cache_salt=self.salt,
                block_hasher=engine._hasher,
            )
        )

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


@contextmanager
def pair(asynchronous: bool = False, ranks: int = 1, host_blocks: int = 0) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory() as folder:
        engines = Pair(Path(folder), asynchronous, ranks, host_blocks)
        try:
            yield engines
        finally:
            engines.close()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("host_blocks", [0, 50])
@both_schedulers
def test_a_request_moves_while_it_decodes(asynchronous: bool, host_blocks: int, ranks: int) -> None:
    with pair(asynchronous, ranks, host_blocks) as two:
        two.ask(prompt=150, tokens=200)
        two.decode(30)
        assert two.rounds().error is None
        assert two.switch().error is None
        two.finish()
        assert two.destination.first_steps["r"] == 1
        assert 30 <= len(two.source.tokens["r"]) < 60


def leave_everywhere(make: Callable[[], AbstractContextManager[Pair]]) -> None:
    """Move a request from each third place in a block, and find nothing but its newest token computed."""
    left = set()
    for tokens in range(1, BLOCK_TOKENS + 2, 3):
        with make() as two:
            two.ask(prompt=70, tokens=80)
            two.decode(tokens)
            two.rounds()
            assert two.switch().error is None
            assert two.moved is not None
            left.add(two.moved.computed % BLOCK_TOKENS)
            two.finish()
            assert two.destination.first_steps["r"] == 1
    assert len(left) > 5


@both_schedulers
def test_every_place_in_a_block_is_a_good_place_to_leave(asynchronous: bool) -> None:
    leave_everywhere(lambda: pair(asynchronous))


@both_schedulers
def test_a_prompt_moves_while_it_is_computed(asynchronous: bool) -> None:
    with pair(asynchronous) as two:
        two.source.scheduler._token_bound = 40
        two.ask(prompt=450, tokens=20)
        two.step(4)
        assert two.order().error is None
        assert two.switch().error is None
        assert two.source.tokens["r"] == []
        assert two.moved is not None and 0 < two.moved.computed < 450
        two.finish()
        assert two.destination.first_steps["r"] == 450 - two.moved.computed


@pytest.mark.parametrize("other", ["adapter", "salt"])
def test_only_the_same_adapter_and_tenant_find_it(other: str) -> None:
    for same in (True, False):
        with pair() as two:
            if other == "adapter":
                two.adapter = LoRARequest("one", 1, "/nowhere")
            else:
                two.salt = "one"
            two.ask(prompt=100, tokens=60)
            two.decode(5)
            answer = two.order()
            if not same:
                two.adapter, two.salt = None, "another" if other == "salt" else None
            two.ahead(answer)
            assert (two.destination.migration.arrivals.loaded_blocks > 0) == same
            if same:
                assert two.switch().error is None
            two.finish()


def test_what_was_pushed_is_pinned_until_the_request_takes_it() -> None:
    with pair() as two:
        two.ask(prompt=150, tokens=100)
        two.decode(10)
        two.rounds()
        arrivals = two.destination.migration.arrivals
        assert arrivals.pinned_blocks == (150 + 10) // BLOCK_TOKENS
        two.destination.ask("greedy", prompt=400, tokens=60)
        two.destination.ask("also greedy", prompt=400, tokens=60)
        two.step(30)
        assert two.switch().error is None
        two.run()
        assert two.destination.first_steps["r"] == 1
        assert arrivals.pinned_blocks == 0
        two.finish()


def test_pins_end_when_nobody_comes() -> None:
    with pair() as two:
        two.ask(prompt=150, tokens=30)
        two.decode(10)
        two.rounds()
        assert two.destination.migration.arrivals.pinned_blocks > 0
        two.finish()


def test_few_places_hold_the_source_back() -> None:
    with pair() as two:
        two.source.migration.push._free = [0, 1, 2]
        two.ask(prompt=250, tokens=60)
        two.decode(5)
        assert two.order().staged == 3
        refused = two.order(switch=True)
        assert refused.error is not None and "have not gone ahead" in refused.error
        assert two.rounds().error is None
        assert two.switch().error is None
        two.run()
        assert two.destination.first_steps["r"] == 1
        assert two.told == expected_tokens(tuple(two.prompt), 60)


@both_schedulers
@pytest.mark.parametrize("call", ["send", "arrived", "receive"])
def test_a_transport_that_fails_at_any_call_costs_no_token(call: str, asynchronous: bool) -> None:
    """Whichever call fails, in the rounds or at the switch, the request goes on: at the source, or by computing."""
    for at in range(9):
        with pair(asynchronous) as two:
            source, destination = two.with_fakes()
            (source if call == "send" else destination).plan = {call: at}
            two.ask(prompt=150, tokens=60)
            two.decode(10)
            answer = two.rounds()
            if answer.error is None:
                two.switch()
            two.finish()
            if at < 5 and call != "arrived":
                assert source.failed + destination.failed == [call]


@both_schedulers
def test_kv_that_never_comes_is_computed(asynchronous: bool) -> None:
    """The source dies between its last word and its last copy."""
    with pair(asynchronous) as two:
        two.ask(prompt=150, tokens=60)
        two.decode(10)
        two.rounds()
        two.source.workers[0].migration.store = lambda work: None  # type: ignore[method-assign]
        two.order(switch=True)
        two.go_on()
        began_s = two.destination.clock()
        while "r" not in two.destination.first_steps:
            two.destination.step()
        assert two.destination.clock() - began_s == pytest.approx(WAIT_S, abs=3 * STEP_S)
        two.destination.run()
        assert two.told == expected_tokens(tuple(two.prompt), 60)
        assert two.destination.first_steps["r"] > 1


@both_schedulers
@pytest.mark.parametrize("how", ["finishes", "is aborted", "is preempted"])
@pytest.mark.parametrize("when", ["at the start", "between rounds", "before the switch"])
def test_a_request_that_ends_or_waits_is_not_moved(when: str, how: str, asynchronous: bool) -> None:
    with pair(asynchronous) as two:
        two.ask(prompt=150, tokens=60)
        two.decode(10)
        if when != "at the start":
            two.order()
        if when == "before the switch":
            two.rounds()
        if how == "finishes":
            two.source.run()
        elif how == "is aborted":
            two.source.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
        else:
            two.source.set_limit(18)
            preempt(two.source.scheduler, two.source.scheduler.requests["r"])
            two.source.scheduler.max_num_active_reqs = 0
        answer = two.order(switch=True) if when == "before the switch" else two.order()
        assert answer.error == ("it waits for memory at its replica" if how == "is preempted" else "it has finished")
        if how != "is aborted":
            two.source.scheduler.max_num_active_reqs = 8
            two.finish()


def test_orders_that_cannot_be_carried_out() -> None:
    with pair() as two:
        assert two.order(request_id="nobody").error == "it has finished"
        two.ask(prompt=150, tokens=100)
        two.source.ask("s", prompt=50, tokens=100)
        two.decode(10)
        assert two.order(switch=True).error == "the migration has ended"
        assert two.order().error is None
        assert two.order(move="n").error == "the request is being moved already"
        other = two.order(request_id="s", move="n").error
        assert other is not None and "one leaves at a time" in other
        assert two.order(end=True).error is None
        assert two.order(request_id="s", move="n").error is None
        assert two.order(request_id="s", move="n", end=True).error is None
        two.finish()


def test_a_migration_of_which_nothing_is_heard_ends() -> None:
    with pair() as two:
        two.ask(prompt=150, tokens=100)
        two.decode(10)
        two.order()
        two.source.clock.now_s += IDLE_S
        two.step(3)
        assert two.source.migration.push.name == ""
        two.finish()
