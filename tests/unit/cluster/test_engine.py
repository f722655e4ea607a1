"""The guard around AsyncLLM's inside."""

import pytest
import vllm
from vllm.v1.engine.async_llm import AsyncLLM

import cluster.engine
from cluster.engine import UpstreamChangedError, check_upstream


def test_installed_vllm_is_the_expected_one() -> None:
    """AsyncLLM of the installed release is built as ClusterEngine expects."""
    check_upstream()


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release of vLLM is refused with both versions named."""
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(UpstreamChangedError, match=r"0\.33\.1 is installed, 0\.32\.\* is needed"):
        check_upstream()


def test_a_new_attribute_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constructor that stores an attribute more, or one less, is refused, and the attribute is named."""

    class Changed(AsyncLLM):
        def __init__(self) -> None:
            self.renderer = None  # type: ignore[assignment]
            self.brand_new = 1

    monkeypatch.setattr(cluster.engine, "AsyncLLM", Changed)
    with pytest.raises(UpstreamChangedError, match=r"new: \['brand_new'\], gone: .*'engine_core'"):
        check_upstream()
