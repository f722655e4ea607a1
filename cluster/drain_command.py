"""``ellm drain``: empties a replica or a node while its requests go on."""

import json
import time
from typing import Annotated, Any

import typer

from cluster.models_client import RefusedError, command
from cluster.readiness import NoAnswer
from memory_agent.reports import replica_name

_LOOK_S = 0.5


def drain(
    target: Annotated[str, typer.Argument(help="Replica, or id or address of a node; see `ellm status`.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let it have requests again.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is empty.")] = True,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait at most.", min=0.0)] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is left at the end as JSON.")] = False,
    url: Annotated[str, typer.Option(help="Address of the cluster.")] = "http://127.0.0.1:8000",
) -> None:
    """Send a replica, or all of a node, no more requests, and move those that are there. Exit status 1 where it is not
    empty in time: the drain goes on."""
    try:
        replicas = set(command(url, "POST", "/ellm/drain", {"target": target, "undo": undo})["replicas"])
        left = [] if undo or not wait else _wait(url, replicas, time.monotonic() + timeout_s, quiet=as_json)
    except (NoAnswer, RefusedError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    names = ", ".join(sorted(map(replica_name, replicas)))
    if as_json:
        typer.echo(json.dumps({"replicas": sorted(replicas), "left": left}))
    elif undo:
        typer.echo(f"{names}: may have requests again")
    elif not wait:
        typer.echo(f"{names}: gets no more requests, and is being emptied")
    elif not left:
        typer.echo(f"{names}: empty, and gets no request until `ellm drain {target} --undo`")
    if left:
        typer.echo(f"error: not empty after {timeout_s:g} s; the drain goes on", err=True)
        raise typer.Exit(1)


def _wait(url: str, replicas: set[str], deadline_s: float, quiet: bool) -> list[dict[str, Any]]:
    """What is left when all are empty, or at the deadline: their drains with requests."""
    said = ""
    seen = False
    while True:
        found = [one for one in command(url, "GET", "/ellm/drains")["drains"] if one["replica"] in replicas]
        left = [one for one in found if one["streams"]]
        seen = seen or bool(found)  # the replicas' own word of it comes a second later
        if (seen and not left) or time.monotonic() > deadline_s:
            return left
        if not quiet and (now := _in_words(left)) != said:
            said = now
            typer.echo(said)
        time.sleep(_LOOK_S)


def _in_words(left: list[dict[str, Any]]) -> str:
    lines = []
    for one in left:
        lines.append(f"{replica_name(one['replica'])} of {one['model']}: {one['streams']} left")
        lines += [f"  {request} stays to its end: {why}" for request, why in one["stays"].items()]
    return "\n".join(lines)
