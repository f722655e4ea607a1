"""The environment of an engine's processes."""

import pytest

from replicas import environment
from replicas.environment import engine_environment
from replicas.spec import EngineSpec

SPEC = EngineSpec("m", "/m", 128, kv_ceiling_bytes=8, kv_rest_bytes=2, kv_guarantee_bytes=4, weights_bytes=1)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_temporary_files_of_an_engine_are_where_its_sockets_are(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    """Whatever TMPDIR says, because a killed engine leaves some; where none is set for sockets, TMPDIR stays."""
    monkeypatch.setattr(environment, "computes_on_cpu", lambda: on_cpu)
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/of-the-cluster")
    assert engine_environment(SPEC, 1)["TMPDIR"] == "/of-the-cluster"
    monkeypatch.delenv("VLLM_RPC_BASE_PATH")
    assert "TMPDIR" not in engine_environment(SPEC, 1)
