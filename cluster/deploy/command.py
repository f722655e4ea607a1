"""The command ``ellm deploy``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.config_file import load_config
from memory_agent.errors import SettingsError

deploy_app = typer.Typer(help="Install a cluster on Kubernetes with KubeRay.", no_args_is_help=True)


@deploy_app.callback()
def _deploy() -> None:
    """Install a cluster on Kubernetes with KubeRay."""


@deploy_app.command("render")
def render_command(
    config: Annotated[Path, typer.Argument(help="The cluster.yaml that `ellm serve --config` takes.")],
    name: Annotated[str, typer.Option(help="Name of the RayService.")] = "ellm",
    values: Annotated[Path | None, typer.Option(help="Values as of the Helm chart: image, worker, storage.")] = None,
    dashboards: Annotated[
        Path | None, typer.Option(help="Folder of dashboards (*.json) and Prometheus rules (*.yml) to install too.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write a file for each object into.")] = None,
) -> None:
    """Print the Kubernetes objects of a cluster: a RayService and what belongs to it."""
    from cluster.deploy.manifests import notes, render
    from cluster.deploy.ray_service import to_yaml
    from cluster.deploy.settings import load_settings, with_exported

    try:
        settings, cluster = load_settings(values), load_config(config)
        if dashboards is not None:
            settings = with_exported(settings, dashboards)
        manifests = render(name, cluster, settings)
        if out is None:
            sys.stdout.write(to_yaml(*manifests))
        else:
            out.mkdir(parents=True, exist_ok=True)
            for one in manifests:
                path = out / f"{one['kind'].lower()}-{one['metadata']['name']}.yaml"
                path.write_text(to_yaml(one), encoding="utf-8")
                typer.echo(path)
    except (SettingsError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for line in notes(cluster, settings):
        typer.echo(f"note: {line}", err=True)
