"""Real driver, real device. Every test here is marked ``gpu`` and skipped where torch finds no CUDA device."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memory_agent.cuda_vmm import CudaVmm


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="torch finds no CUDA device")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture
def vmm() -> Iterator[CudaVmm]:
    torch.cuda.init()
    backend = CudaVmm()
    yield backend
    torch.cuda.synchronize()
    backend.close()
