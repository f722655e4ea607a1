"""``ellm keys``: the API keys of a cluster, made, shown and revoked in its keys file."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.api_key import ApiKey, Scope, new_key
from cluster.key_file import KeyFileError, changing, read_keys

keys_app = typer.Typer(help="The API keys in a keys file: the cluster's auth.keys_file.", no_args_is_help=True)

_File = Annotated[Path, typer.Option("--file", "-f", envvar="ELLM_KEYS_FILE", help="The keys file.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_KEYS_FILE = Path("keys.yaml")


@keys_app.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Whose it is: letters, digits, dots, dashes, underscores.")],
    scope: Annotated[
        list[Scope] | None, typer.Option(help="What it is for; again for more.", show_default="inference")
    ] = None,
    slo_class: Annotated[
        str | None, typer.Option("--class", help="SLO class of requests that name none.", show_default="the first")
    ] = None,
    allow_class: Annotated[
        list[str] | None, typer.Option(help="Class that requests may name; again for more.", show_default="all")
    ] = None,
    requests_per_min: Annotated[int | None, typer.Option(help="Requests in a minute.", show_default="no bound")] = None,
    tokens_per_min: Annotated[
        int | None, typer.Option(help="Tokens of prompts and answers in a minute.", show_default="no bound")
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="Days until it expires.", show_default="never")] = None,
    file: _File = _KEYS_FILE,
    as_json: _Json = False,
) -> None:
    """Make a key, add it to the file, and print it: it cannot be shown again. A cluster that serves takes it in a
    moment."""
    fields: dict[str, Any] = {
        "tenant": tenant,
        "scopes": scope or None,
        "slo_class": slo_class,
        "slo_classes": allow_class or None,
        "requests_per_min": requests_per_min,
        "tokens_per_min": tokens_per_min,
    }
    try:
        if expires_days is not None:
            fields["expires"] = (datetime.now(UTC) + timedelta(days=expires_days)).replace(microsecond=0)
        text, key = new_key(**{name: value for name, value in fields.items() if value is not None})
        with changing(file) as keys:
            keys.append(key)
    except ValidationError as error:
        _fail("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)))
    except OverflowError:
        _fail(f"{expires_days} days is too long; leave --expires-days out for a key that does not expire")
    except KeyFileError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps({"key": text} | _shown(key), indent=2))
        return
    typer.echo(f"key {key.id} of {key.tenant} is in {file}; its text is shown this once:", err=True)
    typer.echo(text)


@keys_app.command("list")
def list_keys(file: _File = _KEYS_FILE, as_json: _Json = False) -> None:
    """Show the keys in the file."""
    try:
        keys = read_keys(file)
    except KeyFileError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps([_shown(key) for key in keys], indent=2))
        return
    table = Table("id", "tenant", "scopes", "class", "may name", "requests/min", "tokens/min", "expires", box=None)
    for key in keys:
        bounds = (str(one or "any") for one in (key.requests_per_min, key.tokens_per_min))
        named = ", ".join(key.slo_classes) if key.slo_classes else "all"
        table.add_row(
            key.id, key.tenant, ", ".join(key.scopes), key.default_class or "the first", named, *bounds, _until(key)
        )
    Console().print(table)


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="Its id, as `ellm keys list` shows it.", metavar="ID")],
    file: _File = _KEYS_FILE,
    as_json: _Json = False,
) -> None:
    """Take a key out of the file. A cluster that serves refuses it in a moment; what it has begun goes on."""
    try:
        with changing(file) as keys:
            left = [key for key in keys if key.id != key_id]
            if len(left) == len(keys):
                known = ", ".join(key.id for key in keys) or "none"
                raise KeyFileError(f"{file} has no key {key_id!r}; it has {known}")
            keys[:] = left
    except KeyFileError as error:
        _fail(str(error))
    typer.echo(json.dumps({"revoked": key_id}) if as_json else f"{key_id} is revoked")


def _shown(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"sha256"})


def _until(key: ApiKey) -> str:
    if key.expires is None:
        return "never"
    return f"{key.expires:%Y-%m-%d %H:%M}" if key.expires > datetime.now(UTC) else "expired"


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
