"""Shows the controller's snapshot to people: the tables of ``ellm status``."""

from collections.abc import Container, Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memory_agent.reports import replica_name

_UNITS = ("B", "Ki", "Mi", "Gi", "Ti")
_REPLICA_SIZES = ("used_bytes", "held_bytes_os", "limit_bytes", "host_bytes")
_ENDINGS = ("answered", "rejected", "failed", "timed_out", "cancelled")
_LEVEL_STYLE = {"NORMAL": "green", "ELEVATED": "yellow", "CRITICAL": "bold red"}


def render_status(snapshot: dict[str, Any]) -> RenderableType:
    """Tables of devices and replicas, for any rich console. ``snapshot`` is what ``Controller.snapshot`` returns."""
    devices = [(node["node"], device) for node in snapshot["nodes"] for device in node["devices"]]
    parts: list[RenderableType] = [_headline(snapshot, [device for _, device in devices])]
    if snapshot["models"] is None:
        parts.append(Text("the model registry is away; models are served without it", style="yellow"))
    else:
        parts.append(render_models(snapshot["models"]))
    if snapshot["slo"]["total"]["requests"]:
        parts.append(render_slo(snapshot["slo"]))
    if devices:
        parts.append(_device_table(devices))
        parts.append(_replica_table(devices, {one["replica"] for one in snapshot["drains"]}))
        parts.extend(_waiting_lines(devices))
    else:
        parts.append(Text("no memory agent has reported within 3 s", style="yellow"))
    for absent in snapshot["absent_devices"]:
        age_s = absent["report_age_s"]
        lost = f"{short_name(absent['node'])} {absent['device']}: no report for {age_s:.1f} s, counted as absent"
        parts.append(Text(lost, style="bold red"))
    return Group(*parts)


def render_models(models: Iterable[dict[str, Any]]) -> RenderableType:
    """A table of models. ``models`` is what ``ModelKeeper.listing`` returns."""
    table = _table("\nModels: what each replica is guaranteed and may hold at most, what all of them hold", ())
    table.add_column("model", overflow="fold")
    table.add_column("phase", no_wrap=True)
    for column in ("replicas", "guarantee", "ceiling", "held", "limit", "run", "wait"):
        table.add_column(column, justify="right", no_wrap=True)
    for model in models:
        phase = Text(model["phase"], style="green" if model["phase"] == "serving" else "yellow")
        if "replicas" not in model:
            table.add_row(Text(model["name"]), phase)
            continue
        least, most = model["min_replicas"], model["max_replicas"]
        replicas = str(model["replicas"]) if least == most else f"{least} to {most}"
        if not model["elastic"]:
            table.add_row(Text(model["name"]), phase, replicas, *2 * [format_bytes(model["ceiling_bytes"])])
            continue
        sizes = (model[f"{size}_bytes"] for size in ("guarantee", "ceiling", "held", "limit"))
        running, waiting = (str(model[count]) for count in ("running", "waiting"))
        table.add_row(Text(model["name"]), phase, replicas, *map(format_bytes, sizes), running, waiting)
    return table


def render_slo(slo: dict[str, Any]) -> RenderableType:
    """A table of how requests have fared. ``slo`` is what ``cluster.slo_ledger.to_json`` returns."""
    table = _table(
        f"\nRequests of {slo['duration_s']:.0f} s, by class and by model: share that kept every target, how they ended",
        ("class or model",),
    )
    for column in ("kept", "goodput", *_ENDINGS):
        table.add_column(column.replace("_", " "), justify="right", no_wrap=True)
    for name, tally in (*slo["classes"].items(), *slo["models"].items()):
        share = "-" if tally["attainment"] is None else f"{tally['attainment']:.1%}"
        goodput = f"{tally['goodput_requests_per_s']:.2f}/s"
        table.add_row(Text(name), share, goodput, *(str(tally[ending]) for ending in _ENDINGS))
    return table


def format_bytes(value: float) -> str:
    """About three significant figures in binary units, as ``free -h`` writes them: ``512B``, ``1.50Gi``."""
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    digits = 0 if unit == "B" else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}{unit}"


def _headline(snapshot: dict[str, Any], devices: list[dict[str, Any]]) -> Text:
    replicas = [replica for device in devices for replica in device["replicas"]]
    bounds = snapshot["bounds"]
    running, waiting = (sum(one[count] for one in replicas) for count in ("running", "waiting"))
    tokens, active = (bounds[key] or "unbound" for key in ("token_budget_max", "active_max"))
    return Text(
        f"nodes {len(snapshot['nodes'])}, devices {len(devices)}, replicas {len(replicas)}, "
        f"dead {sum(device['dead_engines'] for device in devices)}; "
        f"requests running {running}, waiting {waiting}; "
        f"bounds: tokens a step {tokens}, active {active}"
    )


def _device_table(devices: Iterable[tuple[str, dict[str, Any]]]) -> Table:
    owners = ("used", "cached", "act", "start", "free", "budget", "weight", "buffer")
    table = _table(
        "\nDevices: KV memory used and cached, activations, starts, free of the budget; weights, host buffer",
        ("node", "device", "pressure"),
    )
    for column in (*owners, "age"):
        table.add_column(column, justify="right", no_wrap=True)
    for node, device in devices:
        memory = device["memory"]
        sizes = (
            memory["kv_used_bytes"],
            memory["kv_cached_bytes"],
            memory["activation_bytes"],
            memory["start_bytes"],
            memory["free_bytes"],
            device["budget_bytes"],
            memory["weights_bytes"],
            memory["host_buffer_bytes"],
        )
        table.add_row(
            short_name(node),
            device["device"],
            render_level(device["pressure"]),
            *map(format_bytes, sizes),
            f"{device['report_age_s']:.1f}s",
        )
    return table


def _replica_table(devices: Iterable[tuple[str, dict[str, Any]]], draining: Container[str]) -> Table:
    table = _table(
        "\nReplicas: KV memory used, held and leased, host buffer; preempted, set aside; extents grown/shrunk",
        ("replica", "status"),
    )
    table.add_column("model", overflow="fold")
    for column in ("used", "held", "limit", "host", "use", "run", "wait", "pre", "aside", "moves"):
        table.add_column(column, justify="right", no_wrap=True)
    for _, device in devices:
        for one in device["replicas"]:
            table.add_row(
                Text(replica_name(one["engine_id"])),
                Text("DRAINING", style="yellow") if one["engine_id"] in draining else replica_status(one),
                Text(one["model"]),
                *(format_bytes(one[size]) for size in _REPLICA_SIZES),
                f"{one['kv_usage']:.0%}",
                *(str(one[count]) for count in ("running", "waiting", "preemptions", "set_aside")),
                f"{one['inflate_count']}/{one['deflate_count']}",
            )
    return table


def _waiting_lines(devices: Iterable[tuple[str, dict[str, Any]]]) -> list[Text]:
    return [
        Text(
            f"{replica_name(one['engine_id'])} waits to start: it takes {format_bytes(one['start_bytes'])} "
            f"of the budget, and has {format_bytes(one['limit_bytes'])}; "
            "others have to give back, or to finish their start",
            style="yellow",
        )
        for _, device in devices
        for one in device["replicas"]
        if _waits(one)
    ]


def _table(title: str, text: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in text:
        table.add_column(column, no_wrap=True)
    return table


def _waits(replica: dict[str, Any]) -> bool:
    return bool(replica["limit_bytes"] < replica["start_bytes"])


def replica_status(replica: dict[str, Any]) -> Text:
    """Its state; how short of memory it is once it is live."""
    if replica["state"] == "LIVE":
        return render_level(replica["pressure"])
    return Text("WAITING" if _waits(replica) else replica["state"], style="yellow")


def render_level(level: str) -> Text:
    """A pressure level, coloured."""
    return Text(level, style=_LEVEL_STYLE.get(level, ""))


def short_name(identity: str) -> str:
    """The first characters of a long identity: enough to tell nodes apart, short enough for a table."""
    return identity if len(identity) <= 12 else identity[:8]
