"""Streams move between real engines in the middle of their answers: their tokens are those of an undisturbed run.
float32, greedy. The relays are the cluster's, between them and the engines are real output channels, and no Ray."""

import asyncio
import random
from pathlib import Path

import pytest

from benchmarks.migration.two_replicas import Streams, two_replicas
from cluster.core_client import ClusterCore
from cluster.migration import MigrationError
from cluster.move import Migrated
from tests.integration.shaken_engine import prompts
from tests.integration.tiny_models import IDS, tiny_llama, tiny_spec

TOKENS = 300
PROMPTS = prompts(7, IDS)[1:]

pytestmark = pytest.mark.slow


async def run_all(core: ClusterCore) -> Streams:
    streams = Streams(core)
    for number, prompt in enumerate(PROMPTS):
        await streams.ask(f"r{number}", prompt, TOKENS)
    return streams


def test_streams_that_move_have_the_tokens_of_an_undisturbed_run(tmp_path: Path) -> None:
    """Each of six streams moves from one replica to the other and back while all of them decode."""
    spec = tiny_spec(tiny_llama(tmp_path / "llama"), elastic=True)

    async def run() -> None:
        async with two_replicas(spec, tmp_path) as (core, _):
            undisturbed = await run_all(core)
            await undisturbed.all_ended()
            assert core.mover.moved == 0
            streams, rng = Streams(core), random.Random(1)
            for number, prompt in enumerate(PROMPTS):
                await streams.ask(f"m{number}", prompt, TOKENS, salt=f"tenant {number}")
            moved: list[Migrated] = []
            for to in "ba":
                for number in range(len(PROMPTS)):
                    name = f"m{number}"
                    await streams.until(name, rng.randrange(10, 60) + (len(streams.tokens[name]) if to == "a" else 0))
                    if name not in streams.ended:
                        moved.append(await core.migrate(name, to))
            await streams.all_ended()
            assert [one.destination for one in moved[: len(PROMPTS)]] == ["b"] * len(PROMPTS)
            assert len(moved) > len(PROMPTS)
            assert all(one.blocks_ahead >= 3 for one in moved)
            assert core.mover.moved == len(moved)
            assert core.continued == core.retried == 0
            for number in range(len(PROMPTS)):
                assert streams.tokens[f"m{number}"] == undisturbed.tokens[f"r{number}"]
            with pytest.raises(MigrationError, match="has finished"):
                await core.migrate("m0", "a")

    asyncio.run(run())


def test_what_cannot_be_moved_says_why(tmp_path: Path) -> None:
    spec = tiny_spec(tiny_llama(tmp_path / "llama"), elastic=True)

    async def run() -> None:
        async with two_replicas(spec, tmp_path) as (core, _):
            streams = Streams(core)
            await streams.ask("m", PROMPTS[0], TOKENS)
            await streams.ask("n", PROMPTS[1], TOKENS)
            await streams.until("m", 5)
            for request_id, to, why in (("x", "b", "never was"), ("m", "a", "is at a already"), ("m", "c", "a, b")):
                with pytest.raises(MigrationError, match=why):
                    await core.migrate(request_id, to)
            both = await asyncio.gather(
                core.migrate("m", "b"), core.migrate("m", "b"), core.migrate("n", "b"), return_exceptions=True
            )
            assert isinstance(both[0], Migrated)
            assert "is being moved to b already" in str(both[1])
            assert "one leaves at a time" in str(both[2])
            await streams.all_ended()
            assert {len(tokens) for tokens in streams.tokens.values()} == {TOKENS}

    asyncio.run(run())
