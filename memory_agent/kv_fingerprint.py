"""KV fingerprints: what has to be equal before the bytes of a KV block may be used in place of computing them.

vLLM's block hash says which tokens a block holds (and which adapter by name, and which cache salt), not which model
computed it or how it lies in memory. A fingerprint says all that; together they name the bytes:

    block key = sha256(fingerprint | vLLM's block hash)
    tail key  = sha256(fingerprint | "tail" | generation | request id)

A block that is not full has no hash. Its bytes belong to one request, and to the number of tokens, its generation,
whose KV the request has with them.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from memory_agent.errors import SettingsError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_SETTINGS = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
FINGERPRINT_BYTES = 32
_VERSION = 1
"""Grows when a block's bytes come to mean something else with all fields equal."""


@dataclass(frozen=True)
class KvFingerprint:
    """Everything that makes KV bytes compatible. Two engines with equal fields may exchange blocks.

    Attributes:
        weights: which model, of which revision: ``weights_identity`` of its folder, or a hub's commit hash.
        dtype: of the computation ("bfloat16").
        kv_dtype: of the cache ("auto" resolved, "fp8_e4m3").
        block_tokens: tokens of a KV block.
        layout: order of layers, blocks, heads and tokens, and the attention backend where that decides what is stored.
        kv_group: vLLM's KV cache group, for models with several kinds of attention.
        tp_rank, tp_size: which heads of how many parts.
        adapter: ``weights_identity`` of the LoRA adapter, "" without: vLLM's block hash knows its name alone.
        salt: keeps tenants apart, "" where they share.
    """

    weights: str
    dtype: str
    kv_dtype: str
    block_tokens: int
    layout: str
    kv_group: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    adapter: str = ""
    salt: str = ""

    @cached_property
    def digest(self) -> bytes:
        """32 bytes: sha256 over all fields, by name."""
        fields = json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(fields.encode()).digest()


def block_key(fingerprint: bytes, block_hash: bytes) -> bytes:
    """The key of a KV block, 32 bytes.

    Args:
        fingerprint: ``KvFingerprint.digest``.
        block_hash: vLLM's hash of the block, which covers all tokens before it too.
    """
    if len(fingerprint) != FINGERPRINT_BYTES or not block_hash:
        raise ValueError(f"no key from a fingerprint of {len(fingerprint)} bytes and a hash of {len(block_hash)}")
    return hashlib.sha256(fingerprint + block_hash).digest()


def tail_key(fingerprint: bytes, request_id: str, generation: int) -> bytes:
    """The key of the last, partly filled KV block of a request, 32 bytes.

    Args:
        fingerprint: ``KvFingerprint.digest``.
        generation: tokens of the request, from its first on, whose KV is computed.
    """
    if len(fingerprint) != FINGERPRINT_BYTES or generation <= 0:
        raise ValueError(f"no key from a fingerprint of {len(fingerprint)} bytes and {generation} tokens")
    return hashlib.sha256(fingerprint + b"tail" + generation.to_bytes(8, "little") + request_id.encode()).digest()


def model_identity(model: str) -> str:
    """Which model an engine was given: of a local folder its ``weights_identity``, of a hub id that name."""
    folder = Path(model)
    return weights_identity(folder) if folder.is_dir() else model


def weights_identity(folder: Path) -> str:
    """Which model lies in ``folder``: a sha256, in hexadecimal, over the content of its weights and settings.

    Every byte is read. Fine-tuned models share names, sizes, tensor headers and often the tokenizer with their base, so
    none of these tells them apart; times do, but also tell copies of one model on two nodes apart, between which
    blocks should move; and samples miss a change of a few rows. A gigabyte takes 0.7 s of a core, files are read side
    by side, and the engine reads the same pages anyway: compute it once per model, while the engine starts.

    Raises SettingsError where the folder has no weights.
    """
    suffixes = _WEIGHTS + _SETTINGS
    files = sorted(file for file in folder.glob("*") if file.suffix in suffixes and file.is_file())
    if not any(file.suffix in _WEIGHTS for file in files):
        raise SettingsError(f"{folder} has no weights ({', '.join(_WEIGHTS)}): give the folder of a downloaded model")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        contents = readers.map(_content, files)
        listing = "".join(f"{content} {file.name}\n" for content, file in zip(contents, files, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def _content(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
