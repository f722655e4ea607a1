"""docs/troubleshooting.md quotes messages that the code has."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"


def quoted() -> list[str]:
    """What stands in backticks at the beginning of a table's row."""
    return re.findall(r"^\| `([^`]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@cache
def said() -> tuple[str, ...]:
    """Every text of the code, with a gap for what is put into it."""
    folders = ("cluster", "replicas", "memory_agent", "dashboards")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return tuple(text for file in files for text in texts(ast.parse(file.read_text(encoding="utf-8"))))


def texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_said(message: str, text: str) -> bool:
    """The pieces between the gaps of ``message`` stand in ``text``, one after the other."""
    position = 0
    for piece in message.split(GAP):
        position = text.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return True


@pytest.mark.parametrize("message", quoted())
def test_a_message_is_one_of_the_code(message: str) -> None:
    """Nothing on the page was thought up, or has changed since."""
    assert any(is_said(message, text) for text in said())


def test_what_nobody_says_is_found() -> None:
    """The check itself: a wrong word is noticed, and pieces in another order are."""
    assert len(quoted()) > 50
    assert not any(is_said("port … on … is taken by aliens", text) for text in said())
    assert is_said("a … c", "a b c") and not is_said("c … a", "a b c")
