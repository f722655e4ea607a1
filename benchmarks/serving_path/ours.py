"""Our cluster over a paced engine: everything but the engine is what `ellm serve` runs.

python -m benchmarks.serving_path.ours PORT TOKENS_PER_S INGRESSES REPLICAS
"""

import signal
import sys

from benchmarks.serving_path.events import MODEL
from benchmarks.serving_path.runner import serve_until_told
from cluster.config import ClusterConfig, HttpConfig, ModelConfig
from cluster.launcher import LocalCluster


def main() -> None:
    port, pace, ingresses, replicas = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    model = ModelConfig(
        name=MODEL, replicas=replicas, elastic=False, max_model_len=8192, max_num_seqs=128, paced_tokens_per_s=pace
    )
    config = ClusterConfig(models=[model], http=HttpConfig(port=port, ingress_replicas=ingresses))
    with LocalCluster(config, lambda stage, seconds, line: print(f"{stage} {seconds:.1f} {line}", file=sys.stderr)):
        serve_until_told()
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
