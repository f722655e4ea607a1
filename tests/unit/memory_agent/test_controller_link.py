"""The link to the controller: newest report only, quiet when nothing is new, and no care whether anybody listens."""

import asyncio
from dataclasses import replace

import pytest
import ray
from ray.exceptions import ActorDiedError

from memory_agent import controller_link
from memory_agent.controller_link import ControllerLink
from memory_agent.reports import DeviceReport, PressureLevel


class FakeController:
    """Stands for an actor handle: keeps what it receives, dies on purpose, or answers only when told to."""

    def __init__(self) -> None:
        self.received: list[DeviceReport] = []
        self.deaths = 0
        self.arrived = asyncio.Condition()
        self.answering = asyncio.Event()
        self.answering.set()
        self.report_device = self

    async def remote(self, report: DeviceReport) -> None:
        await self.answering.wait()
        if self.deaths:
            self.deaths -= 1
            raise ActorDiedError()
        async with self.arrived:
            self.received.append(report)
            self.arrived.notify_all()

    @property
    def sequences(self) -> list[int]:
        return [report.sequence for report in self.received]

    async def has(self, reports: int) -> None:
        """Wait until so many reports have arrived."""
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(lambda: len(self.received) >= reports)


def report(sequence: int, budget_bytes: int = 100) -> DeviceReport:
    return DeviceReport("n", "cpu", 1, 2, sequence, float(sequence), budget_bytes, 0, PressureLevel.NORMAL, 0.0, (), 0)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeController]:
    """Names that can be looked up; none at first."""
    actors: dict[str, FakeController] = {}

    def get_actor(name: str, namespace: str) -> FakeController:
        if name not in actors:
            raise ValueError(f"no actor {name} in {namespace}")
        return actors[name]

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(controller_link, "_RETRY_S", 0.005)
    return actors


async def test_newest_report_arrives_when_the_controller_appears(actors: dict[str, FakeController]) -> None:
    """Without a controller reports replace each other; the first one it gets is the newest."""
    link = ControllerLink()
    running = asyncio.create_task(link.run())
    for sequence in (1, 2, 3):
        link.offer(report(sequence, budget_bytes=sequence), 0.0)
        await asyncio.sleep(0.01)
    controller = actors["ellm-controller"] = FakeController()
    await controller.has(1)
    running.cancel()
    assert controller.sequences == [3]


async def test_one_report_at_a_time(actors: dict[str, FakeController]) -> None:
    """While the controller does not answer nothing piles up: after it the newest follows, those between are dropped."""
    controller = actors["ellm-controller"] = FakeController()
    controller.answering.clear()
    link = ControllerLink()
    running = asyncio.create_task(link.run())
    link.offer(report(1, budget_bytes=1), 0.0)
    await asyncio.sleep(0.02)
    for sequence in (2, 3, 4):
        link.offer(report(sequence, budget_bytes=sequence), 0.0)
    controller.answering.set()
    await controller.has(2)
    running.cancel()
    assert controller.sequences == [1, 4]


async def test_repeated_numbers_are_sent_once_a_second(actors: dict[str, FakeController]) -> None:
    """A report that says nothing new is held back until a second has passed; one that does is sent at once."""
    controller = actors["ellm-controller"] = FakeController()
    link = ControllerLink()
    running = asyncio.create_task(link.run())
    sent: list[int] = []
    for now_s, budget_bytes, expected in (
        (10.0, 100, True), (10.25, 100, False), (10.5, 200, True), (11.25, 200, False), (11.5, 200, True),
    ):  # fmt: skip
        sequence = round(now_s * 100)
        link.offer(report(sequence, budget_bytes), now_s)
        sent += [sequence] * expected
        await controller.has(len(sent))
        await asyncio.sleep(0.005)
        assert controller.sequences == sent
    running.cancel()


async def test_report_survives_the_death_of_the_controller(actors: dict[str, FakeController]) -> None:
    """A report that a dying controller lost is sent again to the next one that bears the name."""
    controller = actors["ellm-controller"] = FakeController()
    controller.deaths = 2
    link = ControllerLink()
    running = asyncio.create_task(link.run())
    link.offer(report(1), 0.0)
    await controller.has(1)
    running.cancel()
    assert controller.sequences == [1]


def test_same_numbers_ignores_the_time_alone() -> None:
    """Sequence and time do not make a report new; any other number does."""
    assert report(1).same_numbers(report(2))
    assert not report(1).same_numbers(report(1, budget_bytes=5))
    assert not report(1).same_numbers(replace(report(1), dead_engines=1))
