"""Where benchmark figures go: a JSON file a benchmark, and its headline as the last line printed."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def known(name: str) -> dict[str, Any]:
    """Details of an earlier run; empty before the first."""
    path = FOLDER / f"{name}.json"
    return dict(json.loads(path.read_text())["details"]) if path.exists() else {}


def finish(name: str, headline: dict[str, float], details: dict[str, Any]) -> None:
    """Write ``results/<name>.json`` and print ``headline`` as one JSON line, the last one of the run."""
    record = {
        "benchmark": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()},
        "headline": headline,
        "details": details,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"results in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    print(json.dumps(headline))
