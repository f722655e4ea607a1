"""A Ray cluster of several nodes on this host, and the application that it serves, as a RayService would have them.

    head      Ray's control store, Serve's controller; here the API and the control actors too; no engine
    workers   the engines

A node is a raylet with its workers in a mount namespace, whose ``/dev/shm`` is its own, as a pod's is: nodes share the
network, and no memory. That takes root. All processes of a node are known by the namespace, also when their parents are
dead.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import yaml

from cluster.app import API_DEPLOYMENT
from cluster.config import ClusterConfig
from cluster.deploy.ray_service import serve_config
from cluster.footprint import Footprint
from cluster.serve_app import CONTROL_DEPLOYMENT, cluster_id_of
from cluster.start_stages import OBJECT_STORE_BYTES, PROCESS_ENVIRONMENT
from memory_agent.processes import SHM

_HOST = "127.0.0.1"
_HEAD_ONLY = "head"
"""A resource of the head's."""
_SHM_BYTES = 1 << 30
_WORKER_CPUS = 1
"""For Ray's bookkeeping, a hundredth an actor."""
_STARTED = "Ray runtime started"
_START_S = 120.0
_END_S = 60.0
_SETTLE_S = 15.0
_ISOLATED = f'mount -t tmpfs -o size={_SHM_BYTES},mode=1777 tmpfs {SHM} && exec "$@"'
_OURS = ("ray::", "VLLM::")
"""What processes of actors and engines are called. Ray's own, which nobody has asked to end, are none of ours."""
_CACHE = "torchinductor_"
_ROOT = Path(__file__).parents[2]


class NodesError(RuntimeError):
    """The cluster cannot be started here. Says why."""


class Node:
    """A node. One starts after the other has joined: Ray numbers the sockets of the raylets of a host by what is
    there.

    Attributes:
        name: for people.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as out:
            self._first = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", _ISOLATED, "sh", *command], env=environment, stdout=out, stderr=out
            )
        own = _mount_space(os.getpid())
        self._wait(lambda: _mount_space(self._first.pid) not in (None, own), "left this process's mount namespace")
        self._space = _mount_space(self._first.pid)

    def wait_joined(self) -> None:
        """Raises NodesError where it does not join."""
        self._wait(lambda: _STARTED in self._log.read_text(errors="replace"), "joined")

    def _wait(self, reached: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _START_S
        while not reached():
            self.check()
            if time.monotonic() > deadline_s:
                raise NodesError(f"{self.name} has not {what}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raises NodesError with its last words where it has ended."""
        if self._first.poll() is not None:
            raise NodesError(f"{self.name} has ended:\n{self._log.read_text(errors='replace')[-2000:]}")

    def has(self, pid: int) -> bool:
        """The process is one of this node."""
        return _mount_space(pid) == self._space

    def processes(self) -> list[psutil.Process]:
        """Those that live."""
        return [one for one in psutil.process_iter() if self.has(one.pid)]

    @property
    def raylet(self) -> psutil.Process | None:
        return next((one for one in self.processes() if _name(one) == "raylet"), None)

    def kill(self) -> None:
        """The raylet first, then whatever is there, until nothing is."""
        if (raylet := self.raylet) is not None:
            _send(raylet, signal.SIGKILL)
        deadline_s = time.monotonic() + _END_S
        while (left := self.processes()) and time.monotonic() < deadline_s:
            for one in left:
                _send(one, signal.SIGKILL)
            time.sleep(0.05)
        self._first.wait()

    def command_in(self, command: Sequence[str]) -> list[str]:
        """``command``, to be run on this node."""
        return ["nsenter", f"--target={self._first.pid}", "--mount", *command]

    def shared_files(self) -> set[str]:
        """Names in the node's ``/dev/shm``. Raises NodesError where the node has ended."""
        self.check()
        return set(os.listdir(f"/proc/{self._first.pid}/root{SHM}"))


class Nodes:
    """The cluster. ``start`` returns when all nodes have been started and the application was submitted.

    Args:
        workers: nodes beside the head.

    Attributes:
        workers: those that live. url: of the API.
    """

    def __init__(self, config: ClusterConfig, workers: int) -> None:
        self.url = f"http://{_HOST}:{config.http.port}"
        self.workers: list[Node] = []
        self._config, self._count = config, workers
        self._started = 0
        self._serve: subprocess.Popen[bytes] | None = None
        self.footprint = Footprint()
        folder = self.folder = self.footprint.folder
        self._temp = folder / "tmp"
        self._temp.mkdir()
        self._environment = {
            **os.environ,
            **PROCESS_ENVIRONMENT,
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": str(folder),
            "TMPDIR": str(self._temp),
            "VLLM_RPC_BASE_PATH": str(folder),
            "PYTHONPATH": str(_ROOT),
            "RAY_worker_niceness": "0",  # else a busy machine gives the replicas nothing
        }
        self._environment.pop("RAY_ADDRESS", None)

    def start(self) -> None:
        """Raises NodesError."""
        port = free_port()
        self._address = f"{_HOST}:{port}"
        resources = f'{{"{_HEAD_ONLY}": 1}}'
        options = ["--head", f"--port={port}", "--num-cpus=0", f"--resources={resources}", "--include-dashboard=false"]
        self.head = self._node("head", [*options, f"--temp-dir={self.folder}"])
        for _ in range(self._count):
            self.add_worker()
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(placed(self._config)), encoding="utf-8")
        serve = [str(Path(sys.executable).with_name("serve")), "run", "--address", self._address, str(file)]
        with self.serve_log.open("wb") as out:
            command = self.head.command_in(serve)
            self._serve = subprocess.Popen(command, env=self._environment, stdout=out, stderr=out)

    @property
    def serve_log(self) -> Path:
        return self.folder / "serve.log"

    def check(self) -> None:
        """Raises NodesError where the head or what runs the application has ended."""
        self.head.check()
        if self._serve is not None and self._serve.poll() is not None:
            raise NodesError(f"serve run has ended:\n{self.serve_log.read_text(errors='replace')[-4000:]}")

    def add_worker(self) -> Node:
        """Another node joins."""
        self._started += 1
        options = [f"--address={self._address}", f"--num-cpus={_WORKER_CPUS}"]
        node = self._node(f"worker {self._started}", options)
        self.workers.append(node)
        return node

    def kill(self, node: Node) -> None:
        """All of a worker at once."""
        self.workers.remove(node)
        node.kill()

    def node_of(self, pid: int) -> Node | None:
        """The worker that has the process."""
        return next((node for node in self.workers if node.has(pid)), None)

    def stop(self) -> list[str]:
        """End the application, then the nodes, as gently as they can be ended. Returns what is left, in words: files in
        shared memory once no engine lives, processes, temporary files."""
        if self._serve is not None:
            self._serve.send_signal(signal.SIGINT)
            _wait(self._serve)
        boards = f"ellm-{self._cluster_id}-"
        left = []
        for node in (self.head, *self.workers):
            kept = {f"{boards}cpu.board", f"{boards}models.json"}  # they end with their node, by what is documented
            left += [f"{node.name}: {SHM}/{name}" for name in sorted(node.shared_files() - kept)]
        for node in (*self.workers, self.head):
            if (raylet := node.raylet) is not None:
                _send(raylet, signal.SIGTERM)
        psutil.wait_procs(self.footprint.processes(), timeout=_SETTLE_S)
        ours = [one for one in self.footprint.processes() if _name(one).startswith(_OURS)]
        left += [f"process {one.pid} {_name(one)}" for one in ours]
        left += [f"{SHM}/{one}" for one in os.listdir(SHM) if one.startswith(boards)]
        left += sorted(f"temporary {one.name}" for one in self._temp.iterdir() if not one.name.startswith(_CACHE))
        return left

    def clear(self) -> None:
        """End and remove everything at once."""
        self.footprint.clear()

    @property
    def _cluster_id(self) -> str:
        session = next((path.name for path in self.folder.glob("session_2*")), "")
        return cluster_id_of(session)

    def _node(self, name: str, options: Sequence[str]) -> Node:
        ray = str(Path(sys.executable).with_name("ray"))
        common = [f"--node-ip-address={_HOST}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--num-gpus=0"]
        common += ["--dashboard-agent-listen-port=0", "--disable-usage-stats", "--block"]
        log = self.folder / f"{name.replace(' ', '-')}.log"
        node = Node(name, [ray, "start", *options, *common], self._environment, log)
        node.wait_joined()
        return node


def placed(config: ClusterConfig) -> dict[str, object]:
    """What Ray Serve is told: as in a RayService, but that API and control are on the head, which is not killed."""
    found = serve_config(config)
    here = {"num_cpus": 0, "resources": {_HEAD_ONLY: 0.01}}
    (application,) = found["applications"]
    application["args"]["http"]["host"] = _HOST
    application["deployments"] = [
        {"name": name, "ray_actor_options": here} for name in (API_DEPLOYMENT, CONTROL_DEPLOYMENT)
    ]
    return found


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _mount_space(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _wait(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
