"""Shows what a simulation found: tables for people, and plots where matplotlib is installed."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from cluster.bench.report import Latencies
from cluster.simulator.plan import Plan
from cluster.simulator.result import SimulationResult
from cluster.slo import Ending

NO_PLOTS = "no plots: matplotlib is not installed; `uv pip install --group bench` installs it"
_GIB = 1 << 30


def render_result(result: SimulationResult) -> RenderableType:
    """Figures, classes and latencies, for any rich console."""
    return Group(_figures(result), _classes(result), _latencies(result))


def render_comparison(results: Sequence[SimulationResult]) -> RenderableType:
    """One line a routing policy, best attainment first."""
    table = _table("policy", "attained", "good/s", "TTFT p50", "p99", "TPOT p50", "p99", "hits", "displaced")
    for one in sorted(results, key=lambda one: -one.account.total.attainment):
        latencies = one.latencies()
        ttft, tpot = latencies["ttft"], latencies["tpot"]
        table.add_row(
            one.scenario.policy,
            f"{one.account.total.attainment:.1%}",
            f"{one.account.total.kept / one.duration_s:.3f}",
            *(_ms(value) for value in (ttft.median_ms, ttft.percentiles_ms[99.0])),
            *(_ms(value) for value in (tpot.median_ms, tpot.percentiles_ms[99.0])),
            f"{one.hit_share:.1%}",
            str(one.preemptions),
        )
    return table


def render_plan(plan: Plan) -> RenderableType:
    """The curve, by memory split, and what meets the targets."""
    table = _table("memory", "steps", "KV tokens", "replicas", "attained", "good/s", "TTFT p99", "TPOT p99")
    for point in plan.points:
        table.add_row(
            "elastic" if point.elastic else "static",
            str(point.step_tokens),
            str(point.kv_tokens),
            str(point.replicas),
            f"{point.attainment:.1%}",
            f"{point.goodput:.2f}",
            _ms(point.p99_ttft_ms),
            _ms(point.p99_tpot_ms),
            style="bold green" if point is plan.best else None,
        )
    return table


def draw_result(result: SimulationResult, path: Path) -> str:
    """Write a picture of TTFT, TPOT, attainment and memory by owner; one line to print: where it is, or why there is
    none."""
    if importlib.util.find_spec("matplotlib") is None:
        return NO_PLOTS
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(13, 8), layout="constrained")
    (ttft_axes, tpot_axes), (kept_axes, memory_axes) = figure.subplots(2, 2)
    for axes, name, values in (
        (ttft_axes, "TTFT", [row.ttft_s for row in result.answered]),
        (tpot_axes, "TPOT", [row.tpot_s for row in result.answered if row.output_tokens > 1]),
    ):
        ordered = sorted(1000 * value for value in values)
        axes.plot(ordered, [(at + 1) / len(ordered) for at in range(len(ordered))])
        axes.set(
            title=name, xlabel="ms", ylabel="share of answers", xscale="log" if ordered and ordered[0] > 0 else "linear"
        )
    at_s, shares = result.attainment_curve()
    kept_axes.plot(at_s, shares)
    kept_axes.set(title="attainment", xlabel="arrival, s", ylabel="share of requests", ylim=(0, 1.02))
    samples = result.samples
    owners = {
        "weights": [one.weights_bytes for one in samples],
        "KV in use": [one.kv_used_bytes for one in samples],
        "KV kept": [one.kv_cached_bytes for one in samples],
        "activations": [one.activation_bytes for one in samples],
        "free": [
            max(0, one.device_bytes - one.kv_used_bytes - one.kv_cached_bytes - one.activation_bytes) for one in samples
        ],
    }
    gib = [[value / _GIB for value in values] for values in owners.values()]
    memory_axes.stackplot([one.at_s for one in samples], gib, labels=list(owners))
    memory_axes.set(title="memory by owner", xlabel="s", ylabel="GiB")
    memory_axes.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=110)
    return f"plots in {path}"


def draw_plan(plan: Plan, path: Path) -> str:
    """Write a picture of attainment by replicas, a line for each memory split; one line to print."""
    if importlib.util.find_spec("matplotlib") is None:
        return NO_PLOTS
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for elastic, tokens in sorted({(one.elastic, one.step_tokens) for one in plan.points}):
        line = sorted(
            (one.replicas, one.attainment) for one in plan.points if (one.elastic, one.step_tokens) == (elastic, tokens)
        )
        axes.plot(
            [at for at, _ in line],
            [share for _, share in line],
            marker="o",
            label=f"{'elastic' if elastic else 'static'}, steps of {tokens}",
        )
    axes.axhline(plan.goal, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="replicas", ylabel="attainment")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return f"curve in {path}"


def _figures(result: SimulationResult) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    endings = result.account.total.endings
    lost = ", ".join(f"{endings[one]} {one.replace('_', ' ')}" for one in Ending if endings[one])
    table.add_row("requests", lost)
    table.add_row("simulated (s)", f"{result.duration_s:.1f}")
    table.add_row("attainment", f"{result.account.total.attainment:.2%}")
    table.add_row("goodput (req/s)", f"{result.account.total.kept / max(result.duration_s, 1e-9):.3f}")
    table.add_row("prompt tokens from prefix caches", f"{result.hit_share:.1%}")
    table.add_row("preemptions", str(result.preemptions))
    if result.ttft_error.count:
        table.add_row(
            "median prediction error, TTFT, TPOT", f"{result.ttft_error.median:.1%}, {result.tpot_error.median:.1%}"
        )
    return table


def _classes(result: SimulationResult) -> Table:
    endings = [one for one in Ending if result.account.total.endings[one]]
    table = _table("class", "requests", "attained", "good/s", *endings)
    for name, tally in sorted(result.account.by_class.items()):
        table.add_row(
            name,
            str(tally.counted),
            f"{tally.attainment:.1%}",
            f"{tally.kept / max(result.duration_s, 1e-9):.3f}",
            *(str(tally.endings[one]) for one in endings),
        )
    return table


def _latencies(result: SimulationResult) -> Table:
    table = _table("ms", "mean", "median", "p90", "p95", "p99")
    for name, one in result.latencies().items():
        table.add_row(name.upper(), *(_ms(value) for value in _values(one)))
    return table


def _values(latencies: Latencies) -> list[float]:
    return [latencies.mean_ms, latencies.median_ms, *latencies.percentiles_ms.values()]


def _ms(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table
