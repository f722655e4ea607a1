"""A worker without a model: real memory, real copies, and a forward that writes a number where a model writes KV.

The number of a position follows from its token and from the numbers of all positions before it, read from the device
as attention reads them: one wrong position changes every number and every token after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from replicas.host_copies import HostCopies
from replicas.kv_memory import KvMemory
from replicas.kv_moves import KvAcks, KvMoves
from replicas.migration_copies import MigrationCopies

Numbers = NDArray[np.uint64]

VOCABULARY = 127
NAN = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""Eight bytes that are not a number in any type that KV has."""
_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
_MOST_TOKENS = 4096
_WEIGHTS = (2 * np.arange(_MOST_TOKENS, dtype=np.uint64) + 1) * np.uint64(_ODD)


def next_number(before: Numbers, token: int) -> int:
    """What a model without a model computes at the position after ``before``."""
    seen = int(np.dot(before, _WEIGHTS[: len(before)])) + len(before) + token
    mixed = (seen * _ODD) & _MASK
    return mixed ^ mixed >> 29


def next_token(numbers: Numbers) -> int:
    """The greedy token after these positions."""
    return int(np.dot(numbers, _WEIGHTS[: len(numbers)]) >> np.uint64(17)) % VOCABULARY


@cache
def expected_tokens(prompt: tuple[int, ...], count: int) -> list[int]:
    """What an engine answers that never loses or mixes up anything."""
    numbers, tokens = np.zeros(len(prompt) + count, np.uint64), list(prompt)
    for position in range(len(prompt) + count - 1):
        numbers[position] = next_number(numbers[:position], tokens[position])
        if position + 1 == len(tokens):
            tokens.append(next_token(numbers[: position + 1]))
    return tokens[len(prompt) :]


@dataclass(frozen=True)
class Resumption:
    """A preempted request runs again: ``had`` tokens were computed when it last ran, ``found`` of them count now, and
    ``computes`` so many more in its first step."""

    request_id: str
    had: int
    found: int
    computes: int


@dataclass
class _Row:
    """A request as the model runner knows it."""

    prompt: int
    tokens: list[int]
    block_ids: list[int]
    computed: int


@dataclass
class WorkerOutput:
    """Of one step: ``sampled`` tokens of each request."""

    connector: KVConnectorOutput
    sampled: dict[str, list[int]] = field(default_factory=dict)


class ModellessWorker:
    """One rank. What it writes differs from rank to rank and from layer to layer.

    Args:
        block_tokens: tokens of a KV block.
        migration: carries the KV of requests that leave and come.
        copies: None without a host buffer.
    """

    def __init__(
        self,
        rank: int,
        memory: KvMemory,
        block_tokens: int,
        migration: MigrationCopies,
        copies: HostCopies | None = None,
    ) -> None:
        self.rank = rank
        self.memory = memory
        self.copies = copies
        self.migration = migration
        self.resumptions: list[Resumption] = []
        self._block_tokens = block_tokens
        self._rows: dict[str, _Row] = {}

    def execute(self, planned: SchedulerOutput) -> WorkerOutput:
        """One step, in the order of ``ElasticKVConnector.handle_preemptions`` and vLLM's model runner."""
        moves = planned.kv_connector_metadata
        assert isinstance(moves, KvMoves)
        if self.copies is not None:
            self.copies.store(moves.host)
        self.migration.store(moves.migration)
        acks = [self.memory.apply(moves)] if moves.sequence else []
        self.migration.load(moves.migration)
        if self.copies is not None:
            self.copies.load(moves.host)
            self.copies.start_forward(moves.tokens, moves.rows)
        self._update_rows(planned)
        output = WorkerOutput(KVConnectorOutput())
        for request_id, count in planned.num_scheduled_tokens.items():
            output.sampled[request_id] = self._compute(self._rows[request_id], count)
        report = self.copies.finish() if self.copies is not None else None
        moved = self.migration.finish()
        output.connector.kv_connector_worker_meta = KvAcks(
            acks, [], [report] if report is not None else [], [moved] if moved is not None else []
        )
        output.connector.invalid_block_ids = self.migration.take_invalid_blocks()
        if self.copies is not None:
            output.connector.invalid_block_ids |= self.copies.take_invalid_blocks()
        return output

    def _update_rows(self, planned: SchedulerOutput) -> None:
        for request_id in planned.finished_req_ids:
            self._rows.pop(request_id, None)
        for new in planned.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            prompt = list(new.prompt_token_ids)
            self._rows[new.req_id] = _Row(len(prompt), prompt, list(new.block_ids[0]), new.num_computed_tokens)
        cached = planned.scheduled_cached_reqs
        for at, request_id in enumerate(cached.req_ids):
            row, new_blocks = self._rows[request_id], cached.new_block_ids[at]
            found = cached.num_computed_tokens[at]
            if request_id in cached.resumed_req_ids:
                computes = planned.num_scheduled_tokens[request_id]
                self.resumptions.append(Resumption(request_id, row.computed, found, computes))
                row.block_ids = []
                row.tokens = list(cached.all_token_ids[request_id])
            row.computed = found
            del row.tokens[row.prompt + cached.num_output_tokens[at] :]  # tokens of a step that did not count
            if new_blocks is not None:
                row.block_ids += new_blocks[0]

    def _compute(self, row: _Row, count: int) -> list[int]:
        """Write the next ``count`` positions; the token after the last one, where that is not known yet."""
        last = row.computed + count
        numbers = np.zeros(last, np.uint64)
        numbers[: row.computed] = self._read(row.block_ids, row.computed)
        for position in range(row.computed, last):
            numbers[position] = next_number(numbers[:position], row.tokens[position])
        self._write(row.block_ids, row.computed, numbers)
        row.computed = last
        if last < len(row.tokens):
            return []
        row.tokens.append(next_token(numbers))
        return row.tokens[-1:]

    def _read(self, block_ids: Sequence[int], count: int) -> Numbers:
        """The numbers of the first ``count`` positions. Of layers that differ comes a number that none has."""
        blocks = [self._layers(block_id) for block_id in block_ids[: -(-count // self._block_tokens)]]
        if not blocks:
            return np.zeros(0, np.uint64)
        # Attention multiplies what lies behind the last position with zero, and that is NaN where it lies there.
        assert not any((block == NAN).any() for block in blocks)
        layers = np.concatenate(blocks, axis=1)[:, :count] - self._offsets(len(blocks[0]))
        weights = 2 * np.arange(1, len(layers) + 1, dtype=np.uint64) + np.uint64(1)
        weights[-1] = (1 - int(weights[:-1].sum())) & _MASK  # together 1
        numbers: Numbers = (weights[:, None] * layers).sum(axis=0, dtype=np.uint64)
        return numbers

    def _write(self, block_ids: Sequence[int], first: int, numbers: Numbers) -> None:
        for block in range(first // self._block_tokens, -(-len(numbers) // self._block_tokens)):
            start, end = block * self._block_tokens, (block + 1) * self._block_tokens
            written = numbers[max(start, first) : end]
            at = max(start, first) - start
            layers = self._layers(block_ids[block])
            layers[:, at : at + len(written)] = written + self._offsets(len(layers))

    def _layers(self, block_id: int) -> Numbers:
        """(layers, tokens of the block): the first word of each token's bytes."""
        [pages] = self.memory.blocks.fetch(block_id)
        words: Numbers = pages.view(np.uint64)
        return words.reshape(len(words), self._block_tokens, -1)[:, :, 0]

    def _offsets(self, layers: int) -> Numbers:
        offsets: Numbers = np.arange(layers, dtype=np.uint64)[:, None] + np.uint64(1000 * (self.rank + 1))
        return offsets
