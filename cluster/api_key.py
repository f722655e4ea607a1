"""API keys: what one may do, how it is made, and how a request's is recognised.

    ellm_3f2a9c1b04d7_Qm9b...       the key, known to its holder alone
         |            `- secret: 32 random bytes
         `- id: finds the record, and may be shown and logged

Only the SHA-256 of a key is kept. A slow hash would protect secrets that people choose; a key of 256 random bits cannot
be guessed from its digest at any speed, and this is computed for every request.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

_PREFIX = "ellm"
_ID_BYTES, _SECRET_BYTES = 6, 32
_NOBODY = "0" * 64

Name = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]


class Scope(StrEnum):
    """What a key is for."""

    INFERENCE = "inference"
    """Ask models, list them, tokenise."""
    METRICS = "metrics"
    """Read /metrics and /load."""
    ADMIN = "admin"
    """Everything under /ellm: status, decisions, models; and what ``metrics`` may."""


class ApiKey(BaseModel):
    """A key's record, as the keys file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-z]{4,32}$")]
    """Its public part."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole key, in hex."""
    tenant: Name
    """Whose it is. Tenants of a class take turns, and share no prefix cache; several keys can have one tenant."""
    scopes: tuple[Scope, ...] = Field(default=(Scope.INFERENCE,), min_length=1)
    """What it may do."""
    slo_class: Name | None = None
    """Class of requests that name none. Left out: the first of slo_classes, or of the configuration."""
    slo_classes: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Classes that requests may name in x-slo-class. Left out: all."""
    requests_per_min: Annotated[int, Field(ge=1)] | None = None
    """Requests that it may begin in a minute."""
    tokens_per_min: Annotated[int, Field(ge=1)] | None = None
    """Tokens, of prompts and answers, that its requests may take in a minute."""
    created: AwareDatetime | None = None
    """When it was made."""
    expires: AwareDatetime | None = None
    """From then on it is refused."""

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        if self.slo_class and self.slo_classes and self.slo_class not in self.slo_classes:
            raise ValueError(
                f"slo_class {self.slo_class!r} should be one of slo_classes: {', '.join(self.slo_classes)}"
            )
        return self

    @property
    def default_class(self) -> str | None:
        """Class of requests that name none; None for the configuration's first."""
        return self.slo_class or (self.slo_classes[0] if self.slo_classes else None)

    def allows_class(self, name: str) -> bool:
        return self.slo_classes is None or name in self.slo_classes

    def may(self, scopes: Iterable[Scope]) -> bool:
        """Whether it has one of these."""
        return not set(scopes).isdisjoint(self.scopes)


def new_key(**fields: object) -> tuple[str, ApiKey]:
    """A fresh key and its record. ``fields``: of the record, but for those that are made here. Raises pydantic's
    ValidationError."""
    name = secrets.token_hex(_ID_BYTES)
    text = f"{_PREFIX}_{name}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    made = {"id": name, "sha256": digest(text.encode()), "created": datetime.now(UTC).replace(microsecond=0)}
    return text, ApiKey.model_validate(made | fields)


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def find_key(records: "dict[str, ApiKey]", presented: bytes, now: datetime) -> ApiKey | None:
    """The record of a key that a request has shown; None where there is none, or not any more. ``records``: by id.

    Takes as long for a wrong secret as for the right one, and for an id that nobody has.
    """
    parts = presented.split(b"_", 2)
    record = records.get(parts[1].decode("latin-1")) if len(parts) == 3 else None
    right = hmac.compare_digest(digest(presented), record.sha256 if record is not None else _NOBODY)
    if record is None or not right or (record.expires is not None and record.expires <= now):
        return None
    return record
