"""`python -m benchmarks.simulator [--part NAME ...]`: results/simulator.json, pictures, and a last line of JSON.

seconds       processor time of 1,000 replicas and 100,000 requests
plan_ms_1000  a planning round for 1,000 replicas: routing view and scaling; median. Targets are planned as reports come
ttft_error    simulated against measured medians on this machine, the worst of the runs that were not used for fitting
tpot_error    likewise

A part that did not run keeps what results/simulator.json has, and has no key.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record import FOLDER
from benchmarks.simulator import calibration, comparison, scale
from cluster.simulator.render import NO_PLOTS
from replicas.environment import environment

PARTS = ("scale", "policies", "calibration")
_TRACES = ("azure_2023_conv.csv", "mooncake_conversation.jsonl")


def run(parts: Sequence[str], traces: Path, profile_file: Path | None) -> dict[str, Any]:
    """Each part's figures; they are saved as they come."""
    known = [traces / name for name in _TRACES if (traces / name).exists()]
    if len(known) < len(_TRACES):
        print(f"{traces} does not hold {' and '.join(_TRACES)}: runs that need them are left out", flush=True)
    found: dict[str, Any] = {}
    if "scale" in parts:
        found["scale"] = {}
        for replicas in scale.REPLICAS:
            found["scale"][str(replicas)] = scale.measure(replicas)
            _save(found)
    if "policies" in parts:
        mooncake = next((path for path in known if path.suffix == ".jsonl"), None)
        found["policies"] = comparison.compare(mooncake)
        _save(found)
    if "calibration" in parts:
        with tempfile.TemporaryDirectory() as folder, environment({"VLLM_RPC_BASE_PATH": folder}):  # for its sockets
            found["calibration"] = asyncio.run(calibration.calibrate(Path(folder), known, profile_file))
        _save(found)
    return found


def headline(found: Mapping[str, Any]) -> dict[str, float]:
    """What the last line says of the parts that ran."""
    figures: dict[str, float] = {}
    if thousand := found.get("scale", {}).get("1000"):
        figures |= {"seconds": thousand["seconds"], "plan_ms_1000": thousand["plan_ms"]}
    if calibrated := found.get("calibration"):
        figures |= {"ttft_error": calibrated["ttft_error"], "tpot_error": calibrated["tpot_error"]}
    return {name: round(value, 4) for name, value in figures.items()}


def _save(found: Mapping[str, Any]) -> None:
    path = FOLDER / "simulator.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    parts = known.get("parts", {})
    record: dict[str, Any] = {"benchmark": "simulator"}
    record["machine"] = {"cores": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()}
    at = datetime.now(UTC).isoformat(timespec="seconds")
    parts |= {name: {"at": at, "details": details} for name, details in found.items()}
    record["headline"] = headline({name: part["details"] for name, part in parts.items()})
    record["parts"] = parts
    path.write_text(json.dumps(record, indent=2) + "\n")


def _draw(sizes: Mapping[str, Mapping[str, float]]) -> str:
    """Cost by size of the cluster; one line to print."""
    if importlib.util.find_spec("matplotlib") is None:
        return NO_PLOTS
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(10, 4), layout="constrained")
    replicas = [one["replicas"] for one in sizes.values()]
    parts = (("us_a_request", "us a request"), ("plan_ms", "ms a planning round"))
    for axes, (name, label) in zip(figure.subplots(1, 2), parts, strict=True):
        axes.loglog(replicas, [one[name] for one in sizes.values()], marker="o")
        axes.set(xlabel="replicas", ylabel=label)
        axes.grid(True, which="both", linewidth=0.3)
    path = FOLDER / "simulator_scale.png"
    figure.savefig(path, dpi=120)
    return f"picture in {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="run this one only; may be given several times")
    parser.add_argument(
        "--traces", type=Path, default=Path("../shared/data/traces"), help=f"folder of {' and '.join(_TRACES)}"
    )
    parser.add_argument("--profile", type=Path, help="write the engine profile that was fitted to this YAML file")
    args = parser.parse_args()
    found = run(args.part or PARTS, args.traces, args.profile)
    if "scale" in found:
        print(_draw(found["scale"]))
    print(json.dumps(headline(found)))


if __name__ == "__main__":
    main()
