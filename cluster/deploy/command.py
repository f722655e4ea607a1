"""The command ``ellm deploy``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.config_file import load_config
from memory_agent.errors import SettingsError

if TYPE_CHECKING:
    from cluster.deploy.ray_service import Manifest

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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print them as a Kubernetes List in JSON; with --out the files' paths.")
    ] = False,
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
        if out is not None:
            paths = _write(out, manifests)
            typer.echo(json.dumps(paths) if as_json else "\n".join(paths))
        elif as_json:
            typer.echo(json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}, indent=2))
        else:
            sys.stdout.write(to_yaml(*manifests))
    except (SettingsError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for line in notes(cluster, settings):
        typer.echo(f"note: {line}", err=True)


def _write(folder: Path, manifests: "Sequence[Manifest]") -> list[str]:
    """A file for each; their paths. Raises OSError."""
    from cluster.deploy.ray_service import to_yaml

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for one in manifests:
        path = folder / f"{one['kind'].lower()}-{one['metadata']['name']}.yaml"
        path.write_text(to_yaml(one), encoding="utf-8")
        paths.append(str(path))
    return paths
