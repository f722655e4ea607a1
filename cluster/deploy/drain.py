"""Lets a node of Ray go: run in a pod before it is stopped, as its preStop hook.

    python -m cluster.deploy.drain --within 630 --port 8000

Ray puts nothing new on a node that is drained, and Ray Serve ends its replicas, which go on with the requests that they
have: when a new one runs on another node, else when their patience for requests just fits into the time that is left.
"""

import logging
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable

import psutil

_POLL_S = 2.0
_HEAD_PATIENCE_S = 120.0
"""For a head that does not answer, which may be being replaced. Then the cluster is taken for gone."""
_ENGINE = ":engine"

logger = logging.getLogger("ellm.drain")


def drain(mark: Callable[[], None], busy: Callable[[], str], deadline_s: float, now: Callable[[], float]) -> str:
    """Mark the node, and wait until nothing is left or it is ``deadline_s``. Returns what is left then, "" for
    nothing."""
    mark()
    while (left := busy()) and now() < deadline_s:
        time.sleep(_POLL_S)
    return left


def main(arguments: list[str]) -> int:
    """Exit status 0 also where something is left: the pod is stopped whatever it says."""
    parser = ArgumentParser(
        prog="python -m cluster.deploy.drain", description="Let this node's requests end elsewhere."
    )
    parser.add_argument("--within", type=int, required=True, help="seconds until the node is stopped anyway")
    parser.add_argument("--port", type=int, required=True, help="of the API on this node")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    deadline_s = time.monotonic() + options.within
    node_id = join_ray()
    engines = NodeEngines(node_id, time.monotonic)
    left = drain(
        lambda: mark_node(node_id, options.within),
        lambda: ", ".join(part for part in (engines.left(), connections_at(options.port)) if part),
        deadline_s,
        time.monotonic,
    )
    logger.info("left at the end of the drain: %s", left or "nothing")
    return 0


def join_ray() -> str:
    """Connect to the Ray of this node; returns the node's id, "" where Ray does not answer."""
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        logger.warning("Ray does not answer: %s", error)
        return ""
    return str(ray.get_runtime_context().get_node_id())


def mark_node(node_id: str, within_s: int) -> None:
    """Ask Ray to drain the node, where it knows it. It refuses for a head, which is logged: nothing is moved then."""
    if not node_id:
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is being stopped"]
    command += ["--deadline-remaining-seconds", str(within_s)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        logger.warning("Ray does not drain the node: %s", (done.stderr or done.stdout).strip())


class NodeEngines:
    """Engine replicas that are on a node still; none of a node "" that Ray does not know."""

    def __init__(self, node_id: str, now: Callable[[], float]) -> None:
        self._node_id, self._now = node_id, now
        self._told_s = now()

    def left(self) -> str:
        """In words, "" for none. Also where the head has not told for a while."""
        from ray.exceptions import RayError
        from ray.util.state import list_actors
        from ray.util.state.exception import RayStateApiException

        if not self._node_id:
            return ""
        try:
            alive = list_actors(filters=[("node_id", "=", self._node_id), ("state", "=", "ALIVE")], limit=1000)
        except (RayStateApiException, RayError, ConnectionError) as error:
            logger.warning("Ray does not tell what is on the node: %s", error)
            return "engine replicas, maybe" if self._now() < self._told_s + _HEAD_PATIENCE_S else ""
        self._told_s = self._now()
        names = [str(actor.class_name) for actor in alive]
        count = sum(name.startswith("ServeReplica:") and _ENGINE in name for name in names)
        return f"{count} engine replicas" if count else ""


def connections_at(port: int) -> str:
    """Connections to this node's API, in words: each has a request, or is kept for the next one and ends soon. Counted
    without asking the API."""
    open_ones = [
        one
        for one in psutil.net_connections("tcp")
        if one.laddr and one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED
    ]
    return f"{len(open_ones)} connections" if open_ones else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
