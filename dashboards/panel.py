"""One panel of a dashboard, as data: what it asks of Prometheus, and how that is drawn."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.models import common

DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="$datasource")
HEIGHT = 8


class Draw(StrEnum):
    """How a panel is drawn."""

    LINES = "lines"
    STACKED = "stacked"
    NUMBER = "number"


@dataclass(frozen=True)
class Query:
    """PromQL, with Grafana's variables in it, and the legend of its series."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """
    Attributes:
        unit: Grafana's name: bytes, s, percentunit, reqps, short, ...
        width: of 24.
        help: what it shows, for whoever does not know.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    help: str
    draw: Draw = Draw.LINES
    width: int = 12

    def builder(self) -> Any:
        """Of the SDK."""
        panel: Any = stat.Panel() if self.draw is Draw.NUMBER else timeseries.Panel()
        panel.title(self.title).description(self.help).unit(self.unit).datasource(DATASOURCE)
        panel.span(self.width).height(HEIGHT)
        for number, query in enumerate(self.queries):
            target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + number))
            panel.with_target(target.datasource(DATASOURCE).range())
        if self.draw is Draw.NUMBER:
            return panel
        panel.legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        panel.tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        panel.min(0).line_width(1)
        if self.draw is Draw.STACKED:
            panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL)).fill_opacity(40)
        return panel
