"""What a failed start says."""

from pathlib import Path

import pytest

from cluster.launch_error import keep_logs, root_cause


def test_the_root_cause_is_the_last_error() -> None:
    """Of nested tracebacks the last exception line is shown, without colours and without the layers around it."""
    text = """The deployment failed to start 1 times in a row. Error:
\x1b[36mray::ServeReplica.initialize()\x1b[39m (pid=7)
Traceback (most recent call last):
  File "a.py", line 1, in __init__
ValueError: 3 apples do not fit: eat one

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in start
\x1b[31mvllm.exceptions.EngineStartError: the engine did not start\x1b[39m
"""
    assert root_cause(text) == "vllm.exceptions.EngineStartError: the engine did not start"
    assert root_cause("it is just gone\n\n") == "it is just gone"
    assert root_cause("") == "no reason was given"


def test_the_logs_of_the_last_failure_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Logs are copied to the cache in place of older ones; where Ray never started there are none."""
    monkeypatch.setenv("ELLM_CACHE", str(tmp_path / "cache"))
    assert keep_logs(tmp_path) is None
    for name in ("first", "second"):
        logs = tmp_path / name / "session_2026" / "logs" / "serve"
        logs.mkdir(parents=True)
        (logs / f"{name}.log").write_text(name)
        kept = keep_logs(tmp_path / name)
        assert kept is not None and kept.is_relative_to(tmp_path / "cache")
        assert [path.name for path in (kept / "serve").iterdir()] == [f"{name}.log"]
