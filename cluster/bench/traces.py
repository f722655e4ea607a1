"""Traces of production: the CSV files of Azure's LLM inference traces and the JSON lines of Mooncake.

    Azure       TIMESTAMP,ContextTokens,GeneratedTokens           a date and time, tokens, tokens
    Mooncake    {"timestamp", "input_length", "output_length", "hash_ids"}    milliseconds, tokens, tokens, block ids

A block of Mooncake is BLOCK_TOKENS tokens of a prompt; an id stands for the block and all before it, so prompts that
begin with the same ids begin with the same tokens.
"""

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from cluster.bench.errors import BenchError
from cluster.bench.workload import DEFAULT_VOCAB_SIZE, Request, Workload, block_tokens

BLOCK_TOKENS = 512
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_Line = TypeVar("_Line")


class Fit(StrEnum):
    """How requests that are too long for the model are made to fit."""

    CLIP = "clip"
    """Cut the long ones; the others stay as they are."""
    SCALE = "scale"
    """Shrink all by the factor that makes the longest fit; blocks shrink with them."""


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace: seconds from its start, tokens, and the ids of the prompt's blocks where it has some."""

    arrival_s: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] | None = None


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, limit: int | None = None) -> list[TraceRow]:
    """The first ``limit`` requests of the trace, times from 0. What the file is shows in its first line.

    Raises BenchError, with the line's number, for a line or a heading that does not fit.
    """
    if limit is not None and limit < 1:
        raise BenchError(f"--limit {limit} does not fit: give at least 1")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            parse = _mooncake if first.lstrip().startswith("{") else _azure
            rows = list(itertools.islice(parse(path, file), limit))
    except FileNotFoundError as error:
        raise BenchError(f"no such trace: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    if not rows:
        raise BenchError(f"{path} holds no requests")
    start = rows[0].arrival_s
    return [TraceRow(row.arrival_s - start, row.input_len, row.output_len, row.hash_ids) for row in rows]


def trace_workload(
    rows: Sequence[TraceRow],
    *,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    fit: Fit = Fit.CLIP,
    seed: int = 0,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    origin: str = "trace",
) -> Workload:
    """The rows as requests of at most the given lengths, in tokens; ``origin`` names them in the report.

    Clipping keeps the beginning of a prompt, so shared prefixes stay shared. A row without blocks is one block of its
    own. Raises BenchError.
    """
    input_factor = _factor("--max-input-len", max_input_len, [row.input_len for row in rows], fit)
    output_factor = _factor("--max-output-len", max_output_len, [row.output_len for row in rows], fit)

    def request(index: int, row: TraceRow) -> Request:
        whole, output_len = _scaled(row.input_len, input_factor), _scaled(row.output_len, output_factor)
        input_len = min(whole, max_input_len or whole)
        at = np.arange(input_len)
        if row.hash_ids is None:
            blocks, positions = np.full(input_len, index), at
        else:
            starts = np.rint(np.arange(len(row.hash_ids)) * BLOCK_TOKENS * input_factor).astype(np.int64)
            owner = np.searchsorted(starts, at, side="right") - 1
            blocks, positions = np.array(row.hash_ids)[owner], at - starts[owner]
        prompt = block_tokens(seed, blocks, positions, vocab_size)
        fitting = min(output_len, max_output_len or output_len)
        clipped = input_len < row.input_len or fitting < row.output_len
        return Request(index, prompt, fitting, row.arrival_s, clipped)

    requests = [request(index, row) for index, row in enumerate(rows)]
    settings: dict[str, Any] = {
        "kind": "trace",
        "origin": origin,
        "requests": len(requests),
        "max_input_len": max_input_len,
        "max_output_len": max_output_len,
        "fit": fit.value,
        "input_factor": input_factor,
        "output_factor": output_factor,
        "seed": seed,
    }
    return Workload(requests, settings)


def _factor(option: str, longest: int | None, lengths: Sequence[int], fit: Fit) -> float:
    if longest is None:
        return 1.0
    if longest < 1:
        raise BenchError(f"{option} {longest} does not fit: give at least 1")
    return min(1.0, longest / max(lengths)) if fit is Fit.SCALE else 1.0


def _scaled(length: int, factor: float) -> int:
    return max(1, round(length * factor))


def _azure(path: Path, lines: Iterable[str]) -> Iterator[TraceRow]:
    reader = csv.reader(lines)
    columns = next(reader, [])
    missing = [name for name in _AZURE_COLUMNS if name not in columns]
    if missing:
        raise BenchError(
            f"{path}, line 1: no column {', '.join(missing)}; an Azure trace begins with {','.join(_AZURE_COLUMNS)}, a "
            f"Mooncake trace with a JSON object; found {','.join(columns)[:100]!r}"
        )
    at, context, generated = (columns.index(name) for name in _AZURE_COLUMNS)

    def parse(cells: list[str]) -> TraceRow:
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} cells instead of {len(columns)}")
        when = datetime.fromisoformat(cells[at])
        seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        return TraceRow(seconds, _length(int(cells[context])), _length(int(cells[generated])))

    return _parsed(path, ((reader.line_num, cells) for cells in reader if cells), parse)


def _mooncake(path: Path, lines: Iterable[str]) -> Iterator[TraceRow]:
    decoder = msgspec.json.Decoder(_MooncakeLine)

    def parse(text: str) -> TraceRow:
        line = decoder.decode(text)
        needed = math.ceil(_length(line.input_length) / BLOCK_TOKENS)
        if len(line.hash_ids) != needed:
            raise ValueError(
                f"{len(line.hash_ids)} hash_ids for {line.input_length} tokens, which are {needed} blocks of "
                f"{BLOCK_TOKENS}"
            )
        return TraceRow(line.timestamp / 1000, line.input_length, _length(line.output_length), tuple(line.hash_ids))

    return _parsed(path, ((number, text) for number, text in enumerate(lines, 1) if text.strip()), parse)


def _parsed(path: Path, lines: Iterable[tuple[int, _Line]], parse: Callable[[_Line], TraceRow]) -> Iterator[TraceRow]:
    """The rows, in order of time. Raises BenchError with the number of the line that does not fit."""
    last_s = -math.inf
    for number, line in lines:
        try:
            row = parse(line)
            if not row.arrival_s >= last_s:
                raise ValueError("the request came before the one above it; sort the trace by time")
        except (ValueError, msgspec.DecodeError) as error:
            raise BenchError(f"{path}, line {number}: {error}") from error
        last_s = row.arrival_s
        yield row


def _length(tokens: int) -> int:
    if tokens < 1:
        raise ValueError(f"a length of {tokens} tokens; it should be at least 1")
    return tokens
