"""Checkpoints of a few megabytes with random weights, made in a second: models whose tokens depend on what the KV cache
of every layer holds, which is all that a test of exactness needs of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from replicas.spec import EngineSpec

VOCABULARY = 1024
IDS = range(VOCABULARY)
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4, 128, 4, 2, 32
BLOCK_TOKENS = 32
BLOCK_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4 * BLOCK_TOKENS  # float32, over all layers and ranks
MAX_MODEL_LEN = 1024
REST_BLOCKS, GUARANTEE_BLOCKS, CEILING_BLOCKS = 8, MAX_MODEL_LEN // BLOCK_TOKENS + 2, 160
LIMITS_BYTES = [blocks * BLOCK_BYTES for blocks in (GUARANTEE_BLOCKS, 50, 90, CEILING_BLOCKS)]
"""For a lease that swings between one longest request's worth and the ceiling."""


def tiny_llama(folder: Path) -> Path:
    """Full attention in every layer: one KV cache group."""
    return _save(LlamaConfig(**_sizes()), folder)


def tiny_gemma(folder: Path) -> Path:
    """Three layers with a sliding window of four KV blocks for one with full attention: four KV cache groups."""
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    window = 4 * BLOCK_TOKENS
    return _save(
        Gemma3TextConfig(**_sizes(), layer_types=kinds, sliding_window=window, query_pre_attn_scalar=HEAD_DIM), folder
    )


def tiny_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of ``tiny_llama`` that changes most of its tokens."""
    rank, widths = 8, {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=generator) * 0.1
            weights[f"{prefix}.lora_B.weight"] = torch.randn(width, rank, generator=generator) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(widths)}))
    return folder


def tiny_spec(model: Path, elastic: bool, ranks: int = 1, **engine_args: Any) -> EngineSpec:
    """How these models are served: KV blocks of 32 tokens, memory for about ten requests at most."""
    return EngineSpec(
        model_name=model.name,
        model_path=str(model),
        max_model_len=MAX_MODEL_LEN,
        dtype="float32",
        kv_ceiling_bytes=CEILING_BLOCKS * BLOCK_BYTES,
        kv_rest_bytes=REST_BLOCKS * BLOCK_BYTES,
        kv_guarantee_bytes=GUARANTEE_BLOCKS * BLOCK_BYTES,
        weights_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
        max_num_seqs=16,
        max_num_batched_tokens=256,
        elastic=elastic,
        tensor_parallel_size=ranks,
        engine_args={
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "block_size": BLOCK_TOKENS,
            **engine_args,
        },
    )


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2 * MAX_MODEL_LEN,
        "initializer_range": 0.15,  # so large that attention matters, and tokens do not repeat
        "tie_word_embeddings": False,
    }


def _save(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
