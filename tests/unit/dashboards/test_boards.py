"""The dashboards as code: sound JSON, that asks for what is exported, the same each time."""

import copy
import json
import re
from typing import Any

import pytest

from dashboards.board import Board, lost_keys
from dashboards.boards import BOARDS
from dashboards.catalogue import SERIES
from dashboards.panel import Panel
from tests.unit.dashboards.promql_names import grouping_in, matchers_in, metrics_in

PROMETHEUS_OWN = {"scrape_duration_seconds"}
PANELS = [pytest.param(board, panel, id=f"{board.uid}-{panel.title}") for board in BOARDS for panel in board.panels]
VARIABLES = re.compile(r"\$(\w+)")


def expressions(board: Board) -> list[str]:
    asked = [query.expr for panel in board.panels for query in panel.queries]
    return [*asked, *(annotation.expr for annotation in board.annotations)]


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_a_panel_asks_for_what_is_exported(board: Board, panel: Panel) -> None:
    """Every metric of a query is in the catalogue, is selected by labels that it has, and grouped by such. Every
    variable is one of the dashboard's, or Grafana's own."""
    own = {variable.name for variable in board.variables}
    for query in panel.queries:
        names = metrics_in(query.expr)
        assert names or any(name in query.expr for name in PROMETHEUS_OWN)
        assert names <= SERIES.keys()
        for metric, labels in matchers_in(query.expr):
            assert labels <= set(SERIES[metric])
        labels = {label for name in names for label in SERIES[name]} | {"le"}
        assert grouping_in(query.expr) <= labels
        assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= labels
        assert set(VARIABLES.findall(query.expr)) <= own | {"__rate_interval", "__range"}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_variables_and_annotations_ask_for_what_is_exported(board: Board) -> None:
    """A variable's metric has the variable's label; no query looks alive by a number of its own."""
    for variable in board.variables:
        assert variable.label in SERIES[variable.metric]
    for expr in expressions(board):
        assert metrics_in(expr) <= SERIES.keys()
        assert "vector(" not in expr and "absent" not in expr


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_no_key_is_misspelt(board: Board) -> None:
    """What Grafana's schema makes of the JSON is the JSON again; two runs make the same."""
    made = board.to_json()
    assert lost_keys(made) == []
    assert json.dumps(made) == json.dumps(board.to_json())


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("panels", 4), "titel"),
        (("panels", 4, "targets", 0), "legend_format"),
        (("panels", 4, "fieldConfig"), "units"),
        (("panels", 4, "fieldConfig", "defaults", "custom"), "line_width"),
        (("panels", 4, "options"), "legende"),
    ],
)
def test_a_misspelt_key_is_found(path: tuple[Any, ...], key: str) -> None:
    """The check above would see one, wherever it is."""
    made = copy.deepcopy(BOARDS[0].to_json())
    at: Any = made
    for step in path:
        at = at[step]
    at[key] = "x"
    assert [lost.rpartition(".")[2] for lost in lost_keys(made)] == [key]


def test_dashboards_and_panels_have_names_of_their_own() -> None:
    """No uid twice, and in a dashboard no title; panels lie beside and below each other."""
    assert len({board.uid for board in BOARDS}) == len(BOARDS)
    for board in BOARDS:
        assert len({panel.title for panel in board.panels}) == len(board.panels)
        cells = set()
        for panel in board.to_json()["panels"]:
            at = panel["gridPos"]
            assert at["x"] + at["w"] <= 24
            mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert cells.isdisjoint(mine)
            cells |= mine
