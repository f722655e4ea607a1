"""What is measured: anything that answers a request with a stream of tokens, an HTTP server or an engine in this
process."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from cluster.bench.workload import Request


@dataclass(frozen=True)
class Chunk:
    """Output tokens that arrived together. ``tokens``: how many; None where the target cannot tell."""

    tokens: int | None = None


@dataclass(frozen=True)
class Usage:
    """The target's own count of the request's tokens. It replaces what was asked for and what the chunks add up to."""

    input_tokens: int
    output_tokens: int


class Target(Protocol):
    """An engine or a server under load."""

    def stream(self, request: Request) -> AsyncIterator[Chunk | Usage]:
        """Start answering ``request`` when the iterator is first asked for an item, which is when its clock starts.

        Called a little before the request is due: encode it here, not in the iterator. An iterator may be dropped
        without having been used. It raises RequestFailed where the answer is not complete; any other exception ends
        the whole run.
        """
        ...
