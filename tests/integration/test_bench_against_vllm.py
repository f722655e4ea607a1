"""``ellm bench`` and ``vllm bench serve`` measure the same server and have to agree."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.unit.cluster.paced_server import PacedServer

ELLM = ("-m", "cluster.cli", "bench")
VLLM = (
    "-c",
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())",
)
"""``vllm bench serve``. Its command asks for the version of a distribution named vllm, which the CPU build is not."""
REQUESTS, RATE, INPUT_LEN, OUTPUT_LEN = 32, 8, 24, 16


async def python(*arguments: str) -> None:
    """A Python process to its end; its output is in the failure where there is one."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-3000:]


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer that vLLM's tool can make random prompts with, in place of a model's."""
    words = {f"w{i}": i for i in range(2000)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model})
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
async def test_both_tools_report_the_same_figures_of_the_same_server(tmp_path: Path, chat: bool) -> None:
    """A server whose every fourth answer starts three times as late, two tokens in each chunk: means, medians,
    99th percentiles and rates of both tools are within 12 % of each other, and the counts are equal."""
    tokenizer = word_tokenizer(tmp_path)
    route = "/v1/chat/completions" if chat else "/v1/completions"
    async with PacedServer(first_s=0.3, gap_s=0.04, slow_every=4, tokens_per_chunk=2) as server:
        load = ("--base-url", server.url, "--model", "toy", "--request-rate", str(RATE))
        ours = ("--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN), "--num-requests", str(REQUESTS))
        kind = "chat" if chat else "completions"
        await python(*ELLM, *load, *ours, "--endpoint", kind, "--json", str(tmp_path / "ellm.json"))
        theirs = ("--dataset-name", "random", "--tokenizer", str(tokenizer), "--num-prompts", str(REQUESTS))
        lengths = ("--random-input-len", str(INPUT_LEN), "--random-output-len", str(OUTPUT_LEN))
        saved = ("--save-result", "--result-dir", str(tmp_path), "--result-filename", "vllm.json")
        backend = ("--backend", "openai-chat" if chat else "openai", "--endpoint", route, "--ignore-eos")
        shown = ("--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm")
        await python(*VLLM, *load, *theirs, *lengths, *saved, *backend, *shown)
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("ellm.json", "vllm.json"))
    for count in ("completed", "failed", "total_output_tokens"):
        assert one[count] == other[count]
    assert not one["generator_late"]
    compared = ["request_throughput", "output_throughput", "total_token_throughput", "median_itl_ms"]
    compared += [f"{kind}_{name}_ms" for name in ("ttft", "tpot", "e2el") for kind in ("mean", "median", "p99")]
    ratios = {name: one[name] / other[name] for name in compared}
    assert all(0.88 < ratio < 1.12 for ratio in ratios.values()), ratios
