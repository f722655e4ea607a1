"""A transport in this process's memory that fails on purpose."""

from collections.abc import Iterable, Mapping, Sequence

from memory_agent.host_segment import Part
from replicas.kv_transport import TransportError

Shared = dict[str, dict[int, tuple[bytes, list[bytes]]]]


class FakeTransport:
    """See ``Transport``.

    Args:
        name: its origin. shared: what lies at every origin.

    Attributes:
        plan: what fails next, as "send", "arrived" or "receive" and the number of the call from now on; empty: nothing.
    """

    def __init__(self, name: str, shared: Shared) -> None:
        self._name = name
        self._shared = shared
        self._shared[name] = {}
        self.plan: dict[str, int] = {}
        self.failed: list[str] = []

    @property
    def origin(self) -> str:
        return self._name

    def send(self, place: int, key: bytes, parts: Sequence[Part]) -> None:
        if self._fails("send"):
            raise TransportError("on purpose")
        self._shared[self._name][place] = key, [part.tobytes() for part in parts]

    def withdraw(self, places: Iterable[int]) -> None:
        for place in places:
            self._shared[self._name].pop(place, None)

    def arrived(self, origin: str) -> Mapping[bytes, int]:
        if self._fails("arrived"):
            return {}
        return {key: place for place, (key, _) in self._shared.get(origin, {}).items()}

    def receive(self, origin: str, place: int, key: bytes, parts: Sequence[Part]) -> bool:
        sent_key, sent = self._shared.get(origin, {}).get(place, (b"", []))
        if sent_key != key:
            return False
        fails = self._fails("receive")
        for part, data in zip(parts, sent, strict=True):
            part[...] = 255 if fails else memoryview(data).cast("B", part.shape)
        return not fails

    def close(self) -> None:
        self._shared.pop(self._name, None)

    def _fails(self, call: str) -> bool:
        left = self.plan.get(call)
        if left is None:
            return False
        self.plan[call] = left - 1
        if left == 0:
            self.failed.append(call)
        return left == 0
