"""What every test of exactness does to a real engine: prompts that share a prefix, under a lease that swings."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from replicas.local_engine import LocalEngine


def prompts(count: int, ids: range) -> list[list[int]]:
    """Prompts of 100 to 500 tokens of ``ids``, half of which share their first 256, so that the prefix cache is hit."""
    rng = random.Random(7)
    shared = [rng.choice(ids) for _ in range(256)]
    return [(shared if i % 2 else []) + [rng.choice(ids) for _ in range(rng.randrange(100, 250))] for i in range(count)]


@asynccontextmanager
async def swinging(engine: LocalEngine, limits_bytes: Sequence[int]) -> AsyncIterator[None]:
    """Swing the lease between these limits, several times a second."""
    rng = random.Random(3)

    async def swing() -> None:
        while True:
            engine.set_limit(rng.choice(limits_bytes))
            await asyncio.sleep(0.15)

    task = asyncio.create_task(swing())
    try:
        yield
    finally:
        task.cancel()


async def settled(engine: LocalEngine, done: Callable[[], bool], seconds: float = 15.0) -> bool:
    """Wake the idle engine as its replica would, until ``done`` or the deadline."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not done() and asyncio.get_running_loop().time() < deadline:
        await engine.wake()
        await asyncio.sleep(0.02)
    return done()
