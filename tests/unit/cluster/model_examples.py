"""Models for tests: settings and specs of engines that share a budget of one GiB."""

from typing import Any

from cluster.config import ModelConfig
from cluster.model_set import ModelEntry, ModelPhase
from cluster.sizing import GIB, MIB
from replicas.spec import EngineSpec

LEAST = 64 * MIB


def spec(name: str, **values: Any) -> EngineSpec:
    known: dict[str, Any] = {
        "model_name": name,
        "model_path": f"/models/{name}",
        "max_model_len": 2048,
        "kv_ceiling_bytes": GIB,
        "kv_rest_bytes": 16 * MIB,
        "kv_guarantee_bytes": LEAST,
        "weights_bytes": 300 * MIB,
    }
    return EngineSpec(**(known | values))


def entry(name: str, phase: ModelPhase = ModelPhase.SERVING, replicas: int = 2, **values: Any) -> ModelEntry:
    config = ModelConfig(name=name, source=f"/models/{name}", replicas=replicas, elastic=values.get("elastic", True))
    return ModelEntry(config, spec(name, **values), None, phase)
