"""The Dockerfile: clean by its linter, and of one mind with the packages, the pods and the commands."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluster.deploy.ray_service import HOME, MODELS, USER_ID
from cluster.deploy.settings import DeploySettings

ROOT = Path(__file__).parents[3]
FILE = ROOT / "deploy/docker/Dockerfile"


def test_lint() -> None:
    """Every rule of hadolint."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here: `make setup` installs it")
    done = subprocess.run([hadolint, str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_package_is_in_the_image() -> None:
    """Copied, and let through to the build."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    lines, ignore = FILE.read_text().splitlines(), (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    for package in packages["packages"]:
        assert f"COPY {package} {package}" in lines
        assert f"!{package}" in ignore


def test_the_pods_find_what_they_expect() -> None:
    """The user, its home, the folder of checkpoints, and the tag of the chart's defaults."""
    text = FILE.read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"USER {USER_ID}:{USER_ID}" in text and f"--uid {USER_ID}" in text
    assert f"WORKDIR {HOME}" in text and f"HF_HOME={MODELS}" in text
    assert DeploySettings().image.tag == f"{version}-gpu" and f"ellm-cluster:{version}-gpu" in text
