"""KV fingerprints: equal for equal KV bytes, different for everything else."""

import json
import os
import struct
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_agent.errors import SettingsError
from memory_agent.kv_fingerprint import KvFingerprint, block_key, tail_key, weights_identity

BASE = KvFingerprint(weights="w", dtype="bfloat16", kv_dtype="bfloat16", block_tokens=128, layout="LBHNC")


def make_model(folder: Path, seed: int) -> Path:
    """A model of one tensor in two files of equal names and sizes, with settings and a tokenizer that all share."""
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [4096], "data_offsets": [0, 16384]}}).encode()
    for part in range(2):
        weights = np.random.default_rng([seed, part]).random(4096, np.float32).tobytes()
        file = folder / f"model-{part}.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + weights)
    (folder / "config.json").write_text('{"hidden_size": 64}')
    (folder / "tokenizer.json").write_text('{"vocab": {"a": 0}}')
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    return folder


def test_two_models_with_one_tokenizer_share_no_key(tmp_path: Path) -> None:
    """Models of the same shape, names, sizes, times, settings and tokenizer have no key in common for the same
    tokens."""
    prints = [
        replace(BASE, weights=weights_identity(make_model(tmp_path / str(seed), seed))).digest for seed in range(2)
    ]
    hashes = [os.urandom(32) for _ in range(100)]
    first, second = ({block_key(fingerprint, block) for block in hashes} for fingerprint in prints)
    assert len(first) == len(second) == 100
    assert first.isdisjoint(second)


def test_a_tail_belongs_to_one_request_and_generation() -> None:
    """Another model, request or number of tokens is another key; none of no tokens."""
    other = replace(BASE, weights="v")
    keys = {
        tail_key(fingerprint.digest, request_id, generation)
        for fingerprint in (BASE, other)
        for request_id in ("r", "s", "")
        for generation in (1, 2, 300)
    }
    assert {len(key) for key in keys} == {32}
    assert len(keys) == 18
    with pytest.raises(ValueError, match="0 tokens"):
        tail_key(BASE.digest, "r", 0)


def test_a_copy_of_a_model_is_the_same_model(tmp_path: Path) -> None:
    """Another folder, other times and a file that says nothing of the model make no difference."""
    one, other = make_model(tmp_path / "a", 0), make_model(tmp_path / "b", 0)
    os.utime(other / "config.json", (5, 5))
    (other / "README.md").write_text("a copy")
    assert weights_identity(one) == weights_identity(other)


@pytest.mark.parametrize("at", [0, 8, 12000, -1])
def test_one_changed_byte_is_another_model(tmp_path: Path, at: int) -> None:
    """Wherever a weight file differs, in its header or in one weight, it is another model."""
    one, other = make_model(tmp_path / "a", 0), make_model(tmp_path / "b", 0)
    file = other / "model-1.safetensors"
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    assert weights_identity(one) != weights_identity(other)


def test_changed_settings_and_exchanged_files_are_another_model(tmp_path: Path) -> None:
    """The settings (rope scaling, say) and the names of the files count too."""
    folder = make_model(tmp_path / "a", 0)
    before = weights_identity(folder)
    (folder / "config.json").write_text('{"hidden_size": 64, "rope_theta": 1}')
    changed = weights_identity(folder)
    first, second = folder / "model-0.safetensors", folder / "model-1.safetensors"
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)
    assert len({before, changed, weights_identity(folder)}) == 3


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """A folder of settings alone, and one that is not there, are settings errors."""
    (tmp_path / "config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SettingsError, match="has no weights"):
            weights_identity(folder)


@pytest.mark.parametrize("name", [field.name for field in fields(KvFingerprint)])
def test_every_field_counts(name: str) -> None:
    """Changing any one field changes the digest."""
    changed = asdict(BASE)
    changed[name] += 1 if isinstance(changed[name], int) else "x"
    other = KvFingerprint(**changed)
    assert other.digest != BASE.digest
    assert len(BASE.digest) == 32
    assert replace(BASE).digest == BASE.digest


@given(one=st.tuples(st.text(), st.text()), other=st.tuples(st.text(), st.text()))
def test_fields_do_not_run_into_each_other(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Digests are equal exactly when the fields are, however text is spread over neighbouring ones."""
    digests = [replace(BASE, adapter=adapter, salt=salt).digest for adapter, salt in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)


def test_text_that_moves_from_field_to_field_is_noticed() -> None:
    """The same letters in other fields are another fingerprint."""
    assert replace(BASE, adapter="ab", salt="c").digest != replace(BASE, adapter="a", salt="bc").digest
    assert replace(BASE, tp_rank=1, tp_size=12).digest != replace(BASE, tp_rank=11, tp_size=2).digest


def test_the_digest_stays_the_same_over_releases() -> None:
    """Segments outlive processes: the digest of given fields is a constant, until _VERSION says otherwise."""
    assert BASE.digest.hex() == "eb822c73af1c94d66db12fe53e320bdcb73af285e1cb9cd0f3fe82a8cb5a5b28"


def test_keys_are_made_of_a_fingerprint_and_a_block() -> None:
    """A key has 32 bytes; a fingerprint of another length, or no hash, is refused."""
    assert len(block_key(BASE.digest, b"h")) == 32
    assert block_key(BASE.digest, b"h") != block_key(BASE.digest, b"i")
    for fingerprint, block_hash in ((b"short", b"h"), (BASE.digest, b"")):
        with pytest.raises(ValueError, match="no key"):
            block_key(fingerprint, block_hash)
