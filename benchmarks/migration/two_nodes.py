"""Two raylets on this host, each with a memory agent of its own: what is between them goes through Ray's object
stores, over TCP."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.start_stages import OBJECT_STORE_BYTES
from memory_agent.agent import AgentSpec, agent_name, board_path, ensure_agent
from memory_agent.controller_link import NAMESPACE

BUDGET_BYTES = 1 << 30


class Node:
    """One of them.

    Attributes:
        agent: the actor; name: its name. board: of its device, which has the node's name: both lie in one folder.
    """

    def __init__(self, cluster_id: str, device: str, node_id: str) -> None:
        spec = AgentSpec(cluster_id, device, BUDGET_BYTES)
        self.agent: Any = ensure_agent(spec, node_id)
        self.name, self.board = agent_name(node_id, device), board_path(spec)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """This process is connected to their Ray."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    folder, cluster_id, nodes = tempfile.mkdtemp(prefix="ellm-t-", dir="/tmp"), secrets.token_hex(4), []
    options = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster()
    try:
        raylets = [cluster.add_node(**options, temp_dir=folder), cluster.add_node(**options)]
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        nodes = [Node(cluster_id, device, raylet.node_id) for device, raylet in zip("ab", raylets, strict=True)]
        ray.get([node.agent.describe.remote() for node in nodes])
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            ray.kill(node.agent, no_restart=True)
        ray.shutdown()
        cluster.shutdown()
        for node in nodes:
            for path in node.board.parent.glob(f"{node.board.stem}*"):
                path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
