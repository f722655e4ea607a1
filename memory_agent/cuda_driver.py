"""Calls of the CUDA driver API through cuda-python: a result, or an exception that says whether waiting can help."""

import importlib
import logging
from typing import Any

from memory_agent.errors import OutOfDeviceMemory, SettingsError

logger = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """The driver refused for a reason that waiting does not cure: a defect, or a context that a kernel has broken."""


class CudaDriver:
    """The driver of this process.

    Args:
        api: what answers the driver API: cuda-python's module, or an object that looks like it.

    Raises SettingsError where cuda-python is not installed.
    """

    def __init__(self, api: Any = None) -> None:
        self.api = _load() if api is None else api

    def call(self, name: str, *args: Any) -> Any:
        """One call: its result, a tuple where there are several, None where there is none. Raises OutOfDeviceMemory or
        CudaError."""
        error, *results = getattr(self.api, name)(*args)
        codes = self.api.CUresult
        if error == codes.CUDA_SUCCESS:
            return results[0] if len(results) == 1 else tuple(results) or None
        message = f"{name}: {self._text('cuGetErrorName', error)}, {self._text('cuGetErrorString', error)}"
        if error == codes.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfDeviceMemory(f"{message}; the device's memory or this process's address space is used up")
        raise CudaError(message)

    def quietly(self, name: str, *args: Any) -> None:
        """A call whose failure is only logged: the process goes on, or ends, in any case."""
        try:
            self.call(name, *args)
        except (CudaError, OutOfDeviceMemory) as error:
            logger.warning("%s", error)

    def _text(self, name: str, error: Any) -> str:
        found, text = getattr(self.api, name)(error)
        return text.decode() if found == self.api.CUresult.CUDA_SUCCESS and text else f"error {int(error)}"


def _load() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise SettingsError("CUDA memory needs cuda-python: pip install 'ellm-cluster[gpu]'") from error
