"""A fault soak: streams of the default model (float32) through a Ray cluster of four nodes, in which something is
killed every 20 s. Every answer has to be the one of an undisturbed run.

    requests_lost          streams that ended with an error, or short
    wrong_tokens           answers with a token that is not that of the undisturbed run
    kills_by_kind          engine, replica, raylet (its whole node; another one joins), agent, controller
    inflight_at_kill       streams that had had a token since the kill before, at each kill
    recovered              kills after which what was killed was there again
    migrations_completed   requests that moved between replicas, because a replica was drained in its turn

With --ingress the process that serves the API is killed in its turn too: its clients lose their connections and ask
again, which is counted as ``cut``.
"""

import argparse
import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

import httpx

from benchmarks.chaos.comparison import first_mismatch
from benchmarks.chaos.killer import Killer
from benchmarks.chaos.kills import Turns
from benchmarks.chaos.nodes import Nodes, NodesError, free_port
from benchmarks.chaos.streams import Clients, Prompt, Stream, gap_of_best, made_prompts
from benchmarks.chaos.summary import Found, details, headline
from benchmarks.chaos.view import View
from benchmarks.record import finish
from cluster.config import ClusterConfig, HttpConfig, MemoryConfig, ModelConfig
from cluster.footprint import remove_leftovers
from cluster.launch_error import keep_logs

WORKERS = 3
CLIENTS = 8
PROMPTS = 16
MODEL = "SmolLM2-135M-Instruct"
BUDGET_BYTES = 640 << 20
"""Of each node."""
_START_S, _STOP_S = 600.0, 120.0
_IDLE_S = 30.0


def cluster_config(port: int, replicas: int) -> ClusterConfig:
    """The default model in the type in which equal requests have equal answers, whoever computes beside them."""
    model = ModelConfig(replicas=replicas, dtype="float32", max_model_len=1024, max_num_seqs=16)
    return ClusterConfig(models=[model], memory=MemoryConfig(budget=BUDGET_BYTES), http=HttpConfig(port=port))


class Soak:
    """One run over a cluster that has been started."""

    def __init__(self, nodes: Nodes, replicas: int, options: argparse.Namespace) -> None:
        self._nodes, self._replicas, self._options = nodes, replicas, options
        self._began_s = time.monotonic()
        self._prompts = made_prompts(PROMPTS, options.seed)
        self._right: dict[int, list[int]] = {}
        self.view = View(nodes.url, self.say)
        self.found = Found()

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self._began_s:7.1f} s  {line}", flush=True)

    async def run(self) -> None:
        watching = asyncio.create_task(self.view.run())
        try:
            await self._until_served()
            await self._undisturbed()
            await self._disturbed()
            await self._settle()
            await self._explain()
        finally:
            watching.cancel()

    async def _until_served(self) -> None:
        deadline_s = time.monotonic() + _START_S
        while not await self.view.until(lambda now: len(now.engines) == self._replicas, 1.0):
            self._nodes.check()
            if time.monotonic() > deadline_s:
                raise NodesError(f"the replicas do not serve after {_START_S:.0f} s")
        where = {engine.node for engine in self.view.now.engines.values()} if self.view.now else set()
        self.say(f"{self._replicas} replicas on {len(where)} nodes")

    async def _undisturbed(self) -> None:
        def ended(stream: Stream) -> None:
            self._right[stream.prompt.number] = stream.ids

        def lost(stream: Stream, why: str) -> None:
            raise NodesError(f"prompt {stream.prompt.number} has no undisturbed answer: {why}")

        clients = Clients(self._nodes.url, MODEL, ended, lost)
        await clients.run(_while(iter(self._prompts), lambda: True), CLIENTS)
        self.say(f"{len(self._right)} answers of {sum(map(len, self._right.values()))} tokens, undisturbed")

    async def _disturbed(self) -> None:
        found, options = self.found, self._options

        def ended(stream: Stream) -> None:
            found.answers += 1
            found.tokens += len(stream.ids)
            found.longest_pause_s = max(found.longest_pause_s, stream.longest_pause_s)
            number = stream.prompt.number
            if (mismatch := first_mismatch(number, self._right[number], stream.ids)) is not None:
                found.wrong.append(mismatch)
                self.say(f"WRONG: {mismatch}")

        def lost(stream: Stream, why: str) -> None:
            found.lost.append(f"prompt {stream.prompt.number}: {why}")
            self.say(f"LOST: {found.lost[-1]}")

        clients = Clients(self._nodes.url, MODEL, ended, lost)
        began_s = time.monotonic()
        killer = Killer(self._nodes, self.view, clients, self._replicas, began_s, self.say)
        killing = asyncio.create_task(killer.run(Turns(options.seed, options.ingress), options.every, options.seconds))
        asked = _while(itertools.cycle(self._prompts), lambda: not killing.done())
        await clients.run(asked, CLIENTS)
        await killing
        found.kills, found.skipped = killer.kills, killer.skipped
        found.refused, found.cut = clients.refused, clients.cut
        self.say(f"all streams have ended: {found.answers} answers, {len(found.lost)} lost, {len(found.wrong)} wrong")

    async def _settle(self) -> None:
        """The cluster has to be whole again, and empty."""
        found, view = self.found, self.view
        if not await view.all_back():
            found.unsettled.append("something that was killed has not come back")
        if not await view.until(lambda now: len(now.engines) == self._replicas, _STOP_S):
            found.unsettled.append(f"the replicas that report are not {self._replicas}: {view.now}")
        if not await view.until(lambda now: not any(one.used_bytes for one in now.engines.values()), _IDLE_S):
            found.unsettled.append(f"idle replicas use KV memory: {view.now}")
        found.conservation_failures = sum(view.conservation_failures.values())
        async with httpx.AsyncClient(trust_env=False, timeout=20) as http:
            text = (await http.get(f"{self._nodes.url}/metrics")).text
        found.migrations = _by_label(text, "ellm_migrations_total", "outcome")
        found.continued = sum(_by_label(text, "ellm_requests_continued_total", "model_name").values())
        found.retried = sum(_by_label(text, "ellm_requests_retried_total", "model_name").values())
        self.say(f"continued {found.continued}, retried {found.retried}, migrations {found.migrations}")

    async def _explain(self) -> None:
        for at, one in enumerate(self.found.wrong):
            ids = [*self._prompts[one.prompt].ids, *self._right[one.prompt][: one.position]]
            explained = self.found.wrong[at] = replace(one, gap=await gap_of_best(self._nodes.url, MODEL, ids))
            self.say(f"wrong: {explained}")


async def _while(prompts: Iterator[Prompt], wanted: Callable[[], bool]) -> AsyncIterator[Prompt]:
    for prompt in prompts:
        if not wanted():
            return
        yield prompt


def _by_label(text: str, name: str, label: str) -> dict[str, int]:
    """Of a counter in Prometheus' text form: its value by that label."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(name + "{"):
            value = line.partition(f'{label}="')[2].partition('"')[0]
            found[value] = found.get(value, 0) + int(float(line.rpartition(" ")[2]))
    return found


def soak(options: argparse.Namespace) -> Found:
    """Start a cluster, disturb it, and end it."""
    remove_leftovers()
    nodes = Nodes(cluster_config(free_port(), options.replicas), WORKERS)
    try:
        nodes.start()
        one = Soak(nodes, options.replicas, options)
        asyncio.run(one.run())
        one.found.left = nodes.stop()
        if one.found.failed:
            print(f"logs: {keep_logs(nodes.folder)}")
        return one.found
    except BaseException:  # Ctrl-C too: the logs go with the folder
        print(f"logs: {keep_logs(nodes.folder)}")
        raise
    finally:
        nodes.clear()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=180.0, help="of the disturbed run")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and of the order of kills")
    parser.add_argument("--replicas", type=int, default=3, choices=(2, 3, 4))
    parser.add_argument("--ingress", action="store_true", help="kill the ingress in its turn, too")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is ended
    try:
        found = soak(options)
    except NodesError as error:
        sys.exit(f"error: {error}")
    for line in (*found.unsettled, *(f"left: {one}" for one in found.left)):
        print(line)
    finish("chaos", headline(found), details(found))
    sys.stdout.flush()
    os._exit(found.failed)


if __name__ == "__main__":
    main()
