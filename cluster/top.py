"""``ellm top``: what the live page shows, in a terminal."""

import json
import math
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.explain import render_decisions
from cluster.readiness import NoAnswer, read_decisions, read_status
from cluster.recent_slo import RecentSlo
from cluster.status import format_bytes, render_level, replica_status, short_name
from memory_agent.reports import replica_name

_OWNERS = (
    ("used", "kv_used_bytes", "blue"),
    ("cached", "kv_cached_bytes", "bright_cyan"),
    ("activations", "activation_bytes", "yellow"),
    ("starting", "start_bytes", "magenta"),
    ("free", "free_bytes", "bright_black"),
)
"""Name, key of a device's ``memory``, colour: they sum to the budget."""
_BESIDE = (("weights", "weights_bytes"), ("host buffer", "host_buffer_bytes"))
_DEVICE_BAR, _REPLICA_BAR = 78, 20
_FULL, _EMPTY, _MARK = "█", "░", "│"
_KEPT_WELL, _KEPT_FAIRLY = 0.99, 0.9


def top(
    url: Annotated[str, typer.Option(help="Address of the cluster.")] = "http://127.0.0.1:8000",
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.2)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each look as one line of JSON.")] = False,
    decisions: Annotated[int, typer.Option(help="Most decisions to show.", min=1, max=1000)] = 5,
) -> None:
    """Watch devices, replicas, service levels and decisions, until Ctrl-C."""
    recent = RecentSlo()

    def look() -> dict[str, Any]:
        status = read_status(url)
        return {
            "status": status,
            "recent": recent.add(status["slo"], time.monotonic()),
            "decisions": read_decisions(url, decisions, ""),
        }

    try:
        state = look()
        if as_json:
            typer.echo(json.dumps(state))
            while not once:
                time.sleep(every_s)
                typer.echo(json.dumps(look()))
        elif once:
            Console().print(render_top(state))
        else:
            with Live(render_top(state), screen=True, auto_refresh=False) as live:
                while True:
                    time.sleep(every_s)
                    live.update(_or_reason(look), refresh=True)
    except NoAnswer as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        return


def render_top(state: dict[str, Any]) -> RenderableType:
    """For any rich console. ``state``: status, recent and decisions, as a ``state`` event of ``LiveFeed`` has them."""
    status = state["status"]
    devices = [(node["node"], device) for node in status["nodes"] for device in node["devices"]]
    parts: list[RenderableType] = [_device(node, device) for node, device in devices]
    if not devices:
        parts.append(Text("no memory agent has reported within 3 s", style="yellow"))
    for absent in status["absent_devices"]:
        parts.append(Text(f"{short_name(absent['node'])} {absent['device']}: counted as absent", style="bold red"))
    parts += [_slo(status["slo"], state["recent"]), Text(), render_decisions(state["decisions"]), Text()]
    # Last, because a terminal that is too low cuts off what is there.
    return Group(*parts, *(_replicas(device) for _, device in devices))


def _or_reason(look: Any) -> RenderableType:
    """What there is to see, or why nothing: a cluster that is away for a moment ends no watch."""
    try:
        return render_top(look())
    except NoAnswer as error:
        return Text(f"{error}; looking again", style="bold red")


def _device(node: str, device: dict[str, Any]) -> RenderableType:
    memory = device["memory"]
    head = Text(f"{device['device']} on {short_name(node)}  ", style="bold")
    head.append_text(render_level(device["pressure"]))
    head.append(f"  budget {format_bytes(device['budget_bytes'])}", style="not bold")
    head.append(f"  running {device['running']}  waiting {device['waiting']}", "not bold")
    head.append(f"  dead {device['dead_engines']}", "not bold")
    total = max(sum(memory[key] for _, key, _ in _OWNERS), 1)
    bar = _bar([(memory[key] / total, colour) for _, key, colour in _OWNERS[:-1]], _DEVICE_BAR)
    legend = Table.grid(padding=(0, 2, 0, 0))
    sizes = ((f"{name} {format_bytes(memory[key])}", colour) for name, key, colour in _OWNERS)
    owners = [Text.assemble((f"{_FULL} ", colour), what) for what, colour in sizes]
    beside = [Text(f"{name} {format_bytes(memory[key])}", "dim") for name, key in _BESIDE]
    legend.add_row(*owners[:4])
    legend.add_row(*owners[4:], *beside)
    return Group(head, bar, legend, Text())


def _replicas(device: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("replica", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column(f"used, held {_MARK} leased", no_wrap=True)
    for name in ("used", "held", "lease", "run", "wait"):
        table.add_column(name, justify="right", no_wrap=True)
    longest = max((max(one["limit_bytes"], one["held_bytes_os"], 1) for one in device["replicas"]), default=1)
    for one in device["replicas"]:
        used, held, limit = one["used_bytes"], one["held_bytes_os"], one["limit_bytes"]
        parts = [(used / longest, "blue"), (max(0, held - used) / longest, "bright_cyan")]
        bar = _bar(parts, _REPLICA_BAR, mark=limit / longest)
        sizes = map(format_bytes, (used, held, limit))
        counts = str(one["running"]), Text(str(one["waiting"]), "yellow" if one["waiting"] else "")
        table.add_row(
            Text(replica_name(one["engine_id"])), replica_status(one), Text(one["model"]), bar, *sizes, *counts
        )
    return table


def _slo(slo: dict[str, Any], recent: dict[str, Any]) -> RenderableType:
    if not slo["classes"]:
        return Text("no request has ended yet", style="dim")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("class", no_wrap=True)
    for name in (f"kept, {recent['window_s']:.0f} s", "of", "refused", "failed", "late", "since the start", "goodput"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tally in slo["classes"].items():
        now = recent["classes"][name]
        counts = (str(now[key]) for key in ("requests", "rejected", "failed", "timed_out"))
        goodput = f"{tally['goodput_requests_per_s'] or 0.0:.2f}/s"
        table.add_row(name, _share(now["attainment"]), *counts, _share(tally["attainment"]), goodput)
    return table


def _share(share: float | None) -> Text:
    if share is None:
        return Text("-")
    style = "green" if share >= _KEPT_WELL else "yellow" if share >= _KEPT_FAIRLY else "bold red"
    return Text(f"{math.floor(share * 1000) / 10:.1f}%", style)  # 100 % is all of them


def _bar(parts: Iterable[tuple[float, str]], width: int, mark: float | None = None) -> Text:
    """Shares of ``width`` cells in their colours, the rest empty; ``mark``: a share at which a line is drawn."""
    cells: list[tuple[str, str]] = []
    end = 0.0
    for share, colour in parts:
        end += share
        cells += [(_FULL, colour)] * (min(width, round(end * width)) - len(cells))
    cells += [(_EMPTY, "bright_black")] * (width - len(cells))
    if mark is not None:
        cells[min(width - 1, int(mark * width))] = (_MARK, "bold")
    bar = Text(style="not bold")
    for character, style in cells:
        bar.append(character, style)
    return bar
