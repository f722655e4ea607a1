"""``ellm dashboards``: files for Grafana and Prometheus, and a push into a Grafana."""

import json
import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

TOKEN_VARIABLE = "GRAFANA_TOKEN"
_OBJECTIVE = 0.99
_RUNBOOKS = "docs/runbooks"

dashboards_app = typer.Typer(help="Grafana dashboards and alert rules.", no_args_is_help=True)

Objective = Annotated[float, typer.Option(help="Share of requests that are to keep their targets; alerts go by it.")]
Runbooks = Annotated[str, typer.Option(help="Address of the folder with the alerts' pages.")]
Prometheus = Annotated[str, typer.Option("--prometheus", help="Prometheus, as Grafana's server reaches it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dashboards_app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="Where to write; made where it is not there.")],
    url: Annotated[str, typer.Option(help="The cluster, as Prometheus reaches it.")] = "http://127.0.0.1:8000",
    prometheus: Prometheus = "http://127.0.0.1:9090",
    objective: Objective = _OBJECTIVE,
    runbooks: Runbooks = _RUNBOOKS,
    as_json: AsJson = False,
) -> None:
    """Write dashboards, rules, and provisioning files of Grafana and Prometheus."""
    from dashboards.files import export_files, write_files

    _check(objective)
    try:
        written = write_files(folder, export_files(url, prometheus, objective, runbooks))
    except OSError as error:
        _fail(f"cannot write {error.filename or folder}: {error.strerror}; name a folder that you may write to")
    if as_json:
        typer.echo(json.dumps([str(path) for path in written]))
    else:
        typer.echo("\n".join(map(str, written)))


@dashboards_app.command("push")
def push(
    grafana: Annotated[str, typer.Option("--grafana", help="Address of Grafana.")] = "http://127.0.0.1:3000",
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the token of a service account.", show_default=f"the variable {TOKEN_VARIABLE}"),
    ] = None,
    prometheus: Prometheus = "http://127.0.0.1:9090",
    objective: Objective = _OBJECTIVE,
    runbooks: Runbooks = _RUNBOOKS,
    as_json: AsJson = False,
) -> None:
    """Put folder, datasource, dashboards and alert rules into a Grafana. Again changes nothing."""
    _check(objective)
    token = _token(token_file)
    try:
        from dashboards.grafana import Change, Grafana, GrafanaPushError
    except ModuleNotFoundError as error:
        _fail(
            f"{error.name} is not installed, which `push` needs: pip install 'ellm-cluster[grafana]', best into an "
            "environment of its own; `ellm dashboards export` does without"
        )
    from dashboards.boards import BOARDS

    changes: dict[str, Change] = {}

    def note(what: str, change: Change) -> None:
        changes[what] = change
        if not as_json:
            typer.echo(f"{change:<10} {what}")

    try:
        there = Grafana(grafana, token)
        note("folder", there.push_folder())
        note("datasource", there.push_datasource(prometheus))
        for board in BOARDS:
            note(f"dashboard {board.title}", there.push_board(board))
        for name, change in there.push_rules(objective, runbooks):
            note(f"alert rule {name}", change)
    except GrafanaPushError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(changes))


def _check(objective: float) -> None:
    if not 0 < objective < 1:
        _fail(f"objective is {objective:g}; give a share above 0 and below 1, such as 0.99")


def _token(file: Path | None) -> str:
    """Never on the command line, where everybody on the host can read it."""
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            _fail(f"cannot read the token from {file}: {error}")
        source = str(file)
    else:
        token, source = os.environ.get(TOKEN_VARIABLE, "").strip(), f"the variable {TOKEN_VARIABLE}"
    if not token or not token.isascii() or len(token.split()) != 1:
        _fail(f"there is no token in {source}; set {TOKEN_VARIABLE}, or name a file with --token-file")
    return token


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
