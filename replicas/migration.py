"""Both sides of migrations at one engine's scheduler: orders, the steps' copies, and the answers.

replica --PushOrder--> order --> before_step ... take --> workers --> on_reports --> after_step --PushAnswer-->
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from replicas.host_moves import HostCopy
from replicas.kv_arrivals import KvArrivals, Load
from replicas.kv_push import KvPush
from replicas.migration_words import ANSWER_PARAM, MOVED_PARAM, PushAnswer, PushOrder

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass
class MigrationWork:
    """Copies of one step, on every rank: ``release`` and ``store`` before blocks are written anew, then ``load``.
    ``move``: which migration the stores are of."""

    sequence: int = 0
    move: str = ""
    release: list[int] = field(default_factory=list)
    store: list[HostCopy] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)


@dataclass
class MigrationReport:
    """One worker's answer: keys that it could not send, or has not found whole."""

    sequence: int
    unsent: list[bytes] = field(default_factory=list)
    unloaded: list[bytes] = field(default_factory=list)


@dataclass
class _Asked:
    command: "Request"
    order: PushOrder
    error: str | None


class Migration:
    """Lives in the scheduler's process; not thread-safe.

    Args:
        ranks: workers that copy.
    """

    def __init__(self, push: KvPush, arrivals: KvArrivals, ranks: int) -> None:
        self.push = push
        self.arrivals = arrivals
        self._ranks = ranks
        self._orders: list[_Asked] = []
        self._flights: dict[int, tuple[MigrationWork, list[MigrationReport]]] = {}
        self._sequence = 0

    def order(self, command: "Request", order: PushOrder) -> None:
        """An order has come, as a request that is answered when its round is done."""
        self._orders.append(_Asked(command, order, self.push.order(order)))

    def before_step(self, requests: Mapping[str, "Request"], block_ids: Callable[[str], Sequence[int]]) -> None:
        """vLLM is about to schedule."""
        self.arrivals.expire()
        request_id = self.push.request_id
        if request_id is not None and (request := requests.get(request_id)) is not None:
            self.push.plan(request, block_ids(request_id))

    def take(self) -> MigrationWork:
        """The copies of this step; they are in flight until every rank has answered."""
        release, store = self.push.take()
        work = MigrationWork(0, self.push.name, release, store, self.arrivals.take())
        if work.release or work.store or work.load:
            self._sequence += 1
            work.sequence = self._sequence
            self._flights[work.sequence] = (work, [])
        return work

    def on_reports(self, reports: Iterable[MigrationReport]) -> None:
        """Answers of workers."""
        for report in reports:
            work, answers = self._flights[report.sequence]
            answers.append(report)
            if len(answers) == self._ranks:
                del self._flights[report.sequence]
                self.push.landed(work.move, work.store, {key for answer in answers for key in answer.unsent})
                self.arrivals.landed(work.load, {key for answer in answers for key in answer.unloaded})

    def after_step(
        self,
        outputs: dict[int, EngineCoreOutputs],
        requests: Mapping[str, "Request"],
        block_ids: Callable[[str], Sequence[int]],
        stop: Callable[[str], object],
    ) -> None:
        """A step's tokens are in ``outputs``: answer the orders, and let the request go that is to be switched.

        stop: ends a request at once.
        """
        waiting = []
        for asked in self._orders:
            request = requests.get(asked.order.request_id)
            answer = self._answer(asked, request, outputs, block_ids, stop)
            if answer is None:
                waiting.append(asked)
                continue
            _put(outputs, asked.command, {ANSWER_PARAM: asdict(answer)}, FinishReason.STOP)
        self._orders = waiting

    def clear(self) -> None:
        """Forget every block: the same tokens would have other KV from now on."""
        self.push.end()
        self.arrivals.clear()

    @property
    def busy(self) -> bool:
        """There is something for a step to do."""
        return bool(self._orders or self._flights) or self.push.busy

    def _answer(
        self,
        asked: _Asked,
        request: "Request | None",
        outputs: dict[int, EngineCoreOutputs],
        block_ids: Callable[[str], Sequence[int]],
        stop: Callable[[str], object],
    ) -> PushAnswer | None:
        order = asked.order
        if asked.error is not None or order.end:
            return PushAnswer(error=asked.error)
        if not order.switch:
            return self.push.answer(order, request)
        moved = self.push.stop(order, request, block_ids(order.request_id) if request is not None else ())
        if isinstance(moved, str):
            return PushAnswer(error=moved)
        assert request is not None
        stop(order.request_id)
        _put(outputs, request, {MOVED_PARAM: asdict(moved)}, FinishReason.ABORT)
        return PushAnswer(origin=moved.origin)


def _put(
    outputs: dict[int, EngineCoreOutputs],
    request: "Request",
    params: dict[str, object],
    reason: FinishReason,
) -> None:
    """End ``request`` with its output of this step, or with one of its own."""
    of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
    mine = next((one for one in of_client.outputs if one.request_id == request.request_id), None)
    if mine is None:
        mine = EngineCoreOutput(request.request_id, [])
        of_client.outputs.append(mine)
    mine.finish_reason, mine.kv_transfer_params = reason, params
