"""From a model's source to a local checkpoint and the facts that sizes are computed from.

Only config.json and the headers of the safetensors files are read: no weights, no torch.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ModelConfig, looks_like_path
from cluster.default_model import Progress, get_default_model
from memory_agent.errors import SettingsError
from replicas.cpu import has_slow_half_precision

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT_TENSORS = {"F64", "F32", "BF16", "F16"}
_MAX_HEADER_BYTES = 100_000_000
_DEFAULT_MAX_MODEL_LEN = 8192
_LARGE_HIDDEN, _LARGE_VOCABULARY = 8192, 262_144  # where a config.json does not tell
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


class ModelError(SettingsError):
    """The model cannot be found, read or served. The message names the remedy."""


@dataclass(frozen=True)
class ModelFacts:
    """What the sizes of one model's engines depend on.

    Attributes:
        path: folder of the checkpoint.
        dtype: of weights and computation, resolved: never "auto".
        max_model_len: tokens of one longest request, resolved and inside the model's own limit.
        weights_bytes: bytes of the weights when loaded as ``dtype``.
        kv_token_bytes: KV bytes of one token over all layers.
        activation_token_bytes: upper estimate of the activations of one token in a step.
        logits_row_bytes: likewise, of the logits of one request that samples.
        dtype_reason: why ``dtype`` is not the checkpoint's own, where the user did not say so; empty else.
    """

    path: Path
    dtype: str
    max_model_len: int
    weights_bytes: int
    kv_token_bytes: int
    activation_token_bytes: int
    logits_row_bytes: int
    dtype_reason: str = ""

    @property
    def weights_line(self) -> str:
        """The weights for an operator to read."""
        reason = f" ({self.dtype_reason})" if self.dtype_reason else ""
        return f"{self.weights_bytes / 2**20:.0f} MiB of {self.dtype} weights{reason} in {self.path}"


def resolve_source(source: str, progress: Progress) -> Path:
    """The folder of ``source``: the default model, a local folder, or a hub id, which is downloaded.

    Raises ModelError for a source that does not exist, DefaultModelError where the default model cannot be made.
    """
    if source == "default":
        return get_default_model(progress)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ModelError(f"{source} is a file; a model is a folder with config.json, *.safetensors and a tokenizer")
    if looks_like_path(source):
        raise ModelError(
            f"no such folder: {folder}; give the folder of a checkpoint, a hub id such as Qwen/Qwen3-0.6B, or default"
        )
    return _download(source, progress)


def read_facts(folder: Path, model: ModelConfig) -> ModelFacts:
    """Facts of the checkpoint in ``folder`` under the settings of ``model``. Raises ModelError."""
    config = _read_config(folder)
    text = config.get("text_config") or config
    dtype, dtype_reason = (model.dtype, "") if model.dtype != "auto" else _auto_dtype(config, text)
    kv_dtype_bytes = 1 if str(model.engine_args.get("kv_cache_dtype", "auto")).startswith("fp8") else DTYPE_BYTES[dtype]
    return ModelFacts(
        path=folder,
        dtype=dtype,
        max_model_len=_max_model_len(model, text),
        weights_bytes=_weights_bytes(folder, DTYPE_BYTES[dtype]),
        kv_token_bytes=_kv_values_per_token(text, folder) * kv_dtype_bytes,
        activation_token_bytes=_activation_token_bytes(text, DTYPE_BYTES[dtype]),
        # In the model's type, as float32, and a float32 copy that is sorted, masked or normalised.
        logits_row_bytes=int(text.get("vocab_size") or _LARGE_VOCABULARY) * (DTYPE_BYTES[dtype] + 8),
        dtype_reason=dtype_reason,
    )


def _download(hub_id: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    progress(f"looking for {hub_id} on the Hugging Face hub")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise ModelError(f"{hub_id} is gated: accept its licence on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {hub_id} and there is no such folder here; check the spelling, or set HF_TOKEN if "
            "it is private"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{hub_id!r} is neither a folder nor a hub id such as Qwen/Qwen3-0.6B") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{hub_id} is no folder here and cannot be had from the hub: {reason}; check the network, or give a local "
            "folder"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = (
            "; it holds a GGUF file, which has to be converted to safetensors first"
            if any(folder.glob("*.gguf"))
            else ""
        )
        raise ModelError(f"{folder} is no checkpoint: it has no config.json{hint}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}; download the model again") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ModelError(
            f'{path} names no architecture; it should say for example "architectures": ["LlamaForCausalLM"]'
        )
    return config


def _auto_dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str, str]:
    """The type for ``dtype: auto`` and, where it is a surprise, the reason.

    bfloat16 where the checkpoint says float32 or nothing: half the memory, and what CPU and GPU kernels are made for;
    float32 where the CPU that computes has no such kernels.
    """
    if has_slow_half_precision():
        return "float32", "this CPU has no AVX-512 and is far slower in bfloat16; dtype: bfloat16 halves them"
    found = next((c[key] for c in (config, text) for key in ("dtype", "torch_dtype") if c.get(key)), "bfloat16")
    return ("float16" if found == "float16" else "bfloat16"), ""


def _max_model_len(model: ModelConfig, text: Mapping[str, Any]) -> int:
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
    limit = next((int(text[key]) for key in keys if text.get(key)), None)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if limit is not None and isinstance(rope.get("factor"), int | float):
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * rope["factor"]))
    if model.max_model_len is None:
        return min(limit or _DEFAULT_MAX_MODEL_LEN, _DEFAULT_MAX_MODEL_LEN)
    if limit is not None and model.max_model_len > limit:
        raise ModelError(
            f"model {model.name}: max_model_len is {model.max_model_len}, but the model knows {limit} positions; set "
            f"it to at most {limit}"
        )
    return model.max_model_len


def _kv_values_per_token(text: Mapping[str, Any], folder: Path) -> int:
    """Numbers that the KV cache keeps of one token, as vLLM's attention specs count them; layers with a window count in
    full."""
    try:
        layers = int(text.get("num_hidden_layers") or text["n_layer"])
        if text.get("kv_lora_rank"):  # latent attention keeps one compressed vector and one rotary key
            return layers * (int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"]))
        heads = int(text.get("num_attention_heads") or text["n_head"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or int(text.get("hidden_size") or text["n_embd"]) // heads)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'} does not tell the size of the KV cache ({error}); only decoder models with "
            "attention work"
        ) from error
    return layers * 2 * kv_heads * head_dim


def _activation_token_bytes(text: Mapping[str, Any], float_bytes: int) -> int:
    """What is alive of one token at the widest place of a layer: gate, up and their product, queries, keys and values,
    the residual stream and its copies, two of them as float32 for the norm."""
    hidden = int(text.get("hidden_size") or text.get("n_embd") or _LARGE_HIDDEN)
    inner = int(text.get("intermediate_size") or text.get("n_inner") or 4 * hidden)
    if experts := int(text.get("num_experts_per_tok") or 0):
        inner = max(inner, experts * int(text.get("moe_intermediate_size") or inner))
    return (3 * inner + 8 * hidden) * float_bytes + 2 * hidden * 4


def _weights_bytes(folder: Path, float_bytes: int) -> int:
    """Bytes of all tensors once floats are cast to ``float_bytes`` each; quantised tensors keep their size."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(
                {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"cannot read {index}: {error}; download the model again") from error
    else:
        files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        raise ModelError(
            f"{folder} has no *.safetensors weights; convert the checkpoint, for example with transformers' "
            "save_pretrained"
        )
    return sum(_tensor_bytes(tensor, float_bytes) for path in files for tensor in _tensors(path))


def _tensors(path: Path) -> Iterator[Mapping[str, Any]]:
    """Headers of the tensors in ``path``: a length, then JSON, then data up to the end of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            tensors = [value for name, value in json.loads(file.read(length)).items() if name != "__metadata__"]
        if tensors and 8 + length + max(tensor["data_offsets"][1] for tensor in tensors) > size:
            raise ValueError("its end is missing")
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"cannot read {path}: {error}; download the model again") from error
    yield from tensors


def _tensor_bytes(tensor: Mapping[str, Any], float_bytes: int) -> int:
    if tensor["dtype"] in _FLOAT_TENSORS:
        return int(math.prod(tensor["shape"])) * float_bytes
    begin, end = tensor["data_offsets"]
    return int(end) - int(begin)
