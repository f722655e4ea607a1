"""`python -m benchmarks.elastic [--scenario NAME ...]`: bounds, figures, results/elastic.json, and a last line of JSON.

A ratio is against baseline A; with the suffix ``_vs_best`` against the best of A, B and C. A scenario that did not run
has no key.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.elastic import bursts, idle, long_inputs, no_pressure, two_models
from benchmarks.elastic.outcome import Outcome, draw, headline_line, save
from replicas.environment import environment

Scenario = Callable[[Path], Awaitable[Outcome]]
SCENARIOS: Mapping[str, Scenario] = {
    "long": long_inputs.run,
    "bursts": bursts.run,
    "two-models": two_models.run,
    "no-pressure": no_pressure.run,
    "idle": idle.run,
}


async def run(scenarios: Mapping[str, Scenario]) -> dict[str, Outcome]:
    outcomes = {}
    for name, scenario in scenarios.items():
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder, environment({"VLLM_RPC_BASE_PATH": folder}):  # for its sockets
            one = outcomes[name] = await scenario(Path(folder))
        save({name: one})
        for key, share in one.reached.items():
            print(f"{key}: {one.headline[key]:.2f} of a bound of {one.bounds[key]:.2f}, {share:.0%}", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenario", action="append", choices=list(SCENARIOS), help="run this one only; may be given several times"
    )
    parser.add_argument(
        "--trace", type=Path, help="bursts take lengths and times from it: CSV of Azure's traces or JSONL of Mooncake"
    )
    args = parser.parse_args()
    chosen = {name: SCENARIOS[name] for name in args.scenario or SCENARIOS}
    if args.trace and chosen.pop("bursts", None):
        chosen["bursts-of-trace"] = partial(bursts.run, trace=args.trace)
    # Engines that are stopped for their turn cannot notice that this process is gone: it must not end without them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    outcomes = asyncio.run(run(chosen))
    print(draw(outcomes))
    print(headline_line(outcomes))


if __name__ == "__main__":
    main()
