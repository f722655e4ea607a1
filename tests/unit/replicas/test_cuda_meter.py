"""What steps on a GPU are measured and charged by. Torch's pool is played by a fake that keeps segments as torch does;
the segments and the chunks under them are real ones over a driver in Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from memory_agent.chunks import ChunkOwner, ChunkPool
from memory_agent.cuda_allocator import Segments
from memory_agent.cuda_vmm import CudaVmm
from replicas import cuda_meter
from replicas.activation_ledger import ActivationSample
from replicas.cuda_meter import CudaMeter
from tests.unit.memory_agent.fake_cuda_driver import FakeCudaDriver, Result

CHUNK = 4096


class FakeAllocator:
    """As CudaAllocator: inside the pool torch asks for segments, reuses those it has kept, and drops them at a trim."""

    def __init__(self, vmm: CudaVmm, pool: ChunkPool) -> None:
        self.segments = Segments(vmm, pool)
        self.open = False
        self.trims = 0
        self._kept: list[tuple[int, int]] = []  # (chunks, address) that no tensor uses
        self._alive: list[int] = []

    @contextmanager
    def activation_pool(self) -> Iterator[None]:
        self.open = True
        yield
        self.open = False

    def trim(self) -> int:
        assert not self.open
        self.trims += 1
        self._kept.clear()
        return self.segments.keep(self._alive)

    def forward(self, *tensors: int, stays: int = 0) -> None:
        """Tensors of so many chunks, all alive at once and then freed, and one of ``stays`` chunks that is not."""
        assert self.open
        used = []
        for chunks in tensors:
            fit = min((kept for kept in self._kept if kept[0] >= chunks), default=None)
            if fit is not None:
                self._kept.remove(fit)
            used.append(fit or (chunks, self.segments.allocate(chunks * CHUNK)))
        self._kept += used
        if stays:
            self._alive.append(self.segments.allocate(stays * CHUNK))


class World:
    def __init__(self) -> None:
        self.driver = FakeCudaDriver(CHUNK, 200 * CHUNK)
        vmm = CudaVmm(driver=self.driver)
        self.pool = ChunkPool(vmm, CHUNK, limit_chunks=200)
        self.torch = FakeAllocator(vmm, self.pool)
        self.meter = CudaMeter(self.torch, self.pool)  # type: ignore[arg-type]  # it is used as CudaAllocator is
        self.step(1, 1, stays=2)  # the very first teaches nothing
        self.samples: list[ActivationSample] = []

    def step(
        self,
        tokens: int,
        *tensors: int,
        rows: int = 1,
        keep: int = 0,
        charged: int = 0,
        stays: int = 0,
        inputs: tuple[int, ...] = (),
    ) -> None:
        """One step of the worker: the one before it is settled, ``charged`` chunks are what it may take. vLLM makes its
        inputs before it calls the connector."""
        self.samples = self.meter.finish_step(keep * CHUNK)
        self.meter.make_room(tokens, rows, charged * CHUNK)
        self.found = self.held
        with self.meter.step():
            self.torch.forward(*inputs)
            self.meter.start_step(tokens, rows)
            self.torch.forward(*tensors, stays=stays)

    @property
    def held(self) -> int:
        """Chunks of activations, by the driver."""
        assert self.driver.held == self.pool.held_bytes
        return self.pool.bytes_by_owner()[ChunkOwner.ACTIVATION] // CHUNK


@pytest.fixture
def world() -> World:
    return World()


def test_a_step_is_measured_by_its_chunks(world: World) -> None:
    """Its peak is what it took of a trimmed pool, tensors that outlive it aside."""
    world.step(10, 5, 3)
    world.step(10, 5, 3, charged=8)
    assert world.samples == [ActivationSample(10, 1, 8 * CHUNK, 8 * CHUNK)]


def test_inputs_are_the_steps_own(world: World) -> None:
    """They are allocated before the connector hears of the forward, and hide no peak."""
    world.step(10, 5, 3, inputs=(1,))
    world.step(10, 5, 3, inputs=(1,), charged=9)
    assert world.samples == [ActivationSample(10, 1, 9 * CHUNK, 9 * CHUNK)]
    world.step(10, 5, 3, inputs=(1,), charged=9)
    assert world.samples == [ActivationSample(10, 1, None, 9 * CHUNK)] and world.torch.trims == 1


def test_a_step_that_finds_memory_shows_no_peak(world: World) -> None:
    """It reuses what the one before has left, so what it takes cannot be told; what is kept can."""
    world.step(10, 5, 3)
    world.step(8, 4, 2, charged=8)
    world.step(8, 4, 2, charged=8)
    assert world.samples == [ActivationSample(8, 1, None, 8 * CHUNK)]
    assert world.held == 2 + 8 and world.torch.trims == 1, "the trim of the very first step alone"


def test_a_larger_step_starts_with_a_trimmed_pool(world: World) -> None:
    """What a smaller step has left would come on top of what the larger one takes."""
    world.step(10, 5, 3)
    world.step(20, 16, charged=40)
    assert (world.found, world.held) == (2, 2 + 16)
    world.step(5, 2, rows=4, charged=40)
    assert world.found == 2, "more requests, which sample, are a larger step as well"


def test_a_step_that_is_charged_for_less_than_is_kept_gives_it_back(world: World) -> None:
    """Before KV memory moves, so that the chunks can be its own: the driver has them."""
    world.step(20, 16)
    world.step(4, 2, charged=3)
    assert (world.found, world.held) == (2, 2 + 2)
    assert world.driver.held == 4 * CHUNK


def test_what_may_be_kept_comes_on_top_of_the_charge(world: World) -> None:
    """Kept segments stay while they are within keep_bytes, whatever the size of the next step."""
    world.step(10, 5, 3)
    world.step(20, 16, keep=8, charged=16)
    assert world.torch.trims == 1
    world.step(4, 2, keep=8, charged=3)
    assert world.torch.trims == 2 and world.found == 2


def test_rest_gives_everything_back_but_what_stays(world: World) -> None:
    """After it only tensors that outlive their step are held; what stays is in no later measurement."""
    world.step(10, 5, 3, stays=4)
    world.meter.finish_step()
    world.meter.rest()
    assert world.held == 2 + 4
    world.step(10, 5)
    world.step(10, 5)
    assert world.samples == [ActivationSample(10, 1, 5 * CHUNK, 5 * CHUNK)]


def test_a_driver_that_refuses_a_release_delays_it(world: World) -> None:
    """The chunk stays with the pool, free for others, and goes with the next trim; the worker lives on."""
    world.step(10, 5)
    world.driver.fail_at("cuMemRelease", 1, Result.CUDA_ERROR_OUT_OF_MEMORY)
    world.meter.finish_step()
    with patch.object(cuda_meter.logger, "warning") as told:
        world.meter.rest()
    assert told.call_count == 1 and world.pool.bytes_by_owner()[ChunkOwner.FREE] == CHUNK
    world.meter.rest()
    assert world.driver.held == 2 * CHUNK


def test_steps_without_a_forward_measure_nothing(world: World) -> None:
    """An engine that only moves memory leaves the last measurement alone."""
    world.step(10, 5)
    world.step(0)
    assert len(world.samples) == 1
    world.step(10, 5, charged=9)
    assert world.samples == []


def test_without_a_charge_torch_keeps_its_own_pool() -> None:
    """Nothing is measured or routed; a rest empties torch's cache."""
    meter = CudaMeter(None, ChunkPool(CudaVmm(driver=FakeCudaDriver(CHUNK, CHUNK)), CHUNK, 1))
    meter.start_step(10, 1)
    with meter.step():
        assert meter.finish_step(0) == []
    meter.make_room(20, 1, 0)
    with patch.object(torch.cuda, "empty_cache") as empty_cache:
        meter.rest()
    empty_cache.assert_called_once_with()
