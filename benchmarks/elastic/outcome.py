"""What a scenario hands back, and where it goes: results/elastic.json, a picture, the last line of the run."""

import importlib.util
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record import FOLDER

MISSING_PLOTS = "no picture: matplotlib is not installed; `.venv/bin/uv pip install --group bench` installs it"


@dataclass(frozen=True)
class Panel:
    """One chart: a line or, without ``x``, a bar for each name. The bound of a name is drawn as a mark on its bar."""

    title: str
    unit: str
    series: Mapping[str, Sequence[float]]
    x: Mapping[str, Sequence[float]] = field(default_factory=dict)
    x_label: str = ""
    bounds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A scenario's figures.

    Attributes:
        headline: ratios under the names that the last line uses.
        bounds: of the ratios that have one, under the same names.
        details: JSON-ready; whatever explains the figures.
    """

    headline: Mapping[str, float]
    bounds: Mapping[str, float]
    details: Mapping[str, Any]
    panels: Sequence[Panel] = ()

    @property
    def reached(self) -> dict[str, float]:
        """Figure over bound, of those that have both."""
        return {name: self.headline[name] / bound for name, bound in self.bounds.items() if name in self.headline}


def save(outcomes: Mapping[str, Outcome], folder: Path = FOLDER) -> Path:
    """Write ``elastic.json``: each scenario's last run, so one that did not run now keeps what it had."""
    path = folder / "elastic.json"
    folder.mkdir(exist_ok=True)
    scenarios = json.loads(path.read_text())["scenarios"] if path.exists() else {}
    for name, outcome in outcomes.items():
        scenarios[name] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "headline": _rounded(outcome.headline),
            "bounds": _rounded(outcome.bounds),
            "reached": _rounded(outcome.reached),
            "details": outcome.details,
        }
    machine = {"cores": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()}
    record = {"benchmark": "elastic", "machine": machine, "scenarios": scenarios}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def headline_line(outcomes: Mapping[str, Outcome]) -> str:
    """The headline of the scenarios that ran, as one line of JSON."""
    return json.dumps({name: value for one in outcomes.values() for name, value in _rounded(one.headline).items()})


def draw(outcomes: Mapping[str, Outcome], folder: Path = FOLDER) -> str:
    """Draw a PNG for each scenario that has something to show; one line to print: where they are, or why there are
    none."""
    if importlib.util.find_spec("matplotlib") is None:
        return MISSING_PLOTS
    drawn = [_draw(name, one.panels, folder) for name, one in outcomes.items() if one.panels]
    return f"pictures in {', '.join(str(path) for path in drawn)}"


def _draw(name: str, panels: Sequence[Panel], folder: Path) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(panel.title)
        axes.set_ylabel(panel.unit)
        if panel.x:
            for label, values in panel.series.items():
                axes.plot(panel.x[label], values, marker="o", label=label)
            axes.set_xlabel(panel.x_label)
            axes.legend()
        else:
            names = list(panel.series)
            axes.bar(names, [panel.series[label][0] for label in names])
            marked = [label for label in names if label in panel.bounds]
            if marked:
                axes.plot(marked, [panel.bounds[label] for label in marked], "k_", markersize=30, label="bound")
                axes.legend()
    path = folder / f"elastic_{name.replace('-', '_')}.png"
    figure.savefig(path, dpi=120)
    return path


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
