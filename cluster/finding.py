"""A finding of ``ellm doctor``."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """A cluster starts, but not as it should."""
    FAILED = "failed"
    """None does."""


@dataclass(frozen=True)
class Finding:
    """What a check found. remedy: what to do; empty where all is well."""

    name: str
    state: State
    found: str
    remedy: str = ""
