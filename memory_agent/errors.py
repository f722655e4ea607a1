"""Errors of the memory layer.

MemoryError_
+-- SettingsError      the configuration cannot work; carries what would
+-- PoolExhausted      not now: the pool is at its limit; try again after a release
+-- OutOfDeviceMemory  the operating system or driver refused; try again after a release
+-- BoardError         the lease board is missing, foreign or of another version
"""


class MemoryError_(Exception):
    """Base of everything this package raises on purpose."""


class SettingsError(MemoryError_):
    """The settings cannot work. The message names the cause and a value that would have worked."""


class PoolExhausted(MemoryError_):
    """The chunk pool is at its limit. Recoverable: retry when chunks have been given back or the limit was raised."""

    def __init__(self, wanted_chunks: int, available_chunks: int) -> None:
        super().__init__(f"{wanted_chunks} chunks wanted, {available_chunks} available under the limit")
        self.wanted_chunks = wanted_chunks
        self.available_chunks = available_chunks

    def __reduce__(self) -> tuple[type["PoolExhausted"], tuple[int, int]]:
        return type(self), (self.wanted_chunks, self.available_chunks)


class OutOfDeviceMemory(MemoryError_):
    """The operating system or the driver had no memory to commit. Recoverable: nothing was changed."""


class BoardError(MemoryError_):
    """The lease board cannot be used: missing, of another version, or the row is not ours."""
