"""Where the figures of the elastic benchmark go."""

import json
from pathlib import Path

from benchmarks.elastic.outcome import Outcome, headline_line, save


def outcome(ratio: float) -> Outcome:
    return Outcome({"concurrency_ratio": ratio}, {"concurrency_ratio": 4.0}, {"seed": 1})


def test_a_scenario_keeps_its_figures_when_another_runs(tmp_path: Path) -> None:
    """The file has every scenario's last run."""
    save({"long": outcome(3.0), "idle": outcome(1.0)}, tmp_path)
    path = save({"long": outcome(2.0)}, tmp_path)
    scenarios = json.loads(path.read_text())["scenarios"]
    assert scenarios["long"]["headline"] == {"concurrency_ratio": 2.0}
    assert scenarios["long"]["reached"] == {"concurrency_ratio": 0.5}
    assert scenarios["idle"]["headline"] == {"concurrency_ratio": 1.0}


def test_the_last_line_has_what_ran() -> None:
    """Keys of the scenarios that ran, and no others."""
    assert json.loads(headline_line({"long": outcome(2.0)})) == {"concurrency_ratio": 2.0}
