"""docs/configuration.md, and what is asked of the models for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.config import ClusterConfig
from cluster.config_page import config_page

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def sections(one: BaseModel) -> Iterator[BaseModel]:
    """That section and all below, at their defaults."""
    yield one
    for value in dict(one).values():
        for below in value if isinstance(value, list) else [value]:
            if isinstance(below, BaseModel):
                yield from sections(below)


def test_the_page_is_current() -> None:
    """docs/configuration.md is what the models say."""
    assert PAGE.read_text(encoding="utf-8") == config_page(), "python -m cluster.config_page > docs/configuration.md"


def test_every_key_is_described() -> None:
    """A section, a key or a rule without a docstring would be an empty place on the page."""
    bare = []
    for one in sections(ClusterConfig()):
        kind = type(one)
        rules: dict[str, Any] = kind.__pydantic_decorators__.model_validators
        bare += [kind.__name__] if not kind.__doc__ else []
        bare += [f"{kind.__name__}.{name}" for name, field in kind.model_fields.items() if not field.description]
        bare += [name for name, rule in rules.items() if rule.info.mode == "after" and not rule.func.__doc__]
    assert bare == []


def test_every_key_is_on_the_page() -> None:
    """Once in its section, with its bounds and its default."""
    page = config_page()
    for one in sections(ClusterConfig()):
        for name in type(one).model_fields:
            assert f"| `{name}` | " in page
    assert "| `port` | whole number, at least 1, at most 65535 | `8000` |" in page
    assert "| `budget` | size, or auto | `auto` |" in page
    assert "| `header_timeout_s` | number (seconds), above 0 | `30.0` |" in page
    assert "| `async_scheduling` | true or false, or null | `null` |" in page
