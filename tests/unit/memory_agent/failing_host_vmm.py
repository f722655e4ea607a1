"""Host memory that fails on purpose."""

from memory_agent.fake_vmm import FailurePlan
from memory_agent.host_vmm import HostVmm
from memory_agent.vmm import ChunkHandle


class FailingHostVmm(HostVmm):
    """Real memory, with the failures that ``plan`` says, like FakeVmm."""

    def __init__(self, name: str, max_bytes: int) -> None:
        super().__init__(name, max_bytes)
        self.plan = FailurePlan()

    def create(self, size_bytes: int) -> ChunkHandle:
        self.plan.check("create")
        return super().create(size_bytes)

    def release(self, handle: ChunkHandle) -> None:
        self.plan.check("release")
        super().release(handle)

    def map(self, address: int, handle: ChunkHandle) -> None:
        self.plan.check("map")
        super().map(address, handle)

    def unmap(self, address: int, size_bytes: int) -> None:
        self.plan.check("unmap")
        super().unmap(address, size_bytes)
