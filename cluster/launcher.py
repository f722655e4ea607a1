"""Starts a cluster on this host, stage by stage, and stops it in reverse order without leaving anything.

    check -> model -> memory -> engine -> ray -> control -> replicas -> ready

Each stage that starts something first notes how to undo it. Whatever fails or interrupts a stage, ``stop`` undoes the
finished ones, then ends every process and removes every file that is left (``cluster.footprint``).
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cluster.config import ClusterConfig
from cluster.default_model import DefaultModelError
from cluster.device import HOST, Device, device_environment, find_device
from cluster.footprint import Footprint, remove_leftovers
from cluster.launch_error import LaunchError, keep_logs, root_cause
from cluster.preflight import check_http, check_platform, check_port
from cluster.readiness import answer_once
from cluster.sizing import Sizing
from cluster.start_stages import (
    CONTROL_TIMEOUT_S,
    OBJECT_STORE_BYTES,
    RAY_CPUS,
    check_engines,
    read_models,
    size_cluster,
    start_control,
)
from memory_agent.errors import SettingsError

if TYPE_CHECKING:
    from cluster.api_key import ApiKey

_POLL_S = 0.5
_SAY_AGAIN_S = 15.0
_STOP_PATIENCE_S = 10.0
_UNDO_TIMEOUT_S = 30.0
_NOTE_PERIOD_S = 30.0

Report = Callable[[str, float, str], None]
"""Called with a stage's name, the seconds since it began, and a line of text."""


class LocalCluster:
    """A cluster on this host: a context manager that starts it on entry and leaves nothing on exit.

    Only one can run in a process, because Ray connects a process to one cluster.

    Attributes:
        url: where the API answers.
        device: what its engines compute on, once the stage "check" is done.
        sizing: what it was started with, once the stage "memory" is done.
        interruptible: False once a KeyboardInterrupt has cut the stop short; signal handlers must not raise another.
    """

    def __init__(self, config: ClusterConfig, report: Report) -> None:
        self.config = config
        self.device: Device = HOST
        self.sizing: Sizing | None = None
        self.footprint: Footprint | None = None
        self.interruptible = True
        host = config.http.host
        scheme = "http" if config.http.ssl_certfile is None else "https"
        self.url = f"{scheme}://{'127.0.0.1' if host == '0.0.0.0' else host}:{config.http.port}"
        self._report = report
        self._key, self._key_record = _own_key(config)
        self._undo: list[tuple[str, Callable[[], None]]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Run every stage. Where one fails or is interrupted, everything is stopped first. Raises LaunchError."""
        try:
            with self._stage("check") as say:
                self._check(say)
            with self._stage("model") as say:
                facts = read_models(self.config, say)
            with self._stage("memory") as say:
                sizing = self.sizing = size_cluster(self.config, self.device, facts, say)
            with self._stage("engine") as say:
                check_engines(sizing, say)
            self.footprint = Footprint()
            with self._stage("ray") as say:
                self._start_ray(self.footprint)
                say(f"local cluster {self.footprint.cluster_id}")
            with self._stage("control") as say:
                registry = start_control(self.config, self.footprint.cluster_id, self.device, sizing, say)
            with self._stage("replicas") as say:
                self._start_replicas(registry, say)
                self.footprint.note_segments()
                self.footprint.reap_orphans()
            with self._stage("ready") as say:
                for model in self.config.models:
                    answer = answer_once(self.url, model.name, self._key, self.config.http.ssl_certfile)
                    say(f"{model.name} answers: {answer!r}")
        except BaseException:  # Ctrl-C too
            self.stop()
            raise

    def wait(self) -> None:
        """Until this thread is interrupted: models that are added later map shared memory too, which is noted, and dead
        processes are collected."""
        while True:
            time.sleep(_NOTE_PERIOD_S)
            if self.footprint is not None:
                self.footprint.note_segments()
                self.footprint.reap_orphans()

    def stop(self) -> None:
        """Stop what was started, in reverse order; a KeyboardInterrupt skips to killing. Safe to call twice."""
        footprint, self.footprint = self.footprint, None
        if footprint is None:
            return
        began = time.monotonic()
        self._report("stop", 0.0, "stopping what was started; Ctrl-C kills at once")

        def lives() -> bool:
            footprint.note_segments()  # each time: engines that were starting map more before they are killed
            return footprint.ray_lives()

        try:
            while self._undo:
                what, undo = self._undo.pop()
                self._report("stop", time.monotonic() - began, what)
                _run_while(lives, undo, _UNDO_TIMEOUT_S)
            killed = footprint.clear(_STOP_PATIENCE_S)
        except KeyboardInterrupt:
            self.interruptible = False
            killed = footprint.clear(0.0)
        self._undo.clear()
        ended = f"; {len(killed)} processes had to be killed" if killed else ""
        self._report("stop", time.monotonic() - began, f"nothing is left{ended}")

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[Callable[[str], None]]:
        began = time.monotonic()
        try:
            yield lambda line: self._report(name, time.monotonic() - began, line)
        except (SettingsError, DefaultModelError) as error:
            raise LaunchError(name, str(error)) from error
        except LaunchError:
            raise
        except Exception as error:  # Ray, Serve and vLLM raise anything; the user is told the stage and the root
            raise LaunchError(name, root_cause(f"{type(error).__name__}: {error}"), self._logs()) from error

    def _check(self, say: Callable[[str], None]) -> None:
        for cluster_id in remove_leftovers():
            say(f"removed files that the killed cluster {cluster_id} had left")
        check_port(self.config.http.host, self.config.http.port)
        check_http(self.config)
        check_platform()
        self.device = find_device()
        os.environ.update(device_environment(self.device))  # and so of every process that this one starts
        if self.device.is_gpu:
            say(f"engines share {self.device.name}. GPUs are experimental: no GPU has run this project's tests yet")
        say(f"configuration fits, {self.config.http.host}:{self.config.http.port} is free")

    def _start_ray(self, footprint: Footprint) -> None:
        from cluster.local_ray import start_ray, stop_ray

        self._undo.append(("ray", stop_ray))
        start_ray(footprint, num_cpus=RAY_CPUS, object_store_bytes=OBJECT_STORE_BYTES)

    def _start_replicas(self, registry: Any, say: Callable[[str], None]) -> None:
        """The API; with it there, the registry starts the replicas of every model. Waits until all serve."""
        from ray import serve

        from cluster.app import APP_NAME, build_api_app

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._undo.append(("replicas and API", _end_applications))
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        api = build_api_app(self.config, own_keys=self._key_record)
        target = serve.RunTarget(api, name=APP_NAME, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        self._wait_until_serving(registry, say)

    def _wait_until_serving(self, registry: Any, say: Callable[[str], None]) -> None:
        import ray
        from ray import serve

        from cluster.app import APP_NAME
        from cluster.serve_fleet import app_state

        said, said_at = "", 0.0
        while True:
            api = app_state(serve.status().applications[APP_NAME])
            models: list[dict[str, Any]] = ray.get(registry.listing.remote(), timeout=CONTROL_TIMEOUT_S)
            failures = [f"{one['name']}: {one['error'].partition(': ')[2]}" for one in models if one["error"]]
            if api.failed or failures:
                raise LaunchError("replicas", "; ".join(failures) or api.failed or "", self._logs())
            if (line := _progress(models, api.running)) != said or time.monotonic() > said_at + _SAY_AGAIN_S:
                say(line)
                said, said_at = line, time.monotonic()
            if all(model["phase"] == "serving" for model in models):
                return
            time.sleep(_POLL_S)

    def _logs(self) -> Path | None:
        return keep_logs(self.footprint.folder) if self.footprint else None


def _own_key(config: ClusterConfig) -> tuple[str | None, "tuple[ApiKey, ...]"]:
    """A key for this process alone, with which it sees that models answer; none where the cluster asks for none."""
    if config.auth.keys_file is None:
        return None, ()
    from cluster.api_key import new_key

    text, record = new_key(tenant="ellm-serve")
    return text, (record,)


def _run_while(lives: Callable[[], bool], work: Callable[[], None], timeout_s: float) -> None:
    """Run ``work`` in a thread, and wait for it no longer than ``timeout_s`` and no longer than Ray lives.

    Calls into a Ray cluster that is gone block for a minute. What they raise cannot help a stop that goes on anyway.
    """

    def quietly() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while lives() and thread.is_alive() and time.monotonic() < deadline:
        thread.join(_POLL_S)


def _end_applications() -> None:
    """End the API, without which the registry starts nothing, and with it all models. Not serve.shutdown: that prints
    an error of its own about the Serve controller, which ends with Ray anyway."""
    from ray import serve

    from cluster.app import APP_NAME

    names = sorted(serve.status().applications, key=lambda name: name != APP_NAME)
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        list(pool.map(serve.delete, names))


def _progress(models: list[dict[str, Any]], api_is_up: bool) -> str:
    parts = [f"{model['name']} {model['progress'] or model['phase']}" for model in models]
    return ", ".join([*parts, "API is up" if api_is_up else "API is starting"])
