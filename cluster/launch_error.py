"""A start that failed: which stage, why, and where the logs are."""

import re
import shutil
from pathlib import Path

from cluster.default_model import cache_dir


class LaunchError(Exception):
    """A stage of the start failed, and what had been started has been stopped. Says the stage, the root cause and where
    the logs are, if there are any."""

    def __init__(self, stage: str, cause: str, logs: Path | None = None) -> None:
        super().__init__(f"{stage}: {cause}" + (f"\nlogs: {logs}" if logs else ""))
        self.stage, self.cause, self.logs = stage, cause, logs


def root_cause(text: str) -> str:
    """The last exception line of nested tracebacks: what went wrong first, without the layers that passed it on."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in text.splitlines()]
    errors = [line.strip() for line in lines if re.match(r"\s*(\w+\.)*\w*(Error|Exception|Exit|Interrupt)\b.*:", line)]
    return errors[-1] if errors else next((line for line in reversed(lines) if line.strip()), "no reason was given")


def keep_logs(ray_folder: Path) -> Path | None:
    """Copy Ray's logs, which the stop removes, to the cache, in place of those of the last failure."""
    logs = next(ray_folder.glob("session_2*/logs"), None)
    if logs is None:
        return None
    kept = cache_dir() / "logs" / "last-failure"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(logs, kept, ignore_dangling_symlinks=True)
    return kept
