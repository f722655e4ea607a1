"""docs/cli.md, against the commands themselves."""

import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from cluster.cli import app
from cluster.cli_page import cli_page
from tests.unit.cluster.test_json_options import commands

PAGE = Path(__file__).parents[3] / "docs" / "cli.md"


def test_the_page_is_current() -> None:
    """docs/cli.md is what the commands say."""
    assert PAGE.read_text(encoding="utf-8") == cli_page(), "python -m cluster.cli_page > docs/cli.md"


def test_every_option_is_on_the_page() -> None:
    """Under its command, by each of its names, as typer itself has them."""
    sections = {part.partition("\n")[0]: part for part in cli_page().replace("\\", "").split("\n## ")[1:]}
    found: dict[str, Any] = {f"ellm {name}": one for name, one in commands(get_command(app))}
    assert sorted(sections) == sorted(found)
    for name, command in found.items():
        assert " ".join(command.help.split()) in sections[name]
        for parameter in command.params:
            flags = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
            row = next(row for row in sections[name].split("\n") if " ".join((parameter.help or "").split()) in row)
            assert set(flags) <= set(re.split("[,`/ ]+", row))
