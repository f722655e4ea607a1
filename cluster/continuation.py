"""A request that has lost its replica, as the one that lets another go on: its answer so far becomes prompt.

    prompt | answer so far |  ->  prompt, of which the new replica computes what it has nowhere  ->  the next token

Pure. Greedy answers go on with the tokens that they would have had, in float32; sampled ones as likely as before. What
depends on more than the tokens is not carried over, and such a request cannot be continued.
"""

from collections.abc import Sequence

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest


def why_final(request: EngineCoreRequest) -> str | None:
    """Why ``request`` cannot be continued once it has tokens; None where it can."""
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None:
        return "its answer or its prompt has no tokens"
    held = {
        "structured output": params.structured_outputs,
        "a penalty over the answer": params.presence_penalty or params.frequency_penalty,
        "a seed": params.seed is not None and params.temperature > 0,
        "bad words": params.bad_words,
        "a thinking budget": params.thinking_token_budget,
        "repetition detection": params.repetition_detection,
        "a watermark": params.watermarking,
    }
    return next((f"{what} depends on what its replica knew" for what, is_set in held.items() if is_set), None)


def continued(request: EngineCoreRequest, token_ids: Sequence[int]) -> EngineCoreRequest:
    """The rest of ``request`` after ``token_ids`` of its answer; itself where there are none.

    Only for one that ``why_final`` has nothing against.
    """
    if not token_ids:
        return request
    params, prompt = request.sampling_params, request.prompt_token_ids
    assert params is not None and prompt is not None
    return msgspec.structs.replace(
        request, prompt_token_ids=[*prompt, *token_ids], sampling_params=_for_the_rest(params, len(token_ids))
    )


def _for_the_rest(params: SamplingParams, tokens: int) -> SamplingParams:
    rest = params.clone()
    if rest.max_tokens is not None:
        rest.max_tokens = max(1, rest.max_tokens - tokens)
    rest.min_tokens = max(0, rest.min_tokens - tokens)
    rest.prompt_logprobs = None  # they have been told
    return rest
