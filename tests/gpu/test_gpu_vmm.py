"""CudaVmm on the real driver: what the fake one in tests/unit only claims."""

import os
import random
from multiprocessing.reduction import send_handle

import pytest
import torch
from gpu_memory import Child, churn, leave_a_pattern, read_and_stamp, touch_nothing, view

from memory_agent.chunks import ChunkOwner, ChunkPool
from memory_agent.cuda_vmm import CudaVmm
from memory_agent.errors import OutOfDeviceMemory
from memory_agent.fake_vmm import FakeVmm
from memory_agent.vmm import ChunkHandle, ContractViolation


def mapped(vmm: CudaVmm, chunks: int = 1) -> tuple[int, list[ChunkHandle]]:
    size = vmm.granularity_bytes
    address, handles = vmm.reserve(chunks * size), [vmm.create(size) for _ in range(chunks)]
    for at, handle in enumerate(handles):
        vmm.map(address + at * size, handle)
    return address, handles


def test_kernels_read_and_write_across_chunks(vmm: CudaVmm) -> None:
    """Chunks mapped side by side are one tensor to torch, cleared at first."""
    size = 3 * vmm.granularity_bytes
    address, _ = mapped(vmm, 3)
    tensor = view(address, (size,))
    assert not tensor.any()
    tensor.copy_(torch.arange(size, device="cuda") % 251)
    assert torch.equal(tensor.cpu(), (torch.arange(size) % 251).to(torch.uint8))


def test_data_moves_with_its_chunk(vmm: CudaVmm) -> None:
    """A chunk keeps its data while it is unmapped, and shows it at its next address."""
    size = vmm.granularity_bytes
    address, (handle,) = mapped(vmm)
    view(address, (size,)).fill_(7)
    vmm.unmap(address, size)
    there = vmm.reserve(2 * size)
    vmm.map(there + size, handle)
    assert int(view(there + size, (size,)).sum(dtype=torch.int64)) == 7 * size


def test_unmap_waits_for_kernels_that_are_queued(vmm: CudaVmm) -> None:
    """Work queued on another stream before an unmap has written everything when the chunk is mapped again."""
    size = vmm.granularity_bytes
    address, (handle,) = mapped(vmm)
    tensor = view(address, (size,))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        tensor.fill_(5)
    vmm.unmap(address, size)
    vmm.map(address, handle)
    assert int(tensor.sum(dtype=torch.int64)) == 5 * size


def test_held_bytes_are_what_the_device_has_less(vmm: CudaVmm) -> None:
    """create takes its bytes from the device and release brings them back, at once."""
    vmm.release(vmm.create(vmm.granularity_bytes))
    before, _ = vmm.device_bytes()
    handles = [vmm.create(vmm.granularity_bytes) for _ in range(256)]
    taken = before - vmm.device_bytes()[0]
    assert vmm.held_bytes() == 256 * vmm.granularity_bytes
    assert vmm.held_bytes() <= taken <= 1.05 * vmm.held_bytes()
    for handle in handles:
        vmm.release(handle)
    assert before - vmm.device_bytes()[0] <= 0.05 * taken


def test_nothing_leaks_over_many_rounds(vmm: CudaVmm) -> None:
    """After 200 rounds of all calls, the device has the memory that it had after the first ten."""
    size = vmm.granularity_bytes
    free = []
    for _ in range(210):
        address, handles = mapped(vmm, 4)
        for at, handle in enumerate(handles):
            vmm.unmap(address + at * size, size)
            vmm.release(handle)
        vmm.free(address, 4 * size)
        free.append(vmm.device_bytes()[0])
    assert free[9] - free[-1] < 4 * size


def test_close_gives_back_what_is_mapped() -> None:
    """A backend closed with chunks mapped leaves the device as it found it."""
    CudaVmm().close()
    watcher = CudaVmm()
    before, _ = watcher.device_bytes()
    backend = CudaVmm()
    mapped(backend, 128)
    assert before - watcher.device_bytes()[0] >= 128 * backend.granularity_bytes
    backend.close()
    assert before - watcher.device_bytes()[0] < 8 * watcher.granularity_bytes
    watcher.close()


def test_a_full_device_refuses_and_recovers(vmm: CudaVmm) -> None:
    """More than the device has is OutOfDeviceMemory with nothing held, and a small chunk still works after it."""
    _, total = vmm.device_bytes()
    with pytest.raises(OutOfDeviceMemory, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        vmm.create(total // vmm.granularity_bytes * vmm.granularity_bytes)
    assert vmm.held_bytes() == 0
    mapped(vmm)


def test_a_pool_that_meets_a_full_device_undoes_its_take(vmm: CudaVmm) -> None:
    """ChunkPool.take is all or nothing where the device, not the limit, is the bound."""
    free, _ = vmm.device_bytes()
    chunk = free // 4 // vmm.granularity_bytes * vmm.granularity_bytes
    pool = ChunkPool(vmm, chunk, limit_chunks=100)
    with pytest.raises(OutOfDeviceMemory):
        pool.take(ChunkOwner.KV_CACHE, 6)
    pool.check_conservation()
    assert vmm.held_bytes() == 0


def test_another_tenant_gets_cleared_memory(vmm: CudaVmm) -> None:
    """What another process wrote into memory that it released is not to be read in new chunks."""
    chunks = 512
    with Child(leave_a_pattern, chunks) as child:
        assert child.answer() == 0
        address, _ = mapped(vmm, chunks)
        assert not view(address, (chunks * vmm.granularity_bytes,)).any()


def test_a_chunk_is_shared_with_another_process(vmm: CudaVmm) -> None:
    """An exported chunk is the same memory there: it reads ours, we read its."""
    size = vmm.granularity_bytes
    address, (handle,) = mapped(vmm)
    view(address, (size,)).fill_(3)
    torch.cuda.synchronize()
    fd = vmm.export_fd(handle)
    with Child(read_and_stamp, size) as child:
        send_handle(child.connection, fd, child.process.pid)
        os.close(fd)
        assert child.answer() == (3 * size, 0)
        assert child.answer() == "stamped"
        assert int(view(address, (size,)).sum(dtype=torch.int64)) == 9 * size


def test_computing_beside_a_process_that_maps_and_unmaps(vmm: CudaVmm) -> None:
    """Results stay right, bit for bit, while another process takes memory and gives it back all the time."""
    side = 2048
    tensor = view(mapped(vmm, 8)[0], (side, side), torch.float32)
    tensor.copy_(torch.randn(side, side, device="cuda"))
    expected = tensor @ tensor
    with Child(churn) as child:
        assert child.answer() == "running"
        assert all(torch.equal(tensor @ tensor, expected) for _ in range(500))
        child.connection.send("stop")
        assert child.answer() > 0


def test_mapping_beside_kernels_that_run(vmm: CudaVmm) -> None:
    """Chunks come and go while kernels of this process use others; those see no change."""
    size, side = vmm.granularity_bytes, 1024
    tensor = view(mapped(vmm, 2)[0], (side, side), torch.float32)
    tensor.copy_(torch.randn(side, side, device="cuda"))
    expected = tensor @ tensor
    address = vmm.reserve(size)
    for _ in range(100):
        products = [tensor @ tensor for _ in range(8)]
        handle = vmm.create(size)
        vmm.map(address, handle)
        view(address, (size,)).fill_(1)
        vmm.unmap(address, size)
        vmm.release(handle)
        assert all(torch.equal(product, expected) for product in products)


def test_a_touch_without_memory_kills(vmm: CudaVmm) -> None:
    """Reading a reserved address without a chunk is an error of that process, and never zeros."""
    with Child(touch_nothing) as child:
        assert child.answer() == "touching"
        assert child.exit_code() not in (0, None)


def test_the_driver_and_the_fake_agree(vmm: CudaVmm) -> None:
    """A random walk of right and wrong calls does the same on the device and on FakeVmm."""
    size, rng = vmm.granularity_bytes, random.Random(1)
    fake = FakeVmm(size, 64 * size)
    backends = (vmm, fake)
    bases = [backend.reserve(16 * size) for backend in backends]
    chunks: list[tuple[ChunkHandle, ...]] = []
    for _ in range(2000):
        call, at, slot = rng.choice(("create", "release", "map", "unmap")), rng.randrange(20), rng.randrange(17)
        outcomes = []
        for side, backend in enumerate(backends):
            try:
                if call == "create":
                    outcomes.append(backend.create(size) if len(chunks) < 32 else None)
                elif call == "unmap":
                    outcomes.append(backend.unmap(bases[side] + slot * size, size))
                elif at < len(chunks) and call == "map":
                    outcomes.append(backend.map(bases[side] + slot * size, chunks[at][side]))
                elif at < len(chunks):
                    outcomes.append(backend.release(chunks[at][side]))
            except ContractViolation:
                outcomes.append("violation")
        if call == "create" and len(chunks) < 32:
            chunks.append(tuple(outcomes))
        elif outcomes:
            assert outcomes[0] == outcomes[1]
            if call == "release" and outcomes == [None, None]:
                chunks.pop(at)
        assert vmm.held_bytes() == fake.held_bytes()
