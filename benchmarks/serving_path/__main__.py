"""The path of a token from the engine to the client: what it carries, and what it adds.

All systems answer the same 64 streams, one after the other in each round, each started anew:

    ours         the cluster of `ellm serve` over the paced engine: ingress with detokeniser, router, replica
    stock        ray.serve.llm as it comes, over an engine that gives ready events at no cost
    tuned        the same with HAProxy and RAY_SERVE_THROUGHPUT_OPTIMIZED, in the better of two batching intervals
    bare         a uvicorn server that streams the same events: what the load generator itself can take in

    tokens_per_s                  ours, with an engine that makes a step whenever its last tokens were taken
    ratio_to_ray_serve_llm        that over stock; ratio_to_ray_serve_llm_tuned: over tuned; medians over the rounds
    added_p99_ms                  of tokens paced at 50 a second and stream: from the engine's time for a token to the
                                  client's, 99th percentile
"""

import argparse
import gc
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import uvloop

from benchmarks.record import finish
from benchmarks.serving_path.events import MODEL
from benchmarks.serving_path.measure import Lateness, Throughput, lateness, median, throughput
from benchmarks.serving_path.runner import System, running
from cluster.default_model import get_default_model

PACE_PER_S = 50.0
WARM_UP_TOKENS = 64
TOKENS = {"ours": 4000, "stock": 1000, "tuned": 1000, "tuned_batched": 4000, "bare": 4000}
"""Of each stream: a run of some seconds."""


def our_cluster(pace: float, ingresses: int, replicas: int = 1) -> System:
    return System("ours", "ours", MODEL, (str(pace), str(ingresses), str(replicas)))


def systems(ingresses: int, folder: Path) -> list[System]:
    found = [our_cluster(0, ingresses), System("stock", "stock", MODEL, ("default",)), System("bare", "bare", MODEL)]
    haproxy = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if haproxy is None:
        print("no haproxy here: ray.serve.llm is tuned without it")
    tuned = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    if haproxy is not None:
        tuned |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy,
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        }
    found.append(System("tuned", "stock", MODEL, ("0",), tuned))
    found.append(System("tuned_batched", "stock", MODEL, ("default",), tuned))
    return found


async def measure_throughput(system: System, url: str) -> Throughput:
    await throughput(url, system.model, WARM_UP_TOKENS)
    return await throughput(url, system.model, TOKENS[system.name])


async def measure_lateness(url: str, pace: float, seconds: float) -> Lateness:
    await lateness(url, MODEL, pace, 2.0)
    return await lateness(url, MODEL, pace, seconds)


def rounds_of(number: int, ingresses: int) -> dict[str, list[Throughput]]:
    """Every system in every round, the order reversed in every second one."""
    results: dict[str, list[Throughput]] = {}
    with tempfile.TemporaryDirectory(prefix="haproxy-") as folder:
        every = systems(ingresses, Path(folder))
        for turn in range(number):
            for system in every if turn % 2 == 0 else every[::-1]:
                with running(system) as url:
                    result = uvloop.run(measure_throughput(system, url))
                results.setdefault(system.name, []).append(result)
                print(
                    f"round {turn + 1}: {system.name:14} {result.tokens_per_s:8.0f} tokens/s in "
                    f"{result.chunks_per_s:7.0f} chunks/s, gap p99 {result.gap_p99_ms:6.1f} ms, load generator "
                    f"{result.cpu_share:.2f} of a core",
                    flush=True,
                )
    return results


def paced(paces: list[float], seconds: float, ingresses: int) -> dict[float, Lateness]:
    results = {}
    for pace in paces:
        with running(our_cluster(pace, ingresses)) as url:
            result = results[pace] = uvloop.run(measure_lateness(url, pace, seconds))
        print(
            f"{pace:.0f} tokens/s a stream: {result.tokens_per_s:.0f} tokens/s, {result.tokens_per_chunk:.2f} a chunk, "
            f"late by {result.percentile(50):.1f} ms (median), {result.percentile(99):.1f} ms (p99)",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput and latency of the path from engine to client.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every system (default 3)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of paced streams (default 20)")
    parser.add_argument("--ingresses", type=int, default=1, help="ingress processes of ours (default 1)")
    options = parser.parse_args()
    get_default_model(print)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()
    late = paced([PACE_PER_S, 320.0], options.seconds, options.ingresses)
    results = rounds_of(options.rounds, options.ingresses)
    rate = {name: median([one.tokens_per_s for one in runs]) for name, runs in results.items()}
    finish(
        "serving_path",
        {
            "tokens_per_s": round(rate["ours"]),
            "ratio_to_ray_serve_llm": round(rate["ours"] / rate["stock"], 2),
            "ratio_to_ray_serve_llm_tuned": round(rate["ours"] / max(rate["tuned"], rate["tuned_batched"]), 2),
            "added_p99_ms": round(late[PACE_PER_S].percentile(99), 2),
        },
        {
            "streams": 64,
            "ingresses": options.ingresses,
            "runs": {
                name: [asdict(one) | {"tokens_per_s": round(one.tokens_per_s)} for one in runs]
                for name, runs in results.items()
            },
            "tokens_per_s": {name: round(value) for name, value in rate.items()},
            "tokens_per_chunk": {
                name: round(median([one.tokens / one.chunks for one in runs]), 2) for name, runs in results.items()
            },
            "paced": {
                f"{pace:.0f}": {
                    "tokens_per_s": round(one.tokens_per_s),
                    "tokens_per_chunk": round(one.tokens_per_chunk, 3),
                    "late_ms": {f"p{rank}": round(one.percentile(rank), 2) for rank in (50, 90, 99, 99.9)},
                }
                for pace, one in late.items()
            },
        },
    )


if __name__ == "__main__":
    main()
