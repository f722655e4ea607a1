"""Outputs of one request that wait together become one, as vLLM makes them itself where a step has several tokens."""

from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any

from vllm.v1.engine import EngineCoreOutput

_PLAIN = ("request_id", "new_token_ids", "finish_reason", "stop_reason")
_OF_THE_REQUEST = ("events", "prefill_stats", "trace_headers")
"""What an output says of its request, not of its tokens: more tokens change nothing of it."""


def _lacks(names: list[str]) -> Callable[[EngineCoreOutput], bool]:
    """Tells whether an output has none of ``names``. By identity: some are arrays, which compare element by element."""
    read: Callable[[EngineCoreOutput], tuple[Any, ...]] = attrgetter(*names)
    nothing = read(EngineCoreOutput("", []))
    return lambda output: all(map(is_, read(output), nothing))


# By exclusion, so that what another release of vLLM adds is kept apart until somebody has looked at it.
_is_plain = _lacks([name for name in EngineCoreOutput.__struct_fields__ if name not in _PLAIN])
_takes_tokens = _lacks([name for name in EngineCoreOutput.__struct_fields__ if name not in _PLAIN + _OF_THE_REQUEST])


def coalesce(waiting: list[EngineCoreOutput], output: EngineCoreOutput) -> None:
    """Put ``output`` behind the outputs of the same request that wait: into the last one where that loses nothing.

    An output that carries more than tokens and an end, such as log probabilities, is taken into none. The list owns
    what is put there: neither ``output`` nor its tokens may be used afterwards.
    """
    last = waiting[-1] if waiting else None
    if last is None or last.finish_reason is not None or not _is_plain(output) or not _takes_tokens(last):
        waiting.append(output)
        return
    last.new_token_ids.extend(output.new_token_ids)
    last.finish_reason, last.stop_reason = output.finish_reason, output.stop_reason
