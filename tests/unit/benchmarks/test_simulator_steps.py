"""The records of steps that the step time is fitted to."""

from pathlib import Path

from benchmarks.simulator.recorded_scheduler import _FORMAT, read_steps
from replicas.step_time import StepWork


def test_a_step_lasts_until_the_next_unless_the_engine_was_idle(tmp_path: Path) -> None:
    """What happens between two steps in a row belongs to the first; a pause belongs to none."""
    path = tmp_path / "steps"
    records = [(1.0, 1.2, 2, 10.0, 0, 0.0), (1.21, 1.3, 2, 12.0, 5, 7.5), (9.0, 9.1, 1, 4.0, 0, 0.0)]
    path.write_bytes(b"".join(_FORMAT.pack(*record) for record in records))
    steps = read_steps(path)
    assert [round(seconds, 6) for _, _, seconds in steps] == [0.21, 0.09, 0.1]
    assert steps[1][:2] == (1.21, StepWork(2, 12.0, 5, 7.5))


def test_no_steps_yet(tmp_path: Path) -> None:
    """An engine that has done nothing has an empty file."""
    path = tmp_path / "steps"
    path.touch()
    assert read_steps(path) == []
