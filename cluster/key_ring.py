"""The keys that one ingress process takes: those of the keys file as it is now, and each one's quota."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster.api_key import ApiKey, find_key
from cluster.key_file import KeyFileError, Stamp, read_keys, stamp
from cluster.quota import KeyQuota

logger = logging.getLogger("ray.serve")

FOLLOW_PERIOD_S = 1.0


@dataclass(frozen=True, eq=False)
class Caller:
    """Who has sent a request."""

    key: ApiKey
    quota: KeyQuota


class KeyRing:
    """Belongs to one event loop."""

    def __init__(self, path: Path, classes: Sequence[str], ingresses: int = 1, own: Sequence[ApiKey] = ()) -> None:
        """
        Args:
            path: of the keys file. classes: names of the SLO classes.
            ingresses: processes that share the requests: each has its equal part of every quota.
            own: keys beside the file's.

        Raises KeyFileError.
        """
        self._path, self._classes, self._ingresses, self._own = path, classes, ingresses, own
        self._stamp: Stamp | None = None
        self._wrong = ""
        """What was wrong with the file at the last look."""
        self._callers: dict[str, Caller] = {}
        self._keys: dict[str, ApiKey] = {}
        self._read()

    def find(self, presented: bytes) -> Caller | None:
        """Who holds this key; None for one that does not count."""
        key = find_key(self._keys, presented, datetime.now(UTC))
        return self._callers[key.id] if key is not None else None

    async def follow(self) -> None:
        """Read the file whenever it has changed, for ever."""
        while True:
            await asyncio.sleep(FOLLOW_PERIOD_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file if it has changed; what is wrong with it is logged, once, and changes nothing. It is looked at
        again until it is right: what was wrong can be its folder's mode."""
        if stamp(self._path) == self._stamp:
            return
        try:
            self._read()
            self._wrong = ""
            logger.info("%s has %d keys now", self._path, len(self._keys) - len(self._own))
        except KeyFileError as error:
            if str(error) != self._wrong:
                logger.error("the API keys stay as they were: %s", error)
            self._wrong = str(error)

    def _read(self) -> None:
        seen = stamp(self._path)
        keys = {key.id: key for key in (*read_keys(self._path, self._classes), *self._own)}
        # A key whose quotas are as they were goes on with what is left of them.
        known = self._callers
        self._callers = {name: self._caller(key, known.get(name)) for name, key in keys.items()}
        self._keys, self._stamp = keys, seen

    def _caller(self, key: ApiKey, before: Caller | None) -> Caller:
        same = before is not None and _quotas(before.key) == _quotas(key)
        return Caller(key, before.quota if before is not None and same else self._quota(key))

    def _quota(self, key: ApiKey) -> KeyQuota:
        shares = [None if one is None else one / self._ingresses for one in _quotas(key)]
        return KeyQuota(shares[0], shares[1], time.monotonic())


def _quotas(key: ApiKey) -> tuple[int | None, int | None]:
    return key.requests_per_min, key.tokens_per_min
