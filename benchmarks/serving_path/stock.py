"""ray.serve.llm as it is, over an engine that costs nothing.

python -m benchmarks.serving_path.stock PORT BATCHING_MS        ("default" leaves ray.serve.llm's own)
"""

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
os.environ.pop("RAY_ADDRESS", None)

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from benchmarks.serving_path.events import MODEL
from benchmarks.serving_path.runner import serve_until_told
from cluster.default_model import get_default_model


def main() -> None:
    port, batching = int(sys.argv[1]), sys.argv[2]
    config = LLMConfig(
        model_loading_config={"model_id": MODEL, "model_source": str(get_default_model(lambda line: None))},
        accelerator_config={"kind": "cpu"},
        server_cls="benchmarks.serving_path.free_engine:FreeServer",
        deployment_config={
            "num_replicas": 1,
            "max_ongoing_requests": 1024,
            "max_constructor_retry_count": 1,
            "ray_actor_options": {"num_cpus": 0.01},
        },
        experimental_configs={} if batching == "default" else {"stream_batching_interval_ms": float(batching)},
    )
    folder = tempfile.mkdtemp(prefix="stock-")
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=128 << 20,
        _temp_dir=folder,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_openai_app({"llm_configs": [config]}), name="stock")
        serve_until_told()
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
