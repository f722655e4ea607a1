"""The live page over a played cluster: many replicas without any engine, whose numbers move.

    python -m benchmarks.played_page --replicas 64 --port 8123

Reports, controller's view, feed and page are the real ones. What crosses processes in a cluster is pickled here too.
"""

import argparse
import asyncio
import json
import math
import pickle
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.bench.report import Slo
from cluster.cluster_view import ClusterView
from cluster.decision import Decision
from cluster.live_feed import LiveFeed
from cluster.page import page_routes
from cluster.slo import Ending, Outcome, SloAccount
from cluster.slo_ledger import SloReport, to_json
from cluster.target_planner import TargetSettings
from memory_agent.reports import DeviceReport, EngineReport, PressureLevel

MODEL = "played"
GIB = 1 << 30
_REPORT_S = 0.25
_ZEROS: dict[str, Any] = {field.name: 0 for field in fields(EngineReport)}
_ANSWER = ["This", "answer", "is", "played", "word", "by", "word,", "because", "no", "engine", "runs", "here."]


class PlayedCluster:
    """``devices`` of ``replicas`` in all, each with 4 GiB for every replica. The same seed gives the same course."""

    def __init__(self, replicas: int, devices: int = 1, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._view = ClusterView(TargetSettings(), epoch_ms=1)
        self._account, self._began_s, self._sequence = SloAccount(), time.monotonic(), 0
        self._replicas, self._devices = replicas, devices

    def advance(self) -> None:
        """All agents report, a request or two ends, and now and then something is decided."""
        self._sequence += 1
        now_s = time.monotonic()
        for device in range(self._devices):
            numbers = range(device, self._replicas, self._devices)
            engines = tuple(self._engine(number, now_s) for number in numbers)
            report = DeviceReport(
                node="0123456789abcdef", device="cpu" if self._devices == 1 else f"gpu{device}", agent_pid=1,
                agent_epoch_ns=1, sequence=self._sequence, taken_at_s=time.time(), budget_bytes=4 * GIB * len(engines),
                weights_bytes=0, pressure=PressureLevel.NORMAL, pressure_since_s=time.time(),
                engines=engines, dead_engines=0,
            )  # fmt: skip
            self._view.receive(report, now_s)
        for name, kept in (("interactive", 0.97), ("batch", 1.0)):
            ttft_s = 0.2 if self._random.random() < kept else 5.0
            slo = Slo(ttft_ms=1000.0)
            self._account.add(Outcome(name, MODEL, "r", slo, Ending.ANSWERED, ttft_s, 0.02, 2.0, 50))
        if self._sequence % 12 == 0:
            number = self._random.randrange(self._replicas)
            what = f"{self._random.randrange(256, 2048)} tokens a step"
            why = "answers are slower than their target"
            self._view.decide(Decision("target", f"x#replica-{number:02}", what, why, {"tpot_s": 0.061}), now_s)

    async def status(self) -> dict[str, Any]:
        snapshot = {"taken_at_s": time.time()} | self._view.snapshot(time.monotonic())
        told: dict[str, Any] = pickle.loads(pickle.dumps(snapshot))
        rows = [replica for node in told["nodes"] for device in node["devices"] for replica in device["replicas"]]
        sums = {key: sum(row[key] for row in rows) for key in ("limit_bytes", "running", "waiting")}
        held = sum(row["held_bytes_os"] for row in rows)
        model = {"name": MODEL, "phase": "serving", "elastic": True, "replicas": self._replicas, "held_bytes": held}
        model |= {"min_replicas": self._replicas, "max_replicas": self._replicas, "guarantee_bytes": GIB}
        model |= {"ceiling_bytes": 8 * GIB, "error": None, "progress": ""}
        slo = to_json([SloReport(self._account, time.monotonic() - self._began_s)])
        return told | {"models": [model | sums], "slo": slo, "predictions": {}, "drains": []}

    async def decisions(self) -> list[dict[str, Any]]:
        return self._view.decisions.last(30, "", time.monotonic())

    def _engine(self, number: int, now_s: float) -> EngineReport:
        wave = 0.5 + 0.5 * math.sin(now_s / 9 + number * 1.7)
        limit = int((0.8 + 4 * wave) * GIB)
        held = int(limit * (0.55 + 0.4 * wave))
        used = int(held * (0.3 + 0.6 * wave * self._random.uniform(0.9, 1.0)))
        values = {
            "engine_id": f"x#replica-{number:02}", "model": MODEL, "state": "LIVE", "limit_bytes": limit,
            "guarantee_bytes": GIB, "ceiling_bytes": 8 * GIB, "weights_bytes": GIB, "held_bytes_os": held,
            "used_bytes": used, "activation_held_bytes": int(0.2 * GIB * wave), "host_bytes": int(GIB * (1 - wave)),
            "running": int(24 * wave), "waiting": max(0, int(30 * wave) - 26), "kv_usage": 0.5,
            "pressure": PressureLevel.ELEVATED if wave > 0.97 else PressureLevel.NORMAL,
        }  # fmt: skip
        return EngineReport(**_ZEROS | values)


def build_played_app(played: PlayedCluster) -> Starlette:
    """The page, its feed, its snapshot, and a model that says always the same."""
    feed = LiveFeed(played.status, played.decisions)

    async def status(request: Request) -> Response:
        return JSONResponse(await played.status())

    async def decisions(request: Request) -> Response:
        return JSONResponse((await played.decisions())[: int(request.query_params["last"])])

    async def chat(request: Request) -> Response:
        async def words() -> AsyncIterator[str]:
            for word in _ANSWER:
                await asyncio.sleep(0.1)
                yield f"data: {json.dumps({'choices': [{'delta': {'content': word + ' '}}]})}\n\n"
            usage = {"completion_tokens": len(_ANSWER)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(words(), media_type="text/event-stream")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async def play() -> None:
            while True:
                played.advance()
                await asyncio.sleep(_REPORT_S)

        played.advance()  # what is wrong with it ends the start
        playing = asyncio.ensure_future(play())
        yield
        playing.cancel()
        await feed.close()

    routes = [feed.route(), *page_routes(), Route("/ellm/status", status), Route("/ellm/decisions", decisions)]
    return Starlette(routes=[*routes, Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=lifespan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--port", type=int, default=8123)
    given = parser.parse_args()
    app = build_played_app(PlayedCluster(given.replicas, given.devices))
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
