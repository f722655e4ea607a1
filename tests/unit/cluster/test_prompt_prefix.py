"""Ids of a prompt's beginnings."""

from typing import Any

import msgspec
import pytest
import torch
from vllm.lora.request import LoRARequest

from cluster.prompt_prefix import PREFIX_TOKENS, prefix_ids, prompt_length
from tests.unit.cluster.fake_replicas import request


def asks(tokens: list[int] | None, **fields: Any) -> Any:
    return msgspec.structs.replace(request(), prompt_token_ids=tokens, **fields)


PROMPT = list(range(3 * PREFIX_TOKENS + 5))


def test_prompts_share_ids_as_far_as_they_begin_alike() -> None:
    """One id a whole run of tokens; a token that differs changes its run's id and all after it."""
    other = PROMPT.copy()
    other[PREFIX_TOKENS] += 1
    first, second = prefix_ids(asks(PROMPT)), prefix_ids(asks(other))
    assert (len(first), len(set(first))) == (3, 3)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False]
    assert prefix_ids(asks(PROMPT[:-5])) == first
    assert prefix_ids(asks(PROMPT[: PREFIX_TOKENS - 1])) == ()


def test_salts_and_adapters_keep_prompts_apart() -> None:
    """The same tokens under another cache salt or LoRA adapter share nothing: nor do they in vLLM's prefix cache."""
    kinds = [{}, {"cache_salt": "a"}, {"cache_salt": "b"}]
    kinds += [{"lora_request": LoRARequest(name, 1, "/adapter")} for name in ("a", "b")]  # type: ignore[dict-item]
    ids = [one for fields in kinds for one in prefix_ids(asks(PROMPT, **fields))]
    assert len(set(ids)) == 3 * len(kinds)
    assert prefix_ids(asks(PROMPT, cache_salt="a")) == prefix_ids(asks(PROMPT, cache_salt="a"))


@pytest.mark.parametrize("tokens", [None, PROMPT])
def test_a_prompt_of_embeddings_has_a_length_and_no_prefix(tokens: list[int] | None) -> None:
    """What is not tokens cannot be compared."""
    made = asks(tokens, prompt_embeds=torch.zeros(300, 4))
    assert prefix_ids(made) == ()
    assert prompt_length(made) == (300 if tokens is None else len(PROMPT))
    assert prompt_length(asks([])) == 1
