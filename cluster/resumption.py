"""Requests with an Idempotency-Key: what has been computed of an answer is given again, and not computed again.

    the key runs here, or at a replica, and its client is there   409, a moment later
    replicas know the key, for another request                    422
    one of them has the whole answer                              it is put out; no engine is asked
    one has a beginning                                           it is put out; the rest comes from where its KV is
    none has it                                                   as any other request

Replicas remember for some minutes what their engines have given (``replicas.answer_journal``), so whichever ingress the
client comes to, after its own has died or its connection broke, finds it. A request that cannot be continued
(``cluster.continuation``) gets a whole answer or a new one; so does one whose answer is more than tokens. Requests of a
key that wait at the doors of several ingresses, or come to them within a few milliseconds, do not know of each other.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import msgspec
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreRequest

from cluster.continuation import why_final
from cluster.door import Door
from cluster.relay import Relay
from cluster.request_slo import RequestSlo, Stop
from cluster.slo import Ending
from replicas.answer_journal import Found, Mark
from replicas.migration_words import without_words

GONE_S = 2.0
"""For those who had the key to be gone, once their client is."""
ASK_AGAIN_S = 0.1
ASK_TIMEOUT_S = 2.0
DIGEST_BYTES = 16
_SEVERAL = "a request with an Idempotency-Key has one prompt and one answer: send each with a key of its own, n = 1"
_NO_TOKENS = "a request with an Idempotency-Key has a prompt of text or tokens alone: send this one without a key"
_ANOTHER = (
    "this Idempotency-Key has come with another prompt or other parameters before: give each request a key of its own"
)
_RUNS = (
    "a request with this Idempotency-Key runs, and its client is connected: read the answer there, or close that "
    "connection and come again"
)


class Resumption:
    """Of one core. Belongs to its event loop.

    Attributes:
        requests: that got tokens of an earlier one; tokens: that were not computed again.
    """

    def __init__(self, model: str, handle: DeploymentHandle[Any], put_out: Callable[[EngineCoreOutput], None]) -> None:
        """put_out: hands an output to vLLM."""
        self.requests = self.tokens = 0
        self._model, self._handle, self._put_out = model, handle, put_out
        self._relays: dict[bytes, Relay] = {}
        """By key, those that have passed ``is_over`` or are in it."""

    def mark(self, owner: RequestSlo | None, request: EngineCoreRequest) -> Mark | None:
        """By which the answer to ``request``, a part of ``owner``, is found again; None where its client gave no key.
        A request that can have none is stopped."""
        if owner is None or not owner.idempotency_key:
            return None
        if owner.parts or request.prompt_token_ids is None or request.prompt_embeds is not None or request.mm_features:
            owner.stop(Stop(None, HTTPStatus.BAD_REQUEST, _SEVERAL if owner.parts else _NO_TOKENS))
            return None
        return Mark(_digest([self._model, owner.tenant, owner.idempotency_key]), _digest(_asked(request)))

    async def is_over(self, relay: Relay, door: Door) -> bool:
        """Whether nothing is left to do for ``relay``, which has a mark: its whole answer has been put out, or it was
        refused. Else it goes on after the tokens that were put out."""
        found = await self._look_up(relay)
        owner, part = relay.part.request, relay.part
        assert owner is not None  # who has no owner has no mark
        if isinstance(found, Stop):
            owner.stop(found)
            return True
        if found is None:
            return False
        relay.wanted, whole = found.replica, found.finish_reason is not None
        if _is_more_than_tokens(relay.request) or not (whole or why_final(relay.request) is None):
            return False
        self.requests += 1
        self.tokens += len(found.token_ids)
        relay.token_ids.extend(found.token_ids)
        part.tokens = part.resumed = len(found.token_ids)
        output = EngineCoreOutput(relay.request_id, found.token_ids)
        if whole:
            owner.admitted = relay.finished = True
            door.began(part, found.replica)
            output.finish_reason, output.stop_reason = found.finish_reason, found.stop_reason
            # vLLM takes the times of a request that has ended from these.
            output.events = [
                EngineCoreEvent.new_event(kind) for kind in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
            ]
        else:
            door.readmit(owner)
        self._put_out(output)
        return whole

    async def _look_up(self, relay: Relay) -> Found | Stop | None:
        """The most that there is of its answer, once it is nobody else's; or why it gets none."""
        mark, task, until_s = relay.mark, relay.task, time.monotonic() + GONE_S
        assert mark is not None and task is not None
        while (other := self._relays.get(mark.key)) is not None and other.task is not None and not other.task.done():
            if other.mark is not None and other.mark.request != mark.request:
                return Stop(None, HTTPStatus.UNPROCESSABLE_ENTITY, _ANOTHER)
            await asyncio.wait([other.task], timeout=max(0.0, until_s - time.monotonic()))
            if not other.task.done():
                return Stop(Ending.REJECTED, HTTPStatus.CONFLICT, _RUNS)
        self._relays[mark.key] = relay
        task.add_done_callback(partial(self._forget, mark.key, relay))
        while True:
            found = await self._ask(mark)
            if any(one.request != mark.request for one in found):
                return Stop(None, HTTPStatus.UNPROCESSABLE_ENTITY, _ANOTHER)
            if not any(one.live for one in found):
                break
            if time.monotonic() >= until_s:
                return Stop(Ending.REJECTED, HTTPStatus.CONFLICT, _RUNS)
            await asyncio.sleep(ASK_AGAIN_S)
        known = [one for one in found if one.token_ids]
        return max(known, key=lambda one: (one.finish_reason is not None, len(one.token_ids)), default=None)

    async def _ask(self, mark: Mark) -> list[Found]:
        """What each replica knows; of none where one of them is stuck."""
        try:
            answers = await self._handle.broadcast("find_answer", mark.key, mark.request).results_async(
                timeout_s=ASK_TIMEOUT_S, return_exceptions=True
            )
        except (RayServeException, TimeoutError):
            return []
        return [one for one in answers if isinstance(one, Found)]

    def _forget(self, key: bytes, relay: Relay, task: "asyncio.Task[None]") -> None:
        if self._relays.get(key) is relay:
            del self._relays[key]


def _is_more_than_tokens(request: EngineCoreRequest) -> bool:
    params = request.sampling_params
    return params is None or params.logprobs is not None or params.prompt_logprobs is not None


def _asked(request: EngineCoreRequest) -> list[Any]:
    """What the tokens of an answer depend on; not whether it is streamed, nor its targets."""
    params: dict[str, Any] = msgspec.to_builtins(request.sampling_params, enc_hook=repr, order="deterministic")
    params.pop("output_kind", None)
    params["extra_args"] = without_words(params.get("extra_args"))
    adapter = request.lora_request.lora_name if request.lora_request is not None else None
    return [adapter, request.prompt_token_ids, params]


def _digest(said: list[Any]) -> bytes:
    text = msgspec.json.encode(said, enc_hook=repr, order="deterministic")
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()
