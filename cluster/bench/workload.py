"""What is asked: requests of random tokens. Everything follows from the seed.

Token t of block b is a hash of (seed, b, t), so equal blocks have equal tokens in any request and any process, and a
prompt is written down block by block without keeping the blocks:

    random      | shared prefix p: block -1-p, tokens 0 .. prefix_len | own part of request i: block i, tokens 0 .. |
    trace       | block hash_ids[0] | block hash_ids[1] | ...                                                        |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.bench.errors import BenchError

Tokens = npt.NDArray[np.int32]

MIN_TOKEN_ID = 1000
"""Vocabularies keep special tokens and single bytes below."""
DEFAULT_VOCAB_SIZE = 32000
"""The smallest vocabulary in common use; ids stay below."""
_LENGTHS, _ARRIVALS = 1, 2
"""Independent random streams of one seed."""


@dataclass(frozen=True, eq=False)
class Request:
    """One request.

    Attributes:
        index: position in the workload.
        prompt: token ids, int32 of shape (input_len,).
        output_len: tokens to generate, at least 1.
        arrival_s: when a trace saw it, in seconds from the trace's start; None where it carries no time.
        clipped: prompt or output are shorter than the trace says.
    """

    index: int
    prompt: Tokens
    output_len: int
    arrival_s: float | None = None
    clipped: bool = False


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they are sent, and for the report where they came from.

    Attributes:
        requests: all prompts are held, at four bytes a token.
        settings: JSON-ready.
    """

    requests: Sequence[Request]
    settings: dict[str, Any] = field(default_factory=dict)


def random_workload(
    requests: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    prefixes: int = 1,
    seed: int = 0,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> Workload:
    """Random prompts, as the random data set of ``vllm bench serve`` defines them.

    Lengths are uniform in [floor(len x (1 - range_ratio)), ceil(len x (1 + range_ratio))], in tokens. The prefix comes
    on top of ``input_len``; each request takes one of ``prefixes`` at random. Raises BenchError.
    """
    for name, value, least in (
        ("--num-requests", requests, 1),
        ("--input-len", input_len, 0),
        ("--output-len", output_len, 1),
        ("--prefix-len", prefix_len, 0),
        ("--num-prefixes", prefixes, 1),
    ):
        if value < least:
            raise BenchError(f"{name} {value} is too small: give at least {least}")
    if not 0 <= range_ratio < 1:
        raise BenchError(f"--range-ratio {range_ratio:g} does not fit: give a number from 0 to below 1, such as 0.5")
    rng = random_stream(seed, _LENGTHS)
    low, high = _span(input_len, range_ratio)
    if prefix_len + low < 1:
        raise BenchError("a prompt would be empty: give --input-len or --prefix-len, or a smaller --range-ratio")
    input_lens = rng.integers(low, high + 1, size=requests)
    low, high = _span(output_len, range_ratio)
    output_lens = rng.integers(max(low, 1), high + 1, size=requests)
    chosen = rng.integers(prefixes, size=requests)
    settings = {
        "kind": "random",
        "requests": requests,
        "input_len": input_len,
        "output_len": output_len,
        "range_ratio": range_ratio,
        "prefix_len": prefix_len,
        "num_prefixes": prefixes,
        "seed": seed,
    }

    def prompt(index: int) -> Tokens:
        own_len = int(input_lens[index])
        blocks = np.repeat(np.array([-1 - chosen[index], index]), (prefix_len, own_len))
        positions = np.concatenate((np.arange(prefix_len), np.arange(own_len)))
        return block_tokens(seed, blocks, positions, vocab_size)

    return Workload([Request(i, prompt(i), int(output_lens[i])) for i in range(requests)], settings)


def block_tokens(seed: int, blocks: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], vocab_size: int) -> Tokens:
    """Token ids at ``positions`` of ``blocks``, both of shape (n,): MIN_TOKEN_ID to ``vocab_size`` - 1.

    The hash is the finaliser of splitmix64. Raises BenchError for a vocabulary without room.
    """
    if vocab_size <= MIN_TOKEN_ID:
        raise BenchError(f"--vocab-size {vocab_size} does not fit: ids start at {MIN_TOKEN_ID}, so give more than that")
    key = np.uint64(seed * 0x9E3779B97F4A7C15 & 0xFFFF_FFFF_FFFF_FFFF)
    x = blocks.astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + positions.astype(np.uint64) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x % np.uint64(vocab_size - MIN_TOKEN_ID)).astype(np.int32) + np.int32(MIN_TOKEN_ID)


def random_stream(seed: int, stream: int = _ARRIVALS) -> np.random.Generator:
    """One of a seed's independent random streams; by default that of the arrivals. Raises BenchError."""
    if seed < 0:
        raise BenchError(f"--seed {seed} does not fit: give 0 or more")
    return np.random.default_rng([seed, stream])


def _span(mean: int, ratio: float) -> tuple[int, int]:
    return math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))
