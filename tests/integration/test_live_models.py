"""The models of the running cluster: limits that change live, a registry that dies, and models that come and go."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from cluster.default_model import get_default_model
from cluster.registry_link import MODELS_NAME
from memory_agent.controller_link import NAMESPACE

MIB = 1 << 20
DEADLINE_S = 60.0
TOKENS = 40


def ellm(url: str, *arguments: str) -> tuple[int, str]:
    """Exit status and everything printed of ``ellm models``."""
    command = [sys.executable, "-m", "cluster.cli", "models", *arguments, "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout + done.stderr


def listing(url: str) -> dict[str, dict[str, Any]]:
    """The models by name; empty while the registry is away."""
    answer = httpx.get(f"{url}/ellm/models", timeout=20, trust_env=False)
    return {model["name"]: model for model in answer.json()["models"]} if answer.status_code == 200 else {}


def engines(url: str, model: str) -> list[dict[str, Any]]:
    """What the board says of the model's replicas."""
    snapshot = httpx.get(f"{url}/ellm/status", timeout=20, trust_env=False).json()
    devices = [device for node in snapshot["nodes"] for device in node["devices"]]
    return [replica for device in devices for replica in device["replicas"] if replica["model"] == model]


def until(reached: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.1)


def complete(url: str, model: str, prompt: str, tokens: int = TOKENS) -> list[int]:
    """Greedy token ids."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


def test_limits_move_live_and_outlive_the_registry(cluster: str, model: str) -> None:
    """A ceiling below what the replicas may hold reaches every engine by its lease; it is there again after the
    registry was killed; auto gives the first limits back. Requests are answered all the time."""
    before = listing(cluster)[model]
    ceiling = before["guarantee_bytes"] + 64 * MIB
    code, text = ellm(cluster, "limit", model, "--ceiling", str(ceiling))
    assert code == 0, text
    try:
        until(lambda: [one["ceiling_bytes"] for one in engines(cluster, model)] == [ceiling] * 2, "new ceilings")
        until(lambda: all(one["limit_bytes"] <= ceiling for one in engines(cluster, model)), "lower leases")
        ray.kill(ray.get_actor(MODELS_NAME, namespace=NAMESPACE), no_restart=False)
        assert len(complete(cluster, model, "Hello", 5)) == 5
        until(lambda: listing(cluster).get(model, {}).get("ceiling_bytes") == ceiling, "the registry knows the limit")
        assert listing(cluster)[model]["phase"] == "serving"
    finally:
        until(lambda: ellm(cluster, "limit", model, "--ceiling", "auto")[0] == 0, "the registry answers")
    until(
        lambda: {one["ceiling_bytes"] for one in engines(cluster, model)} == {before["ceiling_bytes"]}, "old ceilings"
    )


def test_what_cannot_work_changes_nothing(cluster: str, model: str) -> None:
    """The only model cannot be removed or added again, and one that cannot be found is told with its stage."""
    known = httpx.get(f"{cluster}/v1/models", trust_env=False).json()["data"]
    for arguments, said in (
        (["remove", model], "no other model serves"),
        (["add", "default", "--name", model], "is there already"),
        (["add", "/no/such/folder"], "model: no such folder"),
        (["add", "default", "--name", "huge", "--replicas", "29"], "memory: too little memory for huge"),
    ):
        code, text = ellm(cluster, *arguments)
        assert (code, said in text) == (1, True), text
    ellm(cluster, "remove", "folder")
    ellm(cluster, "remove", "huge")
    assert list(listing(cluster)) == [model]
    assert [card["id"] for card in known] == [model]


def tiny_checkpoint(folder: Path) -> Path:
    """A small Llama with random weights, another KV geometry than the default model's, and that one's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = get_default_model(lambda line: None)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
def test_models_come_and_go_while_others_serve(cluster: str, model: str, tmp_path: Path) -> None:
    """Two models are added at once to a cluster that goes on streaming; interleaved, each gives the tokens that it
    gives alone; together they stay inside the budget. One that is removed ends its requests first, is unknown after
    that, and its memory is lent to the others."""
    prompts = [f"{n} and {n + 1} are numbers. The sum of both is" for n in range(6)]
    tiny = str(tiny_checkpoint(tmp_path / "tiny"))
    file = tmp_path / "models.yaml"
    common = "replicas: 1, dtype: float32, max_model_len: 512, max_num_seqs: 16"
    file.write_text(f"models: [{{name: precise, {common}}}, {{name: tiny, source: {tiny}, {common}}}]")
    with ThreadPoolExecutor(20) as pool:
        stream = pool.submit(complete, cluster, model, "Once upon a time", 600)
        adding = [
            pool.submit(ellm, cluster, "add", "--config", str(file), "--name", name) for name in ("precise", "tiny")
        ]
        try:
            for code, text in (one.result() for one in adding):
                assert code == 0, text
            cards = httpx.get(f"{cluster}/v1/models", trust_env=False).json()["data"]
            assert {card["id"] for card in cards} == {model, "precise", "tiny"}
            alone = {name: [complete(cluster, name, one) for one in prompts] for name in ("precise", "tiny")}
            assert alone["precise"] != alone["tiny"]
            both = [(name, one) for one in prompts for name in ("precise", "tiny")]
            answers = [pool.submit(complete, cluster, name, one) for name, one in both]
            others = [pool.submit(complete, cluster, model, one) for one in prompts]
            while not all(answer.done() for answer in answers):
                rows = listing(cluster).values()
                assert sum(row["held_bytes"] for row in rows) <= budget(cluster)
                time.sleep(0.05)
            for (name, prompt), answer in zip(both, answers, strict=True):
                assert answer.result() == alone[name][prompts.index(prompt)], f"{name}: {prompt}"
            assert [len(other.result()) for other in others] == [TOKENS] * len(prompts)
            assert len(stream.result()) == 600

            last = pool.submit(complete, cluster, "precise", prompts[0], 300)
            until(lambda: listing(cluster)["precise"]["running"] == 1, "the last request runs")
            code, text = ellm(cluster, "remove", "precise")
            assert (code, "1 requests in flight" in text) == (0, True), text
            assert len(last.result()) == 300
            gone = httpx.post(f"{cluster}/v1/completions", json={"model": "precise", "prompt": "x"}, trust_env=False)
            assert (gone.status_code, gone.json()["error"]["type"]) == (404, "NotFoundError")
            assert complete(cluster, "tiny", prompts[0]) == alone["tiny"][0]
            until(lambda: engines(cluster, "precise") == [], "its lease is free")
        finally:
            for name in ("precise", "tiny"):
                ellm(cluster, "remove", name)
    lent = budget(cluster) - 4 * MIB
    until(lambda: sum(one["limit_bytes"] for one in engines(cluster, model)) >= lent, "its memory is lent again")
    assert list(listing(cluster)) == [model]


def budget(url: str) -> int:
    """Bytes that the engines of the device share."""
    snapshot = httpx.get(f"{url}/ellm/status", timeout=20, trust_env=False).json()
    return int(snapshot["nodes"][0]["devices"][0]["budget_bytes"])
