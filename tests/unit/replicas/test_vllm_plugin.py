"""An engine's processes end with their owner, and with the process that started them."""

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

CHILD = """
import sys, time
from replicas.vllm_plugin import register
register()
print("registered", flush=True)
time.sleep(60)
"""
OWNER = f"""
import subprocess, sys, time
from replicas.vllm_plugin import own_engine_processes, register
own_engine_processes()
register()
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


CORE = f"""
import subprocess, sys, time
from replicas.vllm_plugin import register
register()
worker = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
worker.stdout.readline()
print(worker.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner() -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_child_ends_when_its_owner_is_killed(owner: "subprocess.Popen[str]") -> None:
    """SIGKILL of the owner, which runs no clean-up of it, ends the child within the deadline."""
    assert owner.stdout is not None
    child = psutil.Process(int(owner.stdout.readline()))
    assert child.status() != psutil.STATUS_ZOMBIE
    owner.kill()
    owner.wait()
    assert child in psutil.wait_procs([child], timeout=10)[0]


def test_worker_ends_when_its_engine_core_is_killed() -> None:
    """The owner lives on, but the process that started the worker is gone: the worker ends at once."""
    environment = os.environ | {"ELLM_ENGINE_OWNER_PID": str(os.getpid())}
    with subprocess.Popen([sys.executable, "-c", CORE], env=environment, stdout=subprocess.PIPE, text=True) as core:
        assert core.stdout is not None
        worker = psutil.Process(int(core.stdout.readline()))
        core.kill()
        assert worker in psutil.wait_procs([worker], timeout=10)[0]


def test_child_of_a_dead_owner_does_not_start() -> None:
    """A process whose owner is gone before it could watch it ends at once."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    environment = os.environ | {"ELLM_ENGINE_OWNER_PID": str(gone.pid)}
    result = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, timeout=30, check=False
    )
    assert result.returncode == -9
    assert result.stdout == b""


def test_without_an_owner_nothing_happens() -> None:
    """A vLLM that is no engine of ours is not touched."""
    code = CHILD.replace("time.sleep(60)", "")
    environment = {name: value for name, value in os.environ.items() if name != "ELLM_ENGINE_OWNER_PID"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=30, check=False)
    assert (result.returncode, result.stdout) == (0, b"registered\n")
