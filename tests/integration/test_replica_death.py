"""A replica that is killed while it streams: its clients see nothing of it, and nothing of it stays."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration import watching
from tests.integration.replica_processes import replica_processes

TOKENS = 60
DEADLINE_S = 150.0

pytestmark = pytest.mark.slow


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    """Files in shared memory that the processes have mapped or open, but for the lease board, which all engines use."""
    found: set[Path] = set()
    for process in processes:
        folder = Path(f"/proc/{process.pid}")
        mapped = [line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines()]
        found |= {Path(name) for name in mapped if name.startswith("/dev/shm/")}
        found |= {file for fd in (folder / "fd").iterdir() if (file := fd.readlink()).is_relative_to("/dev/shm")}
    return {file for file in found if file.suffix != ".board"}


def stream(url: str, model: str) -> tuple[int, bool]:
    """Tokens of one streamed completion, and whether it ended with an error."""
    body = {"model": model, "prompt": "Hello", "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
    tokens, failed = 0, False
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=90, trust_env=False) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                failed = failed or "error" in event
                tokens += "choices" in event
    return tokens, failed


def until(reached: Callable[[], bool], what: str) -> None:
    watching.until(reached, what, DEADLINE_S)


def test_killed_replica(cluster: str, model: str) -> None:
    """SIGKILL of a replica ends no stream: its own go on at the other one, with every token that was asked for. Those
    that come meanwhile are answered, its engine's processes end with it, and another replica takes its place."""

    metric = partial(watching.metric, cluster)

    def reported() -> list[int]:
        """Requests of each replica, as the router reads them: for a moment after they have ended, too."""
        (node,) = httpx.get(f"{cluster}/ellm/status", trust_env=False).json()["nodes"]
        return [replica["running"] + replica["waiting"] for replica in node["devices"][0]["replicas"]]

    until(lambda: metric("ellm_replicas_reachable") == 2, "both replicas answer")
    until(lambda: reported() == [0, 0], "the router knows that both are idle")
    victim = replica_processes()[0]
    engine = victim.children(recursive=True)
    assert len(engine) >= 2, "an engine core and a worker"
    files = shared_memory_of(engine)
    with ThreadPoolExecutor(8) as pool:
        before = [pool.submit(stream, cluster, model) for _ in range(4)]
        until(lambda: metric("vllm:num_requests_running") == 4, "four streams run")
        victim.kill()
        during = [pool.submit(stream, cluster, model) for _ in range(4)]
        ends = [future.result() for future in before]
        assert [future.result() for future in during] == [(TOKENS, False)] * 4
    assert ends == [(TOKENS, False)] * 4
    assert metric("ellm_requests_continued_total") >= 1
    assert not psutil.wait_procs(engine, timeout=20)[1], "processes of the killed replica's engine"
    until(lambda: not any(file.exists() for file in files), "shared memory holds nothing of the killed engine")
    until(lambda: metric("ellm_replicas_reachable") == 2, "another replica has taken its place")
    assert httpx.get(f"{cluster}/health", trust_env=False).status_code == 200
