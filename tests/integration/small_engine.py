"""SmolLM2 on a device whose KV memory holds 40 blocks: small enough that two engines fight over it."""

import random

from cluster.default_model import get_default_model
from replicas.spec import EngineSpec

BLOCK_BYTES = 30 * 2 * 3 * 64 * 4 * 128  # layers x (K, V) x KV heads x head size x float32 x tokens a block
BUDGET_BYTES = 40 * BLOCK_BYTES
GUARANTEE_BYTES = 10 * BLOCK_BYTES
WEIGHTS_BYTES = 538 << 20


def small_spec() -> EngineSpec:
    return EngineSpec(
        model_name="smollm2",
        model_path=str(get_default_model(lambda line: None)),
        max_model_len=1024,
        dtype="float32",
        kv_ceiling_bytes=BUDGET_BYTES,
        kv_rest_bytes=2 * BLOCK_BYTES,
        kv_guarantee_bytes=GUARANTEE_BYTES,
        weights_bytes=WEIGHTS_BYTES,
        max_num_seqs=16,
        engine_args={"enforce_eager": True},
    )


def burst(seed: int, requests: int, tokens: int) -> list[list[int]]:
    """So many random prompts of ``tokens`` tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(1000, 40000) for _ in range(tokens)] for _ in range(requests)]
