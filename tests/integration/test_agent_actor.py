"""Agent and controller as actors of a real Ray cluster, with processes that follow their leases with real memory."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from cluster.controller import Controller, ensure_controller
from cluster.crossing import Crossing, CrossingError
from cluster.target_planner import TargetSettings
from memory_agent.agent import AgentSpec, Registration, agent_name, board_path, ensure_agent
from memory_agent.agent_calls import AgentCalls
from memory_agent.errors import SettingsError
from memory_agent.host_segment import HostSegment
from memory_agent.lease_board import LIMIT_UNIT_BYTES, MAX_ROWS, EngineWord, LeaseBoard, ReplicaWord, Row
from memory_agent.processes import file_bytes
from memory_agent.reports import DeviceReport, EngineReport, PressureLevel
from memory_agent.staging import segment_path, staging_origin
from tests.integration.fake_engine import FLOOR_BYTES

UNIT = LIMIT_UNIT_BYTES
BUDGET = 2048 * UNIT
GUARANTEE = 128 * UNIT
FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
TIMEOUT_S = 40.0

T = TypeVar("T")


SETTINGS = TargetSettings(token_budget_max=512, active_max=16, batch_sizing=False)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """The cluster this process is connected to, or one of its own that leaves nothing behind."""
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_AUTH_MODE"] = "disabled"
    temp = tempfile.mkdtemp(prefix="ellm-t-")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        _temp_dir=temp,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)


class Device:
    """An agent of its own on this node, and the engines on its board."""

    def __init__(self) -> None:
        self.spec = AgentSpec(uuid.uuid4().hex[:8], f"test-{uuid.uuid4().hex[:6]}", BUDGET, weights_bytes=7 * MAX_ROWS)
        self.agent: Any = ensure_agent(self.spec)
        self.engines: dict[str, subprocess.Popen[str]] = {}

    def register(self, engine_id: str, **values: Any) -> Registration:
        terms = {"model": "m", "guarantee_bytes": GUARANTEE, "ceiling_bytes": BUDGET, "weights_bytes": 7}
        terms |= {"registrar_pid": os.getpid()} | values
        registration: Registration = ray.get(
            self.agent.register.remote(engine_id=engine_id, **terms), timeout=TIMEOUT_S
        )
        return registration

    def start(self, engine_id: str) -> Row:
        """Register an engine, start its process, and wait until it is live."""
        registration = self.register(engine_id)
        command = [sys.executable, str(FAKE_ENGINE), registration.board_path, str(registration.row)]
        self.engines[engine_id] = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        eventually(lambda: self.engine(engine_id).state == "LIVE")
        return LeaseBoard.open(registration.board_path).row(registration.row)

    def demand(self, engine_id: str, demand_bytes: int) -> None:
        stdin = self.engines[engine_id].stdin
        assert stdin is not None
        stdin.write(f"demand {demand_bytes}\n")
        stdin.flush()

    def report(self) -> DeviceReport:
        report: DeviceReport = ray.get(self.agent.report.remote(), timeout=TIMEOUT_S)
        return report

    def engine(self, engine_id: str) -> EngineReport:
        return next(engine for engine in self.report().engines if engine.engine_id == engine_id)

    def close(self) -> None:
        for process in self.engines.values():
            process.kill()
            process.wait()
        ray.kill(self.agent, no_restart=True)
        board_path(self.spec).unlink(missing_ok=True)


@pytest.fixture
def device(ray_cluster: None) -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


@pytest.fixture
def controller(ray_cluster: None) -> Any:
    return ensure_controller(SETTINGS)


def eventually(condition: Callable[[], T], timeout_s: float = TIMEOUT_S) -> T:
    """The first truthy value of ``condition``; an AssertionError where there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def kill_actor(actor: Any) -> int:
    """SIGKILL the actor's process; its former pid."""
    pid: int = ray.get(pid_of(actor), timeout=TIMEOUT_S)
    os.kill(pid, signal.SIGKILL)
    return pid


def pid_of(actor: Any) -> Any:
    return actor.__ray_call__.remote(lambda _: os.getpid())


class MemorySampler:
    """Samples what the operating system says all engines hold together, at 100 Hz, while a test runs."""

    def __init__(self, rows: list[Row]) -> None:
        self._files = [row.workers[0] for row in rows]
        self.sums: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.01):
            self.sums.append(sum(file_bytes(pid, fd) for pid, fd in self._files))


def test_one_engine_borrows_and_gives_back_inside_the_budget(device: Device) -> None:
    """One engine exceeds 70 % of the budget while the other idles, gives it back on demand, and at no sampled moment do
    both hold more than the budget, by the operating system's numbers."""
    rows = [device.start("a"), device.start("b")]
    with MemorySampler(rows) as sampler:
        for greedy, other in (("a", "b"), ("b", "a"), ("a", "b")):
            device.demand(other, 0)
            device.demand(greedy, 2 * BUDGET)
            eventually(lambda name=greedy: device.engine(name).held_bytes_os > 0.7 * BUDGET)  # type: ignore[misc]
        device.demand("b", 2 * BUDGET)
        eventually(lambda: [engine.held_bytes_os for engine in device.report().engines] == [BUDGET // 2, BUDGET // 2])
    assert max(sampler.sums) <= BUDGET
    assert max(sampler.sums) > 0.9 * BUDGET
    assert len(sampler.sums) > 20


def test_registering_is_idempotent_and_refusals_cross_processes(device: Device) -> None:
    """The same engine gets the same row; what cannot fit comes back as a SettingsError with the numbers."""
    first = device.register("a")
    assert device.register("a") == first
    assert first.board_path == str(board_path(device.spec))
    with pytest.raises(SettingsError, match=f"budget of the device is {BUDGET}"):
        device.register("b", guarantee_bytes=BUDGET)
    with pytest.raises(SettingsError, match=f"{GUARANTEE} bytes or more"):
        ray.get(device.agent.set_budget.remote(GUARANTEE - 1), timeout=TIMEOUT_S)
    assert len(device.report().engines) == 1


def test_one_agent_per_device(device: Device) -> None:
    """Asking again for a device's agent finds the one that runs."""
    assert ray.get(pid_of(ensure_agent(device.spec))) == ray.get(pid_of(device.agent))


def test_newcomer_waits_for_its_guarantee(device: Device) -> None:
    """Registering returns once the bytes that were lent out have really come back, with the guarantee as limit."""
    row = device.start("a")
    device.demand("a", 2 * BUDGET)
    eventually(lambda: device.engine("a").held_bytes_os == BUDGET)
    with MemorySampler([row]) as sampler:
        device.register("b", guarantee_bytes=512 * UNIT)
        assert device.engine("b").limit_bytes == 512 * UNIT
        assert device.engine("a").held_bytes_os <= BUDGET - 512 * UNIT
    assert max(sampler.sums) <= BUDGET


def test_dead_engine_is_noticed_and_a_stopped_one_is_not_dead(device: Device) -> None:
    """A stopped engine keeps its lease; after SIGKILL its row is free, it is counted, and the other gets its bytes."""
    device.start("a")
    device.start("b")
    device.demand("a", 2 * BUDGET)
    eventually(lambda: device.engine("a").held_bytes_os == BUDGET - FLOOR_BYTES)
    device.engines["a"].send_signal(signal.SIGSTOP)
    device.demand("b", 2 * BUDGET)
    # The agent has understood that b wants more, and leaves a, which says nothing, its bytes.
    eventually(lambda: device.engine("a").limit_bytes == BUDGET // 2)
    assert (device.engine("a").state, device.engine("a").held_bytes_os) == ("LIVE", BUDGET - FLOOR_BYTES)
    assert device.engine("b").limit_bytes == FLOOR_BYTES
    device.engines["a"].kill()
    eventually(lambda: [engine.engine_id for engine in device.report().engines] == ["b"])
    eventually(lambda: device.engine("b").held_bytes_os == BUDGET)
    assert device.report().dead_engines == 1


def test_killed_agent_comes_back_with_everything(device: Device) -> None:
    """While the agent is away engines go on; it returns as another process with rows, leases and budget."""
    rows = {name: device.start(name) for name in ("a", "b")}
    ray.get(device.agent.set_budget.remote(BUDGET // 2), timeout=TIMEOUT_S)
    eventually(lambda: [engine.limit_bytes for engine in device.report().engines] == [BUDGET // 4, BUDGET // 4])
    leases = {name: row.lease for name, row in rows.items()}
    steps = {name: row.get(EngineWord.STEPS) for name, row in rows.items()}
    with MemorySampler(list(rows.values())) as sampler:
        before = kill_actor(device.agent)
        eventually(lambda: all(row.get(EngineWord.STEPS) > steps[name] + 5 for name, row in rows.items()))
        report = device.report()
        assert report.agent_pid != before
        assert report.budget_bytes == BUDGET // 2
        assert {engine.engine_id: engine.limit_bytes for engine in report.engines} == {
            name: lease.limit_bytes for name, lease in leases.items()
        }
        device.demand("a", 2 * BUDGET)
        eventually(lambda: device.engine("a").held_bytes_os == BUDGET // 2 - FLOOR_BYTES)
        device.engines["b"].kill()
        eventually(lambda: device.engine("a").held_bytes_os == BUDGET // 2)
    assert rows["a"].lease.revision > leases["a"].revision
    assert device.report().dead_engines == 1
    assert max(sampler.sums) <= BUDGET // 2


def test_engine_that_dies_while_the_agent_is_away(device: Device) -> None:
    """An exit that nobody watched is found from the board after the restart."""
    device.start("a")
    kill_actor(device.agent)
    device.engines["a"].kill()
    device.engines["a"].wait()
    eventually(lambda: device.report().engines == ())
    assert device.report().dead_engines == 1


def devices_of(controller: Any, device: Device) -> list[dict[str, Any]]:
    """This test's device in the controller's snapshot, as a list of none or one."""
    nodes = ray.get(controller.snapshot.remote(), timeout=TIMEOUT_S)["nodes"]
    return [one for node in nodes for one in node["devices"] if one["device"] == device.spec.device]


def test_reports_reach_the_controller(device: Device, controller: Any) -> None:
    """The snapshot shows the device with memory by owner, and the engine has a target."""
    device.start("a")
    device.demand("a", 300 * UNIT)
    eventually(lambda: [one["memory"]["kv_used_bytes"] for one in devices_of(controller, device)] == [300 * UNIT])
    (shown,) = devices_of(controller, device)
    assert (shown["memory"]["free_bytes"], shown["memory"]["weights_bytes"]) == (BUDGET - 300 * UNIT, 7)
    assert ray.get(controller.target_for.remote("a"), timeout=TIMEOUT_S).revision > 0
    assert ray.get(controller.target_for.remote("nobody"), timeout=TIMEOUT_S) is None


def test_pressure_reaches_a_watcher(device: Device, controller: Any) -> None:
    """A long poll returns CRITICAL for an engine that wants more than it can get, and NORMAL again afterwards."""
    device.start("a")
    device.start("b")
    for demand, level in ((2 * BUDGET, PressureLevel.CRITICAL), (0, PressureLevel.NORMAL)):
        device.demand("a", demand)
        revision = 0
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            view = ray.get(controller.watch.remote(revision, 2.0), timeout=TIMEOUT_S)
            revision = view.revision
            if "a" in view.engines and view.engines["a"].level is level:
                break
            assert time.monotonic() < deadline, f"{level.name} was not announced"
        assert view.engines["b"].level is PressureLevel.NORMAL


def test_killed_controller_rebuilds_its_view(device: Device, controller: Any) -> None:
    """After SIGKILL the next reports bring devices and engines back, and targets go on above the replica's revision."""
    row = device.start("a")
    eventually(lambda: device.engine("a").pid and devices_of(controller, device))
    before = eventually(lambda: ray.get(controller.target_for.remote("a"), timeout=TIMEOUT_S)).revision
    row.set(ReplicaWord.TARGET_REVISION, before)
    eventually(lambda: device.engine("a").target_revision == before)
    seen = ray.get(controller.watch.remote(0, 5.0), timeout=TIMEOUT_S)
    kill_actor(controller)
    eventually(lambda: [one["replicas"][0]["engine_id"] for one in devices_of(controller, device)] == ["a"])
    assert ray.get(controller.target_for.remote("a"), timeout=TIMEOUT_S).revision > before
    assert ray.get(controller.watch.remote(seen.revision, 5.0), timeout=TIMEOUT_S).revision > seen.revision


def test_controllers_that_are_started_at_once_are_one(ray_cluster: None) -> None:
    """Whoever asks at the same moment gets the same actor."""
    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(lambda _: ensure_controller(SETTINGS), range(4)))
    lives = ray.get([handle.life.remote() for handle in handles], timeout=TIMEOUT_S)
    assert len(set(lives)) == 1


def test_a_controller_without_the_name_ends(device: Device) -> None:
    """One that another has replaced gives out targets until it learns of that from a report, and then no more: it ends.
    The one with the name goes on."""
    device.start("a")
    old: Any = ray.remote(Controller).options(num_cpus=0).remote(SETTINGS)
    report = device.report()
    ray.get(old.report_device.remote(report), timeout=TIMEOUT_S)
    first = ray.get(old.target_for.remote("a"), timeout=TIMEOUT_S)
    named = ensure_controller(SETTINGS)
    ray.kill(named, no_restart=False)  # so that it began later

    def later_target() -> int:
        target: Any = ray.get(named.target_for.remote("a"), timeout=TIMEOUT_S)
        return target.revision if target is not None and target.revision > first.revision else 0

    later = eventually(later_target)
    engine = replace(report.engines[0], target_revision=later)
    with pytest.raises(RayActorError):
        ray.get(old.report_device.remote(replace(report, sequence=10**6, engines=(engine,))), timeout=TIMEOUT_S)
    with pytest.raises(RayActorError):
        ray.get(old.target_for.remote("a"), timeout=TIMEOUT_S)
    assert ray.get(named.target_for.remote("a"), timeout=TIMEOUT_S).revision == later


def test_a_clock_that_was_set_back_stops_nobody(device: Device, controller: Any) -> None:
    """A revision from the future is that of a former life: who has the name goes on above it."""
    row = device.start("a")
    future = (time.time_ns() // 1_000_000 + 10_000_000) * 4096
    row.set(ReplicaWord.TARGET_REVISION, future)
    eventually(lambda: device.engine("a").target_revision == future)

    def above() -> bool:
        target: Any = ray.get(controller.target_for.remote("a"), timeout=TIMEOUT_S)
        return target is not None and target.revision > future

    eventually(above)


class Courier:
    """Two devices whose agents carry KV blocks from the first's staging memory to the second."""

    BLOCK_BYTES, PLACES = 1 << 20, 24

    def __init__(self, source: Device, destination: Device) -> None:
        node = ray.get_runtime_context().get_node_id()
        self.source, self.destination = source, destination
        self.names = [agent_name(node, device.spec.device) for device in (source, destination)]
        self.origin = staging_origin(board_path(source.spec), 0)
        self.move = uuid.uuid4().hex
        ray.get([device.agent.describe.remote() for device in (source, destination)], timeout=TIMEOUT_S)
        self.segment = HostSegment.create(segment_path(self.origin, 0), self.BLOCK_BYTES, self.PLACES, b"f" * 32)

    def write(self, place: int) -> bytes:
        """A block of which each byte is its place; its key."""
        key = place.to_bytes(32, "big")
        self.segment.write(place, key, [np.full(self.BLOCK_BYTES, place, np.uint8)])
        return key

    async def bring(self, origin: str = "", within_s: float = TIMEOUT_S, until: bytes = b"") -> Path:
        crossing = Crossing(AgentCalls(), *self.names, self.move)
        return Path(await crossing.bring(origin or str(self.origin), within_s, until.hex()))

    def check(self, origin: Path) -> None:
        """All that is staged is there, as it was."""
        with closing(HostSegment.open(segment_path(origin, 0))) as mirror:
            assert mirror.scan() == self.segment.scan()
            room = np.zeros(self.BLOCK_BYTES, np.uint8)
            for key, place in mirror.scan().items():
                assert mirror.read_into(place, key, [room])
                assert (room == place).all()

    @property
    def mirrors(self) -> list[Path]:
        board = board_path(self.destination.spec)
        return list(board.parent.glob(f"{board.stem}-mirror-*"))

    def close(self) -> None:
        self.segment.close()
        for path in (self.segment.path, *self.mirrors):
            path.unlink(missing_ok=True)


@pytest.fixture
def courier(ray_cluster: None) -> Iterator[Courier]:
    devices = Device(), Device()
    courier = Courier(*devices)
    yield courier
    for device in devices:
        device.close()
    courier.close()


def test_agents_carry_kv_blocks_through_ray(courier: Courier) -> None:
    """In several chunks, each once; nothing is left when the migration has ended."""
    for place in range(20):
        courier.write(place)
    courier.check(asyncio.run(courier.bring()))
    courier.write(22)
    courier.check(asyncio.run(courier.bring(until=(22).to_bytes(32, "big"))))
    asyncio.run(AgentCalls()(courier.names[1], "forget", courier.move))
    assert not courier.mirrors


def test_an_agent_gives_out_nothing_but_staging_memory(courier: Courier) -> None:
    board = board_path(courier.source.spec)
    for origin in (str(board), "/etc/passwd", str(board.with_name(f"{board.stem}-host0"))):
        with pytest.raises(CrossingError, match="no staging memory"):
            asyncio.run(courier.bring(origin))


def test_a_fetch_ends_with_either_agent_and_the_next_one_works(courier: Courier) -> None:
    """Killed while the fetch waits for a block. An agent that is started again removes what it had left."""
    courier.write(0)

    async def bring_in_vain(agent: Any) -> None:
        bringing = asyncio.create_task(courier.bring(until=b"x" * 32))
        while not courier.mirrors:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.to_thread(kill_actor, agent)
        with pytest.raises(CrossingError):
            await bringing

    for device in (courier.source, courier.destination):
        asyncio.run(bring_in_vain(device.agent))
        assert ray.get(device.agent.describe.remote(), timeout=TIMEOUT_S)["pid"]
        assert bool(courier.mirrors) == (device is courier.source)
        courier.check(asyncio.run(courier.bring()))


def test_a_fetch_that_nobody_waits_for_ends_too(courier: Courier) -> None:
    """It is cancelled in the agent, which goes on: it would poll the source for as long as it may otherwise."""
    courier.write(0)

    async def give_up() -> None:
        bringing = asyncio.create_task(courier.bring(until=b"x" * 32, within_s=600.0))
        while not courier.mirrors:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        bringing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bringing

    asyncio.run(give_up())

    def fetches() -> bool:
        names = courier.destination.agent.__ray_call__.remote(
            lambda agent: [str(task.get_coro()) for task in asyncio.all_tasks(agent._tasks[0].get_loop())]
        )
        return not any("fetch" in name or "_pull" in name for name in ray.get(names, timeout=TIMEOUT_S))

    eventually(fetches)
    courier.check(asyncio.run(courier.bring()))
