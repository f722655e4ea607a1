"""What can be known to be wrong before anything is started."""

import errno
import os
import socket
import ssl
import sys
from pathlib import Path

import psutil

from cluster.config import ClusterConfig
from cluster.device import HOST
from cluster.key_file import read_keys
from memory_agent.errors import SettingsError


def check_platform() -> None:
    """Raises SettingsError on another system than Linux."""
    if sys.platform != "linux":
        raise SettingsError(f"this runs on Linux only, not on {sys.platform}: elastic memory needs memfd and /dev/shm")


def check_host_memory(replicas: int, buffers_bytes: int, free_bytes: int) -> None:
    """Raises SettingsError where the processes of a cluster on a GPU, and its host buffers, do not fit into the host's
    memory."""
    needed = HOST.base_bytes + replicas * HOST.replica_bytes + buffers_bytes
    if needed > free_bytes:
        raise SettingsError(
            f"too little host memory: {needed >> 20} MiB are needed for Ray, the API, {replicas} replicas and their "
            f"host buffers, {free_bytes >> 20} MiB are free: set fewer replicas, or lower memory.host_buffer"
        )


def check_shared_memory(wanted_bytes: int, folder: Path = Path("/dev/shm")) -> None:
    """Raises SettingsError where host buffers of so many bytes do not fit into shared memory."""
    system = os.statvfs(folder)
    free_bytes = system.f_bavail * system.f_frsize
    if wanted_bytes > free_bytes:
        raise SettingsError(
            f"the host buffers of all replicas take {wanted_bytes >> 20} MiB, but {folder} has {free_bytes >> 20} MiB "
            "free: lower memory.host_buffer, or give the container more shared memory (--shm-size)"
        )


def check_port(host: str, port: int) -> None:
    """Raises SettingsError where nothing can listen on ``host:port``; names who does, where that can be seen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise SettingsError(f"no address for the host {host!r}: {error.strerror}; use --host 127.0.0.1") from error
    except PermissionError as error:
        raise SettingsError(f"port {port} needs privileges; choose one above 1023 with --port") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"port {port} on {host} is taken{_listener(port)}; choose another with --port"
            ) from error
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; use --host 127.0.0.1") from error


def check_http(config: ClusterConfig) -> None:
    """Raises SettingsError where the API's keys or its certificate cannot be used."""
    if config.auth.keys_file is not None:
        path = Path(config.auth.keys_file)
        if os.environ.get("VLLM_API_KEY"):
            raise SettingsError("VLLM_API_KEY would be asked for beside the keys of auth.keys_file: unset it")
        if not read_keys(path, [one.name for one in config.slo]):
            raise SettingsError(
                f"the keys file {path} has no key, so nobody could use the API: `ellm keys create --file {path} "
                "--tenant NAME` makes one"
            )
    http = config.http
    if http.ssl_certfile is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(http.ssl_certfile, http.ssl_keyfile, _no_password)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"http.ssl_certfile {http.ssl_certfile} and http.ssl_keyfile {http.ssl_keyfile} cannot be used: {error}"
            ) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not, readable by this user alone")


def _listener(port: int) -> str:
    try:
        pids = {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN
        }
        names = [f"{psutil.Process(pid).name()}, process {pid}" for pid in pids if pid]
    except psutil.Error:
        return ""
    return f" by {names[0]}" if names else ""
