"""A real engine starts beside one that uses nearly the whole budget; the operating system's numbers decide."""

import asyncio
import dataclasses
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.config import ClusterConfig, ModelConfig
from cluster.models import read_facts, resolve_source
from cluster.sizing import GIB, plan_sizes
from memory_agent.agent import Registration
from memory_agent.lease_board import EngineWord, LeaseBoard, Row
from memory_agent.tenant import EngineTerms
from replicas.board_link import wait_for_lease
from replicas.lease_watch import WakePolicy, watch_lease
from replicas.local_agent import LocalAgent, local_agent
from replicas.local_engine import LocalEngine, local_engine_at
from replicas.spec import EngineSpec
from tests.integration.shaken_engine import prompts

pytestmark = pytest.mark.slow

IDS = range(1000, 40000)
REQUESTS, TOKENS = 16, 250
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


def sized_spec() -> EngineSpec:
    """The default model in float32, as a cluster sizes it, and small enough that two engines fight over the budget."""
    model = ModelConfig(replicas=2, dtype="float32", max_model_len=1024, max_num_seqs=REQUESTS)
    facts = read_facts(resolve_source(model.source, lambda line: None), model)
    (spec,) = plan_sizes(ClusterConfig(models=[model]), [facts], 100 * GIB).specs
    ceiling = 3 * spec.kv_guarantee_bytes + spec.spike_bytes
    return dataclasses.replace(spec, kv_ceiling_bytes=ceiling // spec.kv_rest_bytes * spec.kv_rest_bytes)


class Watched:
    """What the operating system says of both engines, 100 times a second until the second one is live.

    held: KV bytes of the first engine, and of each new process the bytes that no file backs.
    """

    def __init__(self, first: LocalEngine, second: Row) -> None:
        self._first, self._second = first, second
        self._known = {child.pid for child in psutil.Process().children(recursive=True)}
        self.held: list[tuple[int, dict[int, int]]] = []

    def sample(self) -> None:
        new = [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in self._known]
        if not self._second.get(EngineWord.PID):
            self.held.append((self._first.held_bytes_os(), {pid: anonymous_bytes(pid) for pid in new}))


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(kib) * 1024 for kib in _ANONYMOUS.findall(status))


@contextmanager
def watched(first: LocalEngine, second: Row) -> Iterator[Watched]:
    watch, stop = Watched(first, second), threading.Event()

    def run() -> None:
        while not stop.wait(0.01):
            watch.sample()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()


def register(agent: LocalAgent, spec: EngineSpec, engine_id: str) -> tuple[Registration, Row]:
    sizes = (spec.guarantee_bytes, spec.ceiling_bytes, spec.weights_bytes)
    terms = EngineTerms(engine_id, "model", *sizes, os.getpid(), start_bytes=spec.start_bytes)
    place = agent.register(terms)
    return place, LeaseBoard.open(place.board_path).row(place.row)


def test_an_engine_starts_beside_one_that_uses_nearly_everything(tmp_path: Path) -> None:
    """The first gives way before the second's processes are started; KV memory and what loading holds are together
    never more than the budget; and the first one's tokens are those that it gives alone."""
    spec = sized_spec()
    with local_agent(tmp_path / "board", spec.kv_ceiling_bytes, 2 * spec.weights_bytes) as agent:
        asyncio.run(two_starts(agent, spec))


async def two_starts(agent: LocalAgent, spec: EngineSpec) -> None:
    budget = agent.board.budget_bytes
    place, row = register(agent, spec, "first")
    await asyncio.to_thread(wait_for_lease, row, spec.start_bytes)
    async with local_engine_at(spec, place, engines=2) as first:
        follow = asyncio.create_task(watch_lease(row, first.wake, WakePolicy()))
        alone = await first.generate_all(prompts(REQUESTS, IDS), TOKENS, "alone")
        answers = asyncio.create_task(first.generate_all(prompts(REQUESTS, IDS), TOKENS, "beside"))
        while first.held_bytes_os() < 0.9 * budget:
            assert not answers.done(), f"the first engine held at most {first.held_bytes_os()} of {budget} bytes"
            await asyncio.sleep(0.01)
        place, row = register(agent, spec, "second")
        assert row.lease.limit_bytes < spec.start_bytes, "nothing was free"
        await asyncio.to_thread(wait_for_lease, row, spec.start_bytes)
        assert first.held_bytes_os() <= budget - spec.start_bytes
        with watched(first, row) as watch:
            async with local_engine_at(spec, place, engines=2) as second:
                core = second.core_process()
                pids = [core.pid, *(worker.pid for worker in core.children())]
                stays = sum(map(anonymous_bytes, pids))
                assert second.held_bytes_os() <= spec.kv_rest_bytes
                assert await answers == alone
                assert len(await second.generate(prompts(1, IDS)[0], 1, "up")) == 1
        follow.cancel()
    assert len(watch.held) > 100
    # Others are forks in the moment before they become something else, whose memory is that of their parents.
    loading = [max(0, sum(held.get(pid, 0) for pid in pids) - stays) for _, held in watch.held]
    assert max(loading) <= spec.spike_bytes
    assert max(kv + held for (kv, _), held in zip(watch.held, loading, strict=True)) + spec.kv_rest_bytes <= budget
