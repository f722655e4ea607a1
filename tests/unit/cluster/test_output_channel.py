"""Both ends of an output channel over a real socket: nothing is lost, doubled or moved, whatever happens."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutput, FinishReason

import cluster.output_inbox
import replicas.output_channel
from cluster.output_inbox import OutputInbox
from replicas.channel_wire import Errand, Hello, InboxAddress, Parcel, frame, sign, sign_errand
from replicas.hop import Frames, HopCodec
from replicas.output_channel import ChannelBroken, Channels, Lane

DEADLINE_S = 30.0
REPLICA = "replica-a"


@dataclass
class Received:
    """What an inbox has handed over, by ticket."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    pieces: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def take(self, ticket: int, offset: int, output: EngineCoreOutput, replica: str) -> None:
        assert replica == REPLICA
        tokens = self.tokens.setdefault(ticket, [])
        assert offset == len(tokens), "a gap or a repetition"
        assert ticket not in self.ended, "something after the end"
        tokens.extend(output.new_token_ids)
        self.pieces[ticket] = self.pieces.get(ticket, 0) + 1
        if output.finished:
            self.ended.add(ticket)


@dataclass
class Pair:
    """An ingress's end and a replica's end."""

    inbox: OutputInbox
    address: InboxAddress
    received: Received
    channels: Channels


async def run(frames: Frames, lane: Lane) -> None:
    """An errand of the ingress: says its frames, or fails where they say so."""
    if frames[0] == b"fail":
        raise RuntimeError("on purpose")
    lane.put(EngineCoreOutput("e", list(frames[0]), finish_reason=FinishReason.LENGTH))
    await lane.ended


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    received = Received()
    inbox, channels = OutputInbox(received.take), Channels(REPLICA, run)
    try:
        yield Pair(inbox, await inbox.open("127.0.0.1"), received, channels)
    finally:
        channels.close()
        inbox.close()
        await asyncio.sleep(0)


async def until(reached: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not reached():
            meanwhile()
            await asyncio.sleep(0.001)


def token(number: int) -> EngineCoreOutput:
    return EngineCoreOutput("r", [number])


def end() -> EngineCoreOutput:
    return EngineCoreOutput("r", [], finish_reason=FinishReason.LENGTH)


async def engine(lane: Lane, length: int, chance: random.Random) -> None:
    """Make tokens 0, 1, 2, ... with pauses, sometimes two in a turn, and an end."""
    made = 0
    while made < length:
        count = min(chance.choice((1, 1, 2)), length - made)
        for number in range(made, made + count):
            lane.put(token(number))
        made += count
        await asyncio.sleep(chance.choice((0, 0, 0.0005, 0.002)))
    lane.put(end())


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    breaks=st.integers(0, 4),
    cancels=st.integers(0, 3),
)
def test_every_token_comes_once_and_in_order(seed: int, lengths: list[int], breaks: int, cancels: int) -> None:
    """With an ingress that takes at random moments, connections that break and requests that are cancelled: a request
    that was not cancelled arrives whole, one that was arrives as a beginning, and the others notice nothing."""

    async def play() -> None:
        chance = random.Random(seed)
        async with pair() as ends, asyncio.timeout(DEADLINE_S):
            cancelled = set(chance.sample(range(len(lengths)), min(cancels, len(lengths))))

            async def request(ticket: int) -> None:
                with ends.channels.lane(ends.address, ticket) as lane:
                    work = asyncio.ensure_future(engine(lane, lengths[ticket], chance))
                    if ticket in cancelled:
                        await asyncio.sleep(chance.random() * 0.02)
                        work.cancel()
                        return
                    await lane.ended
                    await work

            async def taking() -> None:
                while True:
                    ends.inbox.taken()
                    await asyncio.sleep(chance.choice((0, 0.001, 0.003)))

            async def breaking() -> None:
                for _ in range(breaks):
                    await asyncio.sleep(chance.random() * 0.02)
                    for connection in list(ends.inbox._connections):
                        connection.hang_up()

            helpers = [asyncio.ensure_future(taking()), asyncio.ensure_future(breaking())]
            await asyncio.gather(*(request(ticket) for ticket in range(len(lengths))))
            for helper in helpers:
                helper.cancel()
        for ticket, length in enumerate(lengths):
            got = ends.received.tokens.get(ticket, [])
            assert got == list(range(len(got)))
            if ticket not in cancelled:
                assert len(got) == length
                assert ticket in ends.received.ended

    asyncio.run(play())


async def test_an_ingress_that_keeps_up_gets_each_token_by_itself() -> None:
    """While the ingress takes what comes, no token waits for another."""
    async with pair() as ends:
        with ends.channels.lane(ends.address, 1) as lane:
            for number in range(20):
                lane.put(token(number))
                await until(lambda n=number: len(ends.received.tokens.get(1, [])) == n + 1, ends.inbox.taken)  # type: ignore[misc]
        assert ends.received.pieces[1] == 20


async def test_an_ingress_that_is_behind_gets_larger_pieces() -> None:
    """While a parcel is not taken nothing follows it; what gathers meanwhile comes as one output a request."""
    async with pair() as ends:
        with ends.channels.lane(ends.address, 1) as one, ends.channels.lane(ends.address, 2) as two:
            one.put(token(0))
            await until(lambda: 1 in ends.received.tokens)
            for number in range(50):
                one.put(token(number + 1))
                two.put(token(number))
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            assert ends.received.tokens == {1: [0]}
            await until(lambda: len(ends.received.tokens.get(2, [])) == 50, ends.inbox.taken)
        assert ends.received.tokens == {1: list(range(51)), 2: list(range(50))}
        assert ends.received.pieces == {1: 2, 2: 1}


async def test_a_request_has_ended_when_its_end_was_taken() -> None:
    """A lane ends after the ingress has said that it has everything, not before."""
    async with pair() as ends:
        with ends.channels.lane(ends.address, 1) as lane:
            lane.put(end())
            await until(lambda: 1 in ends.received.ended)
            await asyncio.sleep(0.02)
            assert not lane.ended.done()
            ends.inbox.taken()
            async with asyncio.timeout(DEADLINE_S):
                await lane.ended


async def test_an_ingress_that_is_gone_ends_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the ingress cannot be reached any more, every lane to it ends with an error, and only to it."""
    monkeypatch.setattr(replicas.output_channel, "GIVE_UP_S", 0.2)
    async with pair() as gone, pair() as there:
        channels = there.channels
        with channels.lane(gone.address, 1) as lost, channels.lane(there.address, 1) as kept:
            lost.put(token(0))
            await until(lambda: gone.received.tokens == {1: [0]})
            gone.inbox.close()
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises(ChannelBroken, match="is gone"):
                    await lost.ended
            kept.put(end())
            await until(kept.ended.done, there.inbox.taken)


async def test_a_lane_knows_that_its_ingress_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before a connection was tried, and no more when there is one again. One that gives up ends at once."""
    monkeypatch.setattr(replicas.output_channel, "RETRY_PERIOD_S", 0.01)
    async with pair() as ends:
        with ends.channels.lane(ends.address, 1) as lane:
            assert not lane.lost
            lane.put(token(0))
            await until(lambda: ends.received.tokens == {1: [0]})
            for connection in list(ends.inbox._connections):
                connection.hang_up()
            await until(lambda: lane.lost)
            await until(lambda: not lane.lost)
            lane.give_up()
            with pytest.raises(ChannelBroken, match="another request"):
                await lane.ended


async def test_a_replica_that_dies_in_the_middle_leaves_nothing_half() -> None:
    """A parcel that came in part when its replica died is as if it had not been sent."""
    async with pair() as ends:
        reader, writer = await asyncio.open_connection(ends.address.host, ends.address.port)
        await greet(reader, writer, ends.address.key)
        whole = parcel(1, [token(1), token(2)])
        writer.write(whole[:-3])
        await writer.drain()
        writer.close()
        await until(lambda: not ends.inbox._connections)
        assert ends.received.tokens == {}


def parcel(number: int, outputs: list[EngineCoreOutput]) -> bytes:
    frames = HopCodec().encode_outputs(outputs)
    offsets = list(range(len(outputs)))
    return frame(msgspec.msgpack.encode(Parcel(number, [1] * len(outputs), offsets, frames)))


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    nonce = await read_frame(reader)
    writer.write(frame(msgspec.msgpack.encode(Hello(b"me", sign(key, nonce, b"me"), REPLICA))))


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    return await reader.readexactly(length)


async def hung_up(reader: asyncio.StreamReader) -> bool:
    """The other side ends the connection, and says nothing before."""
    async with asyncio.timeout(DEADLINE_S):
        try:
            return await reader.read() == b""
        except ConnectionResetError:
            return True


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frame(b"\xff" * 40),
        frame(msgspec.msgpack.encode(Hello(b"me", b"x" * 32))),
        struct.pack(">I", 1 << 20),
    ],
    ids=["http", "no msgpack", "wrong key", "too long"],
)
async def test_strangers_are_hung_up_on(said: bytes) -> None:
    """Whoever does not speak the protocol or has another key is refused and counted, and nothing of it arrives."""
    async with pair() as ends:
        reader, writer = await asyncio.open_connection(ends.address.host, ends.address.port)
        await read_frame(reader)
        writer.write(said + parcel(1, [token(1)]))
        assert await hung_up(reader)
        writer.close()
        assert (ends.inbox.refused, ends.received.tokens) == (1, {})


async def test_who_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that does not say who it is does not stay."""
    monkeypatch.setattr(cluster.output_inbox, "HANDSHAKE_S", 0.05)
    async with pair() as ends:
        reader, writer = await asyncio.open_connection(ends.address.host, ends.address.port)
        await read_frame(reader)
        assert await hung_up(reader)
        writer.close()


@pytest.mark.parametrize("number", [0, 2, 7])
async def test_a_parcel_out_of_turn_is_refused(number: int) -> None:
    """Parcels count without gaps: another one than the next ends the connection, and nothing of it arrives."""
    async with pair() as ends:
        reader, writer = await asyncio.open_connection(ends.address.host, ends.address.port)
        await greet(reader, writer, ends.address.key)
        await read_frame(reader)
        writer.write(parcel(number, [token(1)]))
        assert await hung_up(reader)
        writer.close()
        assert (ends.inbox.refused, ends.received.tokens) == (1, {})


async def test_a_replica_without_the_key_ends_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another key nothing is taken, and the requests do not wait for ever."""
    monkeypatch.setattr(replicas.output_channel, "GIVE_UP_S", 0.2)
    async with pair() as ends:
        with ends.channels.lane(replace(ends.address, key=b"another"), 1) as lane:
            lane.put(token(1))
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises(ChannelBroken):
                    await lane.ended
        assert ends.received.tokens == {}


@asynccontextmanager
async def connected() -> AsyncIterator[Pair]:
    """A replica that has told the ingress something."""
    async with pair() as ends:
        with ends.channels.lane(ends.address, 1) as lane:
            lane.put(end())
            await until(lane.ended.done, ends.inbox.taken)
        yield ends


async def test_an_errand_comes_over_the_channel() -> None:
    """Its outputs come under its ticket, also when the replica has no request of that ingress any more."""
    async with connected() as ends:
        for ticket in (2, 3):
            assert ends.inbox.send_errand(REPLICA, ticket, [bytes([7, ticket])])
            await until(lambda ticket=ticket: ticket in ends.received.ended, ends.inbox.taken)  # type: ignore[misc]
            assert ends.received.tokens[ticket] == [7, ticket]


async def test_an_errand_that_fails_says_so() -> None:
    seen: list[EngineCoreOutput] = []
    async with connected() as ends:
        ends.inbox._on_output = lambda ticket, offset, output, replica: seen.append(output)
        assert ends.inbox.send_errand(REPLICA, 2, [b"fail"])
        await until(lambda: bool(seen), ends.inbox.taken)
        assert (seen[0].finish_reason, seen[0].stop_reason) == (FinishReason.ERROR, "on purpose")


async def test_there_are_no_errands_without_a_connection() -> None:
    left: list[str] = []
    async with connected() as ends:
        assert not ends.inbox.send_errand("replica-b", 2, [b"x"])
        ends.inbox._on_left = left.append
        ends.channels.close()
        await until(lambda: left == [REPLICA])
        assert not ends.inbox.send_errand(REPLICA, 2, [b"x"])


async def test_an_errand_of_somebody_else_is_not_run() -> None:
    """Who has taken the ingress's port has no key: the replica hangs up and runs nothing."""
    async with connected() as ends:
        sender = next(iter(ends.inbox._senders.values()))
        first = sender.connection
        assert first is not None
        first.say(Errand(2, [b"x"], sign_errand(bytes(32), b"sender", 2, [b"x"])))
        await until(lambda: sender.connection is not first)
        assert 2 not in ends.received.tokens


def test_the_digest_of_an_errand_is_of_all_of_it() -> None:
    digests = {
        sign_errand(b"k" * 32, sender, ticket, frames)
        for sender in (b"a" * 16, b"b" * 16)
        for ticket in (1, 2)
        for frames in ([b"xy"], [b"x", b"y"], [b"xz"])
    }
    assert len(digests) == 12


def test_the_key_is_not_shown() -> None:
    """An address can be logged."""
    assert "secret" not in repr(InboxAddress("host", 1, b"secret"))
