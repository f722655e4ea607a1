"""The command ``ellm explain``: what the controller decided lately, with what it saw and why."""

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from cluster.readiness import NoAnswer, read_decisions
from memory_agent.reports import replica_name


def explain(
    replica: Annotated[
        str, typer.Argument(help="Part of a replica's or model's name.", show_default="all", metavar="[REPLICA]")
    ] = "",
    url: Annotated[str, typer.Option(help="Address of the cluster.")] = "http://127.0.0.1:8000",
    last: Annotated[int, typer.Option(help="Most decisions to show.", min=1, max=1000)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON, with all their inputs.")] = False,
) -> None:
    """Show the controller's last decisions, the newest last: targets of replicas, and scaling."""
    try:
        decisions = read_decisions(url, last, replica)
    except NoAnswer as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(decisions, indent=2))
    else:
        Console().print(render_decisions(decisions))


def render_decisions(decisions: Iterable[dict[str, Any]]) -> RenderableType:
    """For any rich console. ``decisions`` is what ``Controller.decisions`` returns, the newest first."""
    lines = [line for one in reversed(list(decisions)) for line in _lines(one)]
    return Group(*lines) if lines else Text("the controller has decided nothing about that since it started")


def _lines(decision: dict[str, Any]) -> Iterable[Text]:
    """What was decided and why, and below it what was seen."""
    subject = replica_name(str(decision["subject"]))
    first = Text(f"{_ago(decision['age_s']):>8}  ", style="dim")
    first.append(f"{decision['kind']} ", style="default not dim")
    first.append(f"{subject}: ", style="bold not dim")
    first.append(str(decision["action"]), style="default not dim")
    yield first
    yield Text(f"{'':10}because {decision['reason']}")
    if decision["inputs"]:
        seen = ", ".join(f"{name} {_short(value)}" for name, value in decision["inputs"].items())
        yield Text(f"{'':10}saw {seen}", style="dim")


def _ago(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("m", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit} ago"
    return f"{seconds:.0f}s ago"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
