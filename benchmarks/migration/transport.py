"""How fast KV blocks get from engine to engine, against a memcpy of the same bytes in the same run.

    shared_memory_gb_s   copied to staging memory, and from there to their destination, on one node
    agents_gb_s          fetched by one node's memory agent from another's: two raylets on this host
    between_nodes_gb_s   all of the way: staged, fetched, copied to their destination
    memcpy_gb_s          one copy

Gigabytes of KV a second, medians over rounds; the ways take turns.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import ray

from benchmarks.migration.two_nodes import Node, two_nodes
from benchmarks.record import finish
from memory_agent.kv_fingerprint import FINGERPRINT_BYTES
from memory_agent.staging import staging_origin
from replicas.kv_transport import SharedMemoryTransport

BLOCK_BYTES, LAYERS, PLACES = 1 << 20, 32, 96
ROUNDS, WARM_UP = 9, 2
FETCH_S = 60.0

Parts = list[np.ndarray]


def transport(node: Node) -> SharedMemoryTransport:
    return SharedMemoryTransport(
        staging_origin(node.board, 0), BLOCK_BYTES, PLACES, rank=0, fingerprint=b"f" * FINGERPRINT_BYTES
    )


class Bench:
    """Blocks of a source, and room for them at a destination."""

    def __init__(self, source: Node, destination: Node) -> None:
        self._from, self._to = source, destination
        self._source, self._destination = transport(source), transport(destination)
        self._blocks = [made(number) for number in range(PLACES)]
        self._room = [made(number)[:1] for number in range(PLACES, 2 * PLACES)]
        self._keys = [number.to_bytes(32, "big") for number in range(PLACES)]
        self.received_s = 0.0

    def memcpy(self) -> None:
        for block, room in zip(self._blocks, self._room, strict=True):
            np.copyto(room[0], block[0])

    def send(self) -> None:
        for place, (key, block) in enumerate(zip(self._keys, self._blocks, strict=True)):
            self._source.send(place, key, block)

    def receive(self, origin: str) -> None:
        for room in self._room:
            room[0][...] = 0
        began_s = time.perf_counter()
        arrived = self._destination.arrived(origin)
        for key, room in zip(self._keys, self._room, strict=True):
            assert self._destination.receive(origin, arrived[key], key, room)
        self.received_s = time.perf_counter() - began_s
        assert all((room[0] == block[0]).all() for room, block in zip(self._room, self._blocks, strict=True))

    def fetch(self, move: str) -> Any:
        """By the destination's agent; what Ray gives for the origin of the mirror."""
        return self._to.agent.fetch.remote(self._from.name, self._source.origin, move, b"", FETCH_S)

    def slowest_report_s(self) -> float:
        """Of both agents, which are asked again and again, while one fetches from the other."""
        move, slowest_s = uuid4().hex, 0.0
        fetched = self.fetch(move)
        while not ray.wait([fetched], timeout=0.0)[0]:
            for node in (self._from, self._to):
                slowest_s = max(slowest_s, seconds(partial(ray.get, node.agent.report.remote())))
        ray.get(self._to.agent.forget.remote(move))
        return slowest_s

    def round(self) -> dict[str, float]:
        """Seconds of each way."""
        move = uuid4().hex
        memcpy_s, sent_s = seconds(self.memcpy), seconds(self.send)
        self.receive(self._source.origin)
        shared_s = sent_s + self.received_s
        began_s = time.perf_counter()
        origin = ray.get(self.fetch(move))
        fetched_s = time.perf_counter() - began_s
        self.receive(origin)
        ray.get(self._to.agent.forget.remote(move))
        between_s = sent_s + fetched_s + self.received_s
        return {"memcpy": memcpy_s, "shared_memory": shared_s, "agents": fetched_s, "between_nodes": between_s}

    def close(self) -> None:
        self._source.close()
        self._destination.close()


def made(number: int) -> Parts:
    """A block as an engine has it: a row a layer."""
    rows = np.random.default_rng(number).integers(0, 256, (LAYERS, BLOCK_BYTES // LAYERS), np.uint8)
    return [rows]


def seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def rates(rounds: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Gigabytes a second, of each round."""
    return {way: [PLACES * BLOCK_BYTES / one[way] / 1e9 for one in rounds] for way in rounds[0]}


def run() -> None:
    with two_nodes() as (source, destination):
        bench = Bench(source, destination)
        try:
            rounds = [bench.round() for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
            report_s = max(bench.slowest_report_s() for _ in range(ROUNDS))
        finally:
            bench.close()
    found = rates(rounds)
    headline = {f"{way}_gb_s": round(statistics.median(each), 3) for way, each in found.items()}
    for way in ("shared_memory", "between_nodes"):
        ratio = statistics.median(one["memcpy"] / one[way] for one in rounds)
        headline[f"{way}_of_memcpy"] = round(ratio, 3)
    details = {"gb_s": found, "bytes": PLACES * BLOCK_BYTES, "report_ms_most": round(1000 * report_s, 1)}
    finish("transport", headline, details)
