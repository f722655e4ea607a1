"""A Grafana as far as pushes need it: it keeps folders, datasources, dashboards and alert rules, and adds keys."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "glsa_right"


class FakeGrafana:
    """
    Attributes:
        things: by kind ("folders", "datasources", "dashboards", "rules") and uid.
        writes: every request that changed something, as "METHOD path".
        prefix: of the paths that it is served below.
    """

    def __init__(self, prefix: str = "") -> None:
        self.things: dict[str, dict[str, Any]] = {"folders": {}, "datasources": {}, "dashboards": {}, "rules": {}}
        self.writes: list[str] = []
        self.prefix = prefix
        self.forbidden = False
        self.url = ""

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content."""
        if self.forbidden and method != "GET":
            return 403, {"message": "You'll need additional permissions"}
        if not path.startswith(f"{self.prefix}/api/"):
            return 404, {"message": "no such page"}
        path = path.removeprefix(f"{self.prefix}/api")
        if method != "GET":
            self.writes.append(f"{method} {path}")
        if path == "/folders":
            return self._keep("folders", body["uid"], body)
        if found := re.fullmatch(r"/folders/([\w-]+)", path):
            return self._find("folders", found[1])
        if path == "/datasources":
            return self._keep("datasources", body["uid"], {"id": 1, "readOnly": False} | body)
        if found := re.fullmatch(r"/datasources/uid/([\w-]+)", path):
            if method == "GET":
                return self._find("datasources", found[1])
            return self._keep("datasources", found[1], {"id": 1} | body)
        if path == "/dashboards/db":
            board = body["dashboard"]
            kept = {"dashboard": board | {"id": 7, "version": 1}, "meta": {"folderUid": body["folderUid"]}}
            return self._keep("dashboards", board["uid"], kept)
        if found := re.fullmatch(r"/dashboards/uid/([\w-]+)", path):
            return self._find("dashboards", found[1])
        if path == "/v1/provisioning/alert-rules":
            return self._keep("rules", body["uid"], body | {"provenance": "api"})
        if found := re.fullmatch(r"/v1/provisioning/alert-rules/([\w-]+)", path):
            return self._find("rules", found[1]) if method == "GET" else self._keep("rules", found[1], body)
        return 404, {"message": f"no such route: {path}"}

    def _keep(self, kind: str, uid: str, thing: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.things[kind][uid] = thing
        return 200, thing

    def _find(self, kind: str, uid: str) -> tuple[int, dict[str, Any]]:
        found = self.things[kind].get(uid)
        return (404, {"message": "not found"}) if found is None else (200, found)


@contextmanager
def fake_grafana(prefix: str = "") -> Iterator[FakeGrafana]:
    """One that listens at its ``url``."""
    grafana = FakeGrafana(prefix)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, answer = 401, {"message": "Invalid API key"}
            else:
                status, answer = grafana.answer(self.command, self.path, json.loads(text) if text else {})
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _any  # noqa: N815, the names that http.server calls

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    grafana.url = f"http://127.0.0.1:{server.server_port}{prefix}"
    try:
        yield grafana
    finally:
        server.shutdown()
        server.server_close()
