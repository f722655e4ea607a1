"""The stream that the live page draws: one collection for all, and what it says."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from cluster.cluster_status import ControllerAwayError
from cluster.live_feed import LiveFeed

STREAM_S = 5.0


class Source:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.asked = 0
        self.away = False
        self.broken = False

    async def status(self) -> dict[str, Any]:
        self.asked += 1
        if self.away:
            raise ControllerAwayError("it is away")
        if self.broken:
            raise KeyError("a detail for the log alone")
        return {"asked": self.asked, "slo": {"classes": {}}}

    async def decisions(self) -> list[dict[str, Any]]:
        return [{"kind": "target"}]

    def feed(self, **settings: float) -> LiveFeed:
        return LiveFeed(self.status, self.decisions, **{"period_s": 0.01, "stream_s": STREAM_S} | settings)


async def some(events: AsyncIterator[bytes], count: int) -> list[tuple[str, Any]]:
    """The next ones: name and value."""
    found = []
    for _ in range(count):
        lines = (await anext(events)).decode().split("\n")
        assert lines[2:] == ["", ""] and lines[0].startswith("event: ") and lines[1].startswith("data: ")
        found.append((lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))))
    return found


async def test_viewers_share_one_collection() -> None:
    """Many viewers see the same events, and cost as many collections as one does."""
    source = Source()
    feed = source.feed()
    seen = await asyncio.gather(*(some(feed.events(), 5) for _ in range(20)))
    assert all(events == seen[0] for events in seen)
    assert [value["status"]["asked"] for _, value in seen[0]] == [1, 2, 3, 4, 5]
    assert seen[0][0][1]["decisions"] == [{"kind": "target"}]
    await feed.close()


async def test_nothing_is_collected_while_nobody_watches() -> None:
    """The collection ends with the last viewer and begins again with the next one."""
    source = Source()
    feed = source.feed()
    await some(events := feed.events(), 1)
    await events.aclose()  # type: ignore[attr-defined]
    assert feed.viewers == 0
    await asyncio.sleep(0.05)
    asked = source.asked
    await asyncio.sleep(0.05)
    assert source.asked == asked
    assert (await some(feed.events(), 1))[0][1]["status"]["asked"] == asked + 1
    await feed.close()


async def test_a_slow_viewer_misses_events_and_holds_up_nobody() -> None:
    """Who does not read gets the newest event next, however many came meanwhile."""
    source = Source()
    feed = source.feed()
    slow, quick = feed.events(), feed.events()
    [(_, first)] = await some(slow, 1)
    await some(quick, 10)
    [(_, later)] = await some(slow, 1)
    assert later["status"]["asked"] >= first["status"]["asked"] + 9
    await feed.close()


async def test_a_controller_that_is_away_is_told_and_comes_back() -> None:
    """Viewers learn the reason, keep their stream, and see the state when there is one again."""
    source = Source()
    feed = source.feed()
    source.away = True
    events = feed.events()
    assert await some(events, 1) == [("away", {"reason": "it is away"})]
    source.away = False
    assert ("state", 2) in [(name, value.get("status", {}).get("asked")) for name, value in await some(events, 2)]
    await feed.close()


async def test_a_defect_is_told_and_ends_no_stream() -> None:
    """Without its details, which may hold anything; the next collection is tried."""
    source = Source()
    feed = source.feed()
    source.broken = True
    events = feed.events()
    [(name, told)] = await some(events, 1)
    assert name == "away" and "detail" not in told["reason"]
    source.broken = False
    assert "state" in [name for name, _ in await some(events, 2)]
    await feed.close()


async def test_a_stream_ends_by_itself() -> None:
    """So that a process that is to end is not held by those who watch."""
    feed = Source().feed(stream_s=0.05)
    assert [event async for event in feed.events()]
    assert feed.viewers == 0
    await feed.close()
