"""What one router knows of its replicas, in columns: the newest reports, and what it has itself sent since.

    report taken                       now
        |----- sent, ended here ------->|        running + waiting at the report, + sent - ended since: ``requests``

A report includes what other routers sent until then; the router's own counts know what happened a moment ago. A replica
whose report is older than STALE_AFTER_S is not ``fresh``. One that failed is left out for a while, longer each time,
and gets a single request when that is over: it is taken back when it answers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memory_agent.reports import PressureLevel

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

STALE_AFTER_S = 3.0
_LEFT_OUT_S = 1.0
_LEFT_OUT_MOST_S = 60.0


class ReplicaReport(Protocol):
    """Of a replica in a pressure view: ``cluster.cluster_view.EnginePressure`` is one."""

    @property
    def level(self) -> PressureLevel: ...
    @property
    def kv_usage(self) -> float: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def age_s(self) -> float: ...
    @property
    def kv_tokens(self) -> int: ...
    @property
    def kv_share_tokens(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...


class FleetView:
    """The replicas of one model. Rows keep their place as long as the ids stay. Used by one thread.

    Attributes:
        ids: one a row; index: the row of an id.
        seen_s: when the report was taken, on the caller's clock; minus infinity before the first.
        level, running, waiting: as reported; kv_used: tokens, likewise; kv_tokens: that the replica can hold, with what
            others have on loan from it; active: most requests that it runs at once, 0 where it has not told.
        in_flight: requests that this router has sent and that have not ended.
        pending_tokens: of prompts among these, without what is in a prefix cache, until their first token.
        changed: sent less ended since the report.
        closed: replicas that are to get no requests: they drain, or have not started yet.
    """

    def __init__(self, ids: Sequence[str] = ()) -> None:
        self.ids: list[str] = []
        self.index: dict[str, int] = {}
        self._grow(0)
        self.keep(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, ids: Sequence[str]) -> None:
        """These are the replicas now; what is known of those that stay is kept."""
        if list(ids) == self.ids:
            return
        rows = np.array([self.index.get(one, -1) for one in ids], dtype=np.int64)
        old = {name: column for name, column in vars(self).items() if isinstance(column, np.ndarray)}
        self.ids = list(ids)
        self.index = {one: row for row, one in enumerate(self.ids)}
        self._grow(len(self.ids))
        for name, column in old.items():
            vars(self)[name][rows >= 0] = column[rows[rows >= 0]]

    def take(self, reports: Mapping[str, ReplicaReport], now_s: float) -> None:
        """Newer reports; those of unknown replicas are passed over, as are those no newer than what is known."""
        rows, values = [], []
        for one, report in reports.items():
            row = self.index.get(one)
            if row is not None and now_s - report.age_s > self.seen_s[row]:
                rows.append(row)
                values.append(
                    (
                        now_s - report.age_s,
                        int(report.level),
                        report.running,
                        report.waiting,
                        max(report.kv_tokens, report.kv_share_tokens),
                        report.kv_usage * report.kv_tokens,
                        report.max_num_seqs,
                    )
                )
        if rows:
            columns = (self.seen_s, self.level, self.running, self.waiting, self.kv_tokens, self.kv_used, self.active)
            for column, new in zip(columns, np.array(values).T, strict=True):
                column[rows] = new
            self.changed[rows] = 0.0

    def sent(self, row: int, tokens: int) -> None:
        """A request with ``tokens`` to compute went to the replica."""
        self.in_flight[row] += 1
        self.changed[row] += 1
        self.pending_tokens[row] += tokens
        self._on_trial[row] += self._failures[row] > 0

    def first_token(self, row: int, tokens: int) -> None:
        """Its prompt is computed; ``tokens`` as in ``sent``."""
        self.pending_tokens[row] = max(0.0, self.pending_tokens[row] - tokens)
        self._failures[row] = self._on_trial[row] = 0
        self._back_s[row] = -math.inf

    def ended(self, row: int, tokens: int = 0) -> None:
        """It is over; ``tokens`` as in ``sent`` where it had no first token."""
        self.in_flight[row] = max(0.0, self.in_flight[row] - 1)
        self.changed[row] -= 1
        self.pending_tokens[row] = max(0.0, self.pending_tokens[row] - tokens)
        if tokens:
            self._on_trial[row] = max(0.0, self._on_trial[row] - 1)

    def failed(self, row: int, now_s: float) -> None:
        """The replica refused a connection, or did not answer in time: it is left out for a while. What else fails in
        that while was sent before, and does not make it longer."""
        if now_s < self._back_s[row]:
            return
        self._failures[row] += 1
        self._on_trial[row] = 0
        self._back_s[row] = now_s + min(_LEFT_OUT_S * 2.0 ** (self._failures[row] - 1), _LEFT_OUT_MOST_S)

    def answers(self, row: int) -> None:
        """The replica answers again, though no request has shown yet that it works: its trial begins."""
        self._back_s[row] = -math.inf

    def left_out(self, now_s: float) -> Bools:
        """Replicas that get no request now: closed ones, and those that failed. One whose time is over is on trial,
        with one request at a time, until a first token comes."""
        return (now_s < self._back_s) | (self._on_trial > 0) | self.closed

    def fresh(self, now_s: float) -> Bools:
        """Replicas with a recent report."""
        return now_s - self.seen_s <= STALE_AFTER_S

    @property
    def requests(self) -> Floats:
        """Running and waiting, as far as it is known; at least those in flight from here."""
        return np.maximum(self.running + self.waiting + self.changed, self.in_flight)

    def _grow(self, rows: int) -> None:
        self.seen_s = np.full(rows, -math.inf)
        self.level: npt.NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self.running, self.waiting = np.zeros(rows), np.zeros(rows)
        self.kv_tokens, self.kv_used, self.active = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self.in_flight, self.changed, self.pending_tokens = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self.closed: Bools = np.zeros(rows, dtype=bool)
        self._failures, self._on_trial, self._back_s = np.zeros(rows), np.zeros(rows), np.full(rows, -math.inf)
