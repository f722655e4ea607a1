"""vLLM's CPU worker, which loads weights without keeping what loading frees. Chosen by ``worker_cls``."""

from vllm.v1.worker.cpu_worker import CPUWorker

from memory_agent.heap import keep_freed


class ElasticCpuWorker(CPUWorker):
    """vLLM's own but for its heap."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Each matrix is loaded and then packed for the CPU's kernels, which frees the loaded one. The heap gives it
        back at once, so that no more than one is there twice; what steps free is decided later, at the first one
        (``ActivationMeter``)."""
        keep_freed(False)
        super().load_model(load_dummy_weights=load_dummy_weights)
