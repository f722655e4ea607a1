"""Where Debian's prometheus and prometheus-alertmanager are: on the path, or in the folder ELLM_PROMETHEUS_BIN."""

import os
import shutil

import pytest

FOLDER_VARIABLE = "ELLM_PROMETHEUS_BIN"


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
    return found
