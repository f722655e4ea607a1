"""Where Debian's prometheus and prometheus-alertmanager are: on the path, or in the folder ELLM_PROMETHEUS_BIN."""

import os
import shutil
from pathlib import Path

import pytest

FOLDER_VARIABLE = "ELLM_PROMETHEUS_BIN"
TEMPLATES = Path("/usr/share/prometheus/alertmanager")
"""Where Debian's Alertmanager reads its templates, wherever it is itself."""


def binary(name: str) -> str:
    """The path of prometheus, promtool or prometheus-alertmanager. Skips the test where it is not there."""
    folder = os.environ.get(FOLDER_VARIABLE)
    found = shutil.which(name, path=folder) if folder else shutil.which(name)
    if found is None:
        package = "prometheus-alertmanager" if name == "prometheus-alertmanager" else "prometheus"
        pytest.skip(
            f"{name} is not there: apt-get install {package}, or unpack its package with `dpkg -x` and set "
            f"{FOLDER_VARIABLE} to its usr/bin"
        )
    if name == "prometheus-alertmanager" and not TEMPLATES.exists():
        pytest.skip(f"Debian's Alertmanager needs {TEMPLATES}, which its package has: link it there")
    return found
