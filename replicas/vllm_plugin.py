"""Ends an engine's processes with their owner. vLLM loads this in each of them as the general plugin ``ellm``.

A replica that is killed cannot end its children, and vLLM's engine core does not notice that its client is gone: it
would keep its memory for ever. So each engine process waits, in a thread that does nothing else, for its owner's
exit.
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
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        _end()
    threading.Thread(target=_end_with, args=(descriptor,), name="ellm-owner-watch", daemon=True).start()


def _end_with(owner_descriptor: int) -> None:
    select.select([owner_descriptor], [], [])  # a pidfd is readable once its process has exited
    _end()


def _end() -> None:
    # Not an orderly exit: there is nobody left to wait for one, and device memory is free only when the process is
    # gone.
    os.kill(os.getpid(), signal.SIGKILL)
