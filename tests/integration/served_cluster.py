"""Programs that a test starts and ends: `ellm serve`, a Prometheus, an Alertmanager."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.integration.watching import free_port, until

START_S = 400.0
END_S = 120.0


@contextmanager
def program(command: list[str], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """It runs, and is ready. At the end it is terminated, and nothing of it may be left: no process, and no file in
    shared memory."""
    with log.open("wb") as out:
        started = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)

        def is_ready() -> bool:
            assert started.poll() is None, f"{command[0]} has ended:\n{log.read_text(errors='replace')[-3000:]}"
            return ready()

        try:
            until(is_ready, f"{command[:5]} is ready, see {log}", START_S)
            yield
        finally:
            if started.poll() is None:
                below = [started, *started.children(recursive=True)]
                files = _shared_memory_of(below)
                started.terminate()
                _, left = psutil.wait_procs(below, timeout=END_S)
                for one in left:
                    one.kill()
                assert not left, f"processes of {command[:5]} that did not end: {left}"
                assert not (kept := [file for file in files if file.exists()]), f"{command[:5]} leaves {kept}"


@contextmanager
def served(config: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """A cluster by `ellm serve` that serves, with its output in ``folder``: its URL."""
    port, file, log = free_port(), folder / "cluster.yaml", folder / "serve.log"
    file.write_text(yaml.safe_dump({**config, "http": {**config.get("http", {}), "port": port}}), encoding="utf-8")
    command = [sys.executable, "-m", "cluster.cli", "serve", "--config", str(file)]
    with program(command, log, lambda: "Ctrl-C stops everything" in log.read_text(errors="replace")):
        yield f"http://127.0.0.1:{port}"


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    found: set[Path] = set()
    for process in processes:
        try:
            mapped = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        found |= {Path(line.split(maxsplit=5)[-1]) for line in mapped if " /dev/shm/" in line}
    return found
