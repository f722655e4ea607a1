"""A dashboard as data, and its JSON as Grafana imports it."""

import json
from dataclasses import dataclass
from typing import Any

# The SDK would rather have the newer schema, which older releases of Grafana do not read.
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panel import DATASOURCE, Panel

TAG = "ellm"


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of ``label`` that ``metric`` has, several or all of them."""

    name: str
    metric: str
    label: str


@dataclass(frozen=True)
class Annotation:
    """Marks in time, where ``expr`` is there and not 0."""

    name: str
    expr: str
    title: str
    color: str


@dataclass(frozen=True)
class Board:
    """uid: in Grafana, and the name of its file."""

    uid: str
    title: str
    help: str
    panels: tuple[Panel, ...]
    variables: tuple[Variable, ...] = ()
    annotations: tuple[Annotation, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As Grafana imports it. The same board is the same JSON."""
        made: dict[str, Any] = json.loads(JSONEncoder().encode(self._builder().build()))
        return made

    def _builder(self) -> Any:
        board: Any = builders.Dashboard(self.title)
        board.uid(self.uid).description(self.help).tags([TAG]).timezone("browser").editable().refresh("10s")
        board.time("now-30m", "now").tooltip(models.DashboardCursorSync.CROSSHAIR)
        board.with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        for variable in self.variables:
            board.with_variable(
                builders.QueryVariable(variable.name)
                .label(variable.name)
                .datasource(DATASOURCE)
                .query(f"label_values({variable.metric}, {variable.label})")
                .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
                .sort(models.VariableSort.ALPHABETICAL_ASC)
                .multi(True)
                .include_all(True)
                .all_value(".*")
            )
        for annotation in self.annotations:
            board.annotation(
                builders.AnnotationQuery()
                .name(annotation.name)
                .datasource(DATASOURCE)
                .enable(True)
                .icon_color(annotation.color)
                .expr(annotation.expr)
                .title_format(annotation.title)
            )
        links = builders.DashboardLink("Dashboards").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
        board.link(links.as_dropdown(True).include_vars(True).keep_time(True))
        for panel in self.panels:
            board.with_panel(panel.builder())
        return board


def lost_keys(board: dict[str, Any]) -> list[str]:
    """Paths in a dashboard's JSON that Grafana's schema does not have: misspelt keys, which Grafana would ignore."""
    register_default_plugins()  # without them the SDK takes any key of a query and of a panel's options
    back = json.loads(JSONEncoder().encode(models.Dashboard.from_json(json.loads(json.dumps(board)))))
    return list(_differences(board, back, ""))


def _differences(before: Any, after: Any, path: str) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            lost
            for key, value in before.items()
            for lost in (_differences(value, after[key], f"{path}.{key}") if key in after else [f"{path}.{key}"])
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [lost for at, (one, other) in pairs for lost in _differences(one, other, f"{path}[{at}]")]
    return [] if before == after else [path]
