"""Tensors over addresses, and what the tests let other processes do with the device."""

import multiprocessing
import time
from collections.abc import Callable
from math import prod
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch

from memory_agent.chunks import ChunkOwner, ChunkPool
from memory_agent.cuda_allocator import CudaAllocator
from memory_agent.cuda_vmm import CudaVmm

DEVICE = torch.device("cuda", 0)


def view(address: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8, device: Any = DEVICE) -> torch.Tensor:
    """A contiguous tensor over addresses that need no memory yet; the caller keeps them reserved."""
    size_bytes = prod(shape) * dtype.itemsize
    storage = torch._C._construct_storage_from_data_pointer(address, device, size_bytes)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape)


class Child:
    """``function(connection, *args)`` in a process of its own, ended with the ``with`` block."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=function, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()

    def answer(self, timeout_s: float = 120) -> Any:
        """What it sends next. Raises EOFError when it died."""
        assert self.connection.poll(timeout_s), f"no answer within {timeout_s} s"
        return self.connection.recv()

    def exit_code(self, timeout_s: float = 120) -> int | None:
        self.process.join(timeout_s)
        return self.process.exitcode


def read_and_stamp(connection: Connection, size_bytes: int) -> None:
    """Import a chunk, send its sum, fill it with 9."""
    vmm = CudaVmm()
    imported = vmm.import_fd(recv_handle(connection), size_bytes)
    address = vmm.reserve(size_bytes)
    vmm.map(address, imported)
    tensor = view(address, (size_bytes,))
    connection.send((int(tensor.sum(dtype=torch.int64)), vmm.held_bytes()))
    tensor.fill_(9)
    torch.cuda.synchronize()
    connection.send("stamped")
    connection.recv()


def leave_a_pattern(connection: Connection, chunks: int) -> None:
    """Fill chunks with 255, release them, and stay alive."""
    vmm = CudaVmm()
    size = vmm.granularity_bytes
    address = vmm.reserve(chunks * size)
    handles = [vmm.create(size) for _ in range(chunks)]
    for at, handle in enumerate(handles):
        vmm.map(address + at * size, handle)
    view(address, (chunks * size,)).fill_(255)
    for at, handle in enumerate(handles):
        vmm.unmap(address + at * size, size)
        vmm.release(handle)
    connection.send(vmm.held_bytes())
    connection.recv()


def churn(connection: Connection) -> None:
    """Create, map, write, unmap and release until told to stop; send the number of rounds."""
    vmm = CudaVmm()
    size = 4 * vmm.granularity_bytes
    address = vmm.reserve(8 * size)
    rounds = 0
    connection.send("running")
    while not connection.poll():
        handles = [vmm.create(size) for _ in range(8)]
        for at, handle in enumerate(handles):
            vmm.map(address + at * size, handle)
        view(address, (8 * size,)).fill_(rounds % 251)
        for at, handle in enumerate(handles):
            vmm.unmap(address + at * size, size)
            vmm.release(handle)
        rounds += 1
    connection.send(rounds)


def touch_nothing(connection: Connection) -> None:
    """Read reserved addresses that have no memory."""
    vmm = CudaVmm()
    tensor = view(vmm.reserve(vmm.granularity_bytes), (vmm.granularity_bytes,))
    connection.send("touching")
    connection.send(int(tensor.sum()))


def free_while_allocating(connection: Connection, seconds: float) -> None:
    """Ask for segments in one thread while another frees tensors: a wrong order of locks hangs."""
    import threading

    vmm = CudaVmm()
    pool = ChunkPool(vmm, vmm.granularity_bytes, limit_chunks=512)
    allocator = CudaAllocator(vmm, pool)
    stop = threading.Event()

    def free() -> None:
        while not stop.is_set():
            for tensor in [torch.empty(1 << 20, device=DEVICE) for _ in range(20)]:
                del tensor

    freer = threading.Thread(target=free)
    freer.start()
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with allocator.activation_pool():
            tensors = [torch.empty(size << 20, dtype=torch.uint8, device=DEVICE) for size in (3, 30, 60, 5)]
        del tensors
        allocator.trim()
        rounds += 1
    stop.set()
    freer.join()
    allocator.segments.check_conservation()
    connection.send((rounds, pool.bytes_by_owner()[ChunkOwner.ACTIVATION]))
