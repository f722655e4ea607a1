"""Systems under test as processes of their own: each says when it serves, and ends when its input does."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

READY = "serving"
_START_TIMEOUT_S = 900.0
"""A machine that does other things too takes minutes."""
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class System:
    """What to start: ``python -m module PORT *arguments``."""

    name: str
    module: str
    model: str
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def running(system: System) -> Iterator[str]:
    """Start the system and yield its URL; ends it. Raises RuntimeError with its last words where it does not start."""
    port = _free_port()
    command = [sys.executable, "-m", f"benchmarks.serving_path.{system.module}", str(port), *system.arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **system.environment},
            start_new_session=True,
        )
        try:
            if not _wait_ready(process):
                log.seek(0)
                raise RuntimeError(f"{system.name} did not start:\n{log.read()[-3000:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def serve_until_told() -> None:
    """Called by a system that serves now: say so, and end this process by SIGINT when its input ends."""
    print(READY, flush=True)

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def _wait_ready(process: "subprocess.Popen[str]") -> bool:
    """False where the process ends, or takes too long."""
    timer = threading.Timer(_START_TIMEOUT_S, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == READY:
                threading.Thread(target=process.stdout.read, daemon=True).start()
                return True
        return False
    finally:
        timer.cancel()


def _stop(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
