"""What tests see of a cluster from outside, and how they wait for it."""

import socket
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

T = TypeVar("T")


def until(reached: Callable[[], T], what: str, within_s: float) -> T:
    """What ``reached`` has found, as soon as it is something."""
    deadline_s = time.monotonic() + within_s
    while not (found := reached()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.1)
    return found


def metric(url: str, name: str, *labels: str) -> float:
    """The sum of its series with these labels; -1 where there is none."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    found = [line for line in lines if line.startswith(name + "{") and all(label in line for label in labels)]
    return sum(float(line.rpartition(" ")[2]) for line in found) if found else -1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
