"""Small checkpoints on disk, without any weights that mean something, and vLLM's server of one of them."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from tests.unit.cluster.vllm_front import VllmServer

Checkpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Makes a folder with a Llama's config.json, changed by keyword (None removes a key), and tensors of 1,000 floats
    and 10 ints."""

    def make(name: str = "tiny", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config: dict[str, object] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "hidden_size": 256,
            "max_position_embeddings": 2048,
        } | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        save_file(
            {"a": torch.zeros(10, 100, dtype=dtype), "b": torch.zeros(10, dtype=torch.int32)},
            folder / "model.safetensors",
        )
        return folder

    return make


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> "AsyncIterator[VllmServer]":
    """For modules whose tests share an event loop."""
    from tests.unit.cluster.vllm_front import VllmServer, small_checkpoint  # slow to import, and few need it

    made = VllmServer(small_checkpoint(tmp_path_factory.mktemp("words")))
    await made.open()
    yield made
    await made.close()
