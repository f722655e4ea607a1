"""``ellm models``: the models of a running cluster, listed, added, removed and limited."""

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cluster.config import ModelConfig
from cluster.config_file import ConfigError, load_config, validated
from cluster.models_client import ModelsClient, RefusedError, UnknownError
from cluster.readiness import NoAnswer

models_app = typer.Typer(help="The models of a running cluster.", no_args_is_help=True)

_POLL_S = 0.5
_SIZE = "such as 512MiB, or auto"
_Url = Annotated[str, typer.Option(help="Address of the cluster.")]
_Name = Annotated[str, typer.Argument(help='Name that requests use as "model".')]
_Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
_HERE = "http://127.0.0.1:8000"


@models_app.command("list")
def list_models(url: _Url = _HERE, as_json: _Json = False) -> None:
    """Show the models, what their replicas are guaranteed, may hold and hold."""
    try:
        _show(ModelsClient(url).models(), as_json)
    except (NoAnswer, RefusedError) as error:
        _fail(str(error))


@models_app.command("add")
def add_model(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a checkpoint on the cluster's host, or hub id.", metavar="[MODEL]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file: one of its models, --name says which.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name that requests use.", show_default="from MODEL")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engine replicas.", show_default="2")] = None,
    guarantee: Annotated[
        str | None, typer.Option(help=f"Memory that each replica can always get, {_SIZE}.", show_default="auto")
    ] = None,
    ceiling: Annotated[
        str | None, typer.Option(help=f"KV memory that each replica can ever hold, {_SIZE}.", show_default="auto")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Part of contended memory, against other models.", show_default="1")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of one longest request.", show_default="auto")
    ] = None,
    url: _Url = _HERE,
    as_json: _Json = False,
) -> None:
    """Add a model: check that it fits, start its replicas, and wait until requests can use it."""
    try:
        tree = _tree(model, config, name)
        values = {"replicas": replicas, "guarantee": guarantee, "kv_ceiling": ceiling, "weight": weight}
        tree |= {key: value for key, value in (values | {"max_model_len": max_model_len}).items() if value is not None}
        chosen: ModelConfig = validated({"models": [tree]}, "the command line").models[0]
    except ConfigError as error:
        _fail(str(error))
    client = ModelsClient(url)
    try:
        client.add(chosen)
        story = _follow(client, chosen.name)
    except UnknownError:
        _fail(
            f"the addition of {chosen.name} was lost, because the cluster's model registry was restarted; add it again"
        )
    except (NoAnswer, RefusedError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail(f"not waiting any more; {chosen.name} is still being added, `ellm models remove {chosen.name}` undoes it")
    if as_json:
        _show([story], as_json)
    else:
        typer.echo(f"{chosen.name} answers at {url}/v1")


@models_app.command("remove")
def remove_model(name: _Name, url: _Url = _HERE, as_json: _Json = False) -> None:
    """Remove a model: refuse new requests, let those in flight end, then give its memory to the other models."""
    client = ModelsClient(url)
    try:
        client.remove(name)
        with contextlib.suppress(UnknownError):  # gone
            _follow(client, name)
    except (NoAnswer, RefusedError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail(f"not waiting any more; {name} is still being removed, `ellm models list` shows it")
    typer.echo(json.dumps({"removed": name}) if as_json else f"{name} is removed")


@models_app.command("limit")
def limit_model(
    name: _Name,
    guarantee: Annotated[str | None, typer.Option(help=f"Memory that each replica can always get, {_SIZE}.")] = None,
    ceiling: Annotated[str | None, typer.Option(help=f"Memory that each replica may hold at most, {_SIZE}.")] = None,
    url: _Url = _HERE,
    as_json: _Json = False,
) -> None:
    """Change what each replica of a model is guaranteed and may hold at most, without a restart."""
    wanted = {key: value for key, value in (("guarantee", guarantee), ("ceiling", ceiling)) if value is not None}
    if not wanted:
        _fail("nothing to change: give --guarantee or --ceiling")
    client = ModelsClient(url)
    try:
        client.limit(name, wanted)
        _show([client.story(name)], as_json)
    except (NoAnswer, RefusedError) as error:
        _fail(str(error))


def _show(models: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(models, indent=2))
        return
    from cluster.status import render_models

    Console().print(render_models(models))


def _tree(model: str | None, config: Path | None, name: str | None) -> dict[str, Any]:
    """The model's section before the other options. Raises ConfigError."""
    if (model is None) == (config is None):
        raise ConfigError("say what to add: either MODEL, a folder or a hub id, or --config with a YAML file")
    if model is not None:
        folder = Path(model).expanduser()
        return {"source": str(folder.resolve()) if folder.is_dir() else model, "name": name}
    assert config is not None
    sections = load_config(config).models
    if len(sections) == 1:
        return sections[0].model_dump() | ({"name": name} if name else {})
    for section in sections:
        if section.name == name:
            return section.model_dump()
    names = ", ".join(section.name for section in sections)
    raise ConfigError(f"{config} has several models; say which one with --name: {names}")


def _follow(client: ModelsClient, name: str) -> dict[str, Any]:
    """Print what is done for the model until it serves; returns how it is then. Raises UnknownError when it is gone,
    RefusedError where its addition failed."""
    seen = 0
    while True:
        story = client.story(name)
        for stage, elapsed_s, line in story["lines"][seen:]:
            typer.echo(f"  {stage:<9}{elapsed_s:6.1f} s  {line}", err=True)
        seen = len(story["lines"])
        if story["error"] is not None and story["phase"] == "failed":
            raise RefusedError(story["error"])
        if story["phase"] == "serving":
            return story
        time.sleep(_POLL_S)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
