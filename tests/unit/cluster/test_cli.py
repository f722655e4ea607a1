"""The command line: what it prints, what it refuses, and that a refusal starts nothing."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.api_client import known_key
from cluster.api_key import find_key
from cluster.cli import app
from cluster.config import ClusterConfig
from cluster.config_file import load_config
from cluster.key_file import read_keys

Checkpoint = Callable[..., Path]


def ellm(*arguments: str) -> tuple[int, str]:
    """Exit status and everything printed of a command that ends inside this process."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def serve(*arguments: str) -> tuple[int, str]:
    """The same of ``ellm serve``, in a process of its own, as it ends its process itself."""
    command = [sys.executable, "-m", "cluster.cli", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """Address of a server that answers every GET so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_printed_example_passes_the_check(tmp_path: Path) -> None:
    """`ellm config example > FILE` makes a file that `ellm config check FILE` accepts, and that changes nothing."""
    file = tmp_path / "cluster.yaml"
    code, text = ellm("config", "example")
    file.write_text(text)
    assert (code, load_config(file)) == (0, ClusterConfig())
    assert ellm("config", "check", str(file))[0] == 0
    code, text = ellm("config", "check", str(file), "--json")
    assert (code, json.loads(text)) == (0, ClusterConfig().model_dump(mode="json"))


def test_the_check_refuses_a_wrong_file(tmp_path: Path) -> None:
    """The exit status is 1, and every problem is printed with its path."""
    file = tmp_path / "cluster.yaml"
    file.write_text("http: {prot: 1}\nmemory: {budget: lots}\n")
    code, text = ellm("config", "check", str(file))
    assert code == 1
    assert "http.prot (line 1): unknown key; did you mean 'port'?" in text
    assert "memory.budget (line 2): found 'lots'" in text


def test_versions_are_printed() -> None:
    """`ellm version` names this program and what it is built on."""
    code, text = ellm("version")
    assert code == 0
    assert [name for name in ("ellm-cluster 0.", "vllm", "ray 2.60") if name not in text] == []
    code, as_json = ellm("version", "--json")
    told = json.loads(as_json)
    assert (code, [f"{name} {version}" for name, version in told.items()]) == (0, text.split("\n")[:-1])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(shell: str) -> None:
    """The script for the shell is printed, and what it asks for names the commands."""
    environment = {"_ELLM_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "ellm doc", "COMP_WORDS": "ellm doc"}
    environment |= {"COMP_CWORD": "1", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(app, [], prog_name="ellm", env=environment)
    assert "doctor" in result.output and "status" not in result.output


def test_status_without_a_cluster_says_how_to_get_one() -> None:
    """Where nothing listens, the error names the address and the two remedies."""
    url = f"http://127.0.0.1:{free_port()}"
    code, text = ellm("status", "--url", url)
    assert code == 1
    assert url in text and "ellm serve" in text and "--url" in text


def test_status_of_something_else_is_refused() -> None:
    """A server that is no cluster, with any answer, and an address that is none: a clear error, no traceback."""
    for status, body in ((404, "not found"), (200, "<html>"), (200, "[1]")):
        with answering(status, body) as url:
            code, text = ellm("status", "--url", url)
        assert (code, "not as an ellm cluster" in text) == (1, True)
    code, text = ellm("status", "--url", "localhost")
    assert (code, "http://127.0.0.1:8000" in text) == (1, True)


def test_status_as_json_is_the_snapshot() -> None:
    """--json prints what the cluster answered, for programs."""
    snapshot = {"nodes": [], "revision": 3}
    with answering(200, json.dumps(snapshot)) as url:
        code, text = ellm("status", "--json", "--url", url + "/")
    assert (code, json.loads(text)) == (0, snapshot)


def test_values_on_the_command_line_are_checked_like_the_file(tmp_path: Path) -> None:
    """A wrong option is refused with the key's path and what would fit, as in a file."""
    code, text = ellm("serve", "--port", "99999", "--budget", "3x", "--replicas", "0")
    assert code == 1
    for said in ("http.port: found 99999", "memory.budget: found '3x'", "models[0].replicas: found 0"):
        assert said in text


def test_one_model_argument_cannot_replace_several(tmp_path: Path) -> None:
    """With several models in the file, MODEL would be ambiguous."""
    file = tmp_path / "cluster.yaml"
    file.write_text("models: [{name: a}, {name: b}]")
    code, text = ellm("serve", "/some/model", "--config", str(file))
    assert (code, "ambiguous" in text) == (1, True)


def test_a_taken_port_is_refused(checkpoint: Checkpoint) -> None:
    """The error names the port, the process that has it, and the option; nothing is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = serve(str(checkpoint()), "--port", str(port))
    assert code == 1
    assert f"error: check: port {port} on 127.0.0.1 is taken by python" in text and "--port" in text
    assert "model " not in text


@pytest.mark.parametrize(
    ("arguments", "stage", "said"),
    [
        (["/no/such/model"], "model", "no such folder: /no/such/model"),
        (["CHECKPOINT", "--max-model-len", "4096"], "model", "at most 2048"),
        (["CHECKPOINT", "--budget", "1MiB"], "memory", "raise it to"),
        (["CHECKPOINT", "--budget", "9000TiB"], "memory", "lower it to at most"),
    ],
)
def test_a_start_that_cannot_work_is_refused(
    checkpoint: Checkpoint, arguments: list[str], stage: str, said: str
) -> None:
    """Unknown model, context too long, too small or too large a budget: the stage, the cause, the remedy."""
    folder = str(checkpoint())
    code, text = serve(*(folder if a == "CHECKPOINT" else a for a in arguments), "--port", str(free_port()))
    assert code == 1
    assert f"error: {stage}: " in text and said in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("http: {host: no.such.host.invalid}\nauth: {allow_open: true}", "check: no address for the host"),
        ("auth: {keys_file: /no/keys.yaml}", "check: there is no keys file /no/keys.yaml; `ellm keys create"),
        ("http: {ssl_certfile: /no/cert.pem}", "check: http.ssl_certfile /no/cert.pem"),
        ("http: {host: 0.0.0.0}", "there are no API keys"),
    ],
)
def test_an_api_that_cannot_be_offered_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, settings: str, said: str
) -> None:
    """A host without an address, a missing keys file or certificate, and an open address without keys: before anything
    is started."""
    file = tmp_path / "cluster.yaml"
    file.write_text(settings)
    code, text = serve(str(checkpoint()), "--config", str(file), "--port", str(free_port()))
    assert (code, said in text, "Traceback" in text) == (1, True, False), text


def test_keys_are_made_shown_and_revoked(tmp_path: Path) -> None:
    """The text of a key is printed once, alone on standard output, and is nowhere else; ids are for the rest."""
    file = str(tmp_path / "keys.yaml")
    arguments = ["keys", "create", "--tenant", "acme", "--scope", "admin", "--class", "a", "--requests-per-min", "3"]
    made = CliRunner().invoke(app, [*arguments, "--expires-days", "1", "--file", file])
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()
    assert find_key({key.id: key for key in read_keys(Path(file))}, text.encode(), datetime.now(UTC))
    code, shown = ellm("keys", "list", "--file", file, "--json")
    [key] = json.loads(shown)
    told = (key["tenant"], key["scopes"], key["slo_class"], key["requests_per_min"])
    assert (code, told) == (0, ("acme", ["admin"], "a", 3))
    assert text not in shown
    assert "acme" in ellm("keys", "list", "--file", file)[1]
    code, said = ellm("keys", "revoke", "nobody", "--file", file)
    assert (code, key["id"] in said) == (1, True)
    assert ellm("keys", "revoke", key["id"], "--file", file)[0] == 0
    assert ellm("keys", "list", "--file", file, "--json")[1].strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "--tenant", "a b"], "tenant"),
        (["create", "--tenant", "a", "--tokens-per-min", "0"], "tokens_per_min"),
        (["create", "--tenant", "a", "--expires-days", "1e9"], "too long"), (["list"], "ellm keys create"),
        (["create", "--tenant", "a", "--file", "/no/such/folder/keys"], "make it first"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_made_are_told(tmp_path: Path, arguments: list[str], said: str) -> None:
    """The reason, and nothing is written."""
    file = [] if "--file" in arguments else ["--file", str(tmp_path / "keys.yaml")]
    code, text = ellm("keys", *arguments, *file)
    assert (code, said in text, "Traceback" in text) == (1, True, False), text
    assert list(tmp_path.iterdir()) == []


def test_commands_say_which_key_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused by the cluster, they name the variables; a key of the environment, or of a file, is shown to it."""
    for arguments in (["status"], ["explain"], ["models", "list"]):
        with answering(401, "{}") as url:
            code, text = ellm(*arguments, "--url", url)
        assert (code, "ELLM_API_KEY" in text and "scope admin" in text) == (1, True), text
    assert known_key({"ELLM_API_KEY": "k"}) == "k"
    (tmp_path / "key").write_text("from file\n")
    assert known_key({"ELLM_API_KEY_FILE": str(tmp_path / "key")}) == "from file"
    monkeypatch.setenv("ELLM_API_KEY_FILE", str(tmp_path / "none"))
    for arguments in (["status"], ["models", "list"]):
        code, text = ellm(*arguments, "--url", "http://127.0.0.1:1")
        assert (code, "ELLM_API_KEY_FILE names" in text) == (1, True), text
