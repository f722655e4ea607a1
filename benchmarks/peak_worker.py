"""vLLM's own GPU worker, which also tells what its steps take. Chosen by ``worker_cls``, called by collective_rpc."""

import torch
from vllm.v1.worker.gpu_worker import Worker


class PeakWorker(Worker):
    """Activations of what runs between the two calls, as torch counts them: without what its allocator keeps."""

    def begin_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before_bytes = torch.cuda.memory_allocated()

    def end_peak(self) -> int:
        """Bytes at the peak since ``begin_peak``, on top of what there was."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before_bytes
