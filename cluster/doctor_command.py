"""The command ``ellm doctor``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig
from cluster.config_file import ConfigError, load_config

if TYPE_CHECKING:
    from cluster.finding import Finding

_STYLE = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of the cluster that is to start here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine: driver, memory, shared memory, port, versions, limits, clock. Exit status 1 where a cluster
    would not start."""
    from cluster.doctor import examine
    from cluster.finding import State

    try:
        checks = examine(load_config(config) if config else ClusterConfig())
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    failed = any(check.state is State.FAILED for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        Console().print(_table(checks))
    if failed:
        raise typer.Exit(1)


def _table(checks: "list[Finding]") -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.state, _STYLE[check.state]), check.name, Text(check.found))
        if check.remedy:
            table.add_row("", "", Text(f"→ {check.remedy}", "italic"))
    return table
