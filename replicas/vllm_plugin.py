"""Ends an engine's processes with their owner and with their parent. vLLM loads this in each of them as the general
plugin ``ellm``.

    replica (owner) ---> EngineCore ---> workers

A replica that is killed cannot end its children, and vLLM's engine core does not notice that its client is gone: it
would keep its memory for ever. A worker does notice that its engine core is gone, but may hold its memory for seconds,
until its step has ended. So each engine process waits, in a thread that does nothing else, for the exit of either.
"""

import os
import select
import signal
import threading

OWNER_VARIABLE = "ELLM_ENGINE_OWNER_PID"


def own_engine_processes() -> None:
    """Called before an engine is started: the engine's processes inherit this process as their owner."""
    os.environ[OWNER_VARIABLE] = str(os.getpid())


def register() -> None:
    """vLLM's plugin entry. Changes nothing in the owner itself, or where there is none."""
    owner = int(os.environ.get(OWNER_VARIABLE, "0"))
    if owner in (0, os.getpid()):
        return
    try:
        descriptors = [os.pidfd_open(process) for process in {owner, os.getppid()}]
    except ProcessLookupError:
        _end()
    threading.Thread(target=_end_with, args=(descriptors,), name="ellm-owner-watch", daemon=True).start()


def _end_with(descriptors: list[int]) -> None:
    select.select(descriptors, [], [])  # a pidfd is readable once its process has exited
    _end()


def _end() -> None:
    # Not an orderly exit: there is nobody left to wait for one, and device memory is free only when the process is
    # gone.
    os.kill(os.getpid(), signal.SIGKILL)
