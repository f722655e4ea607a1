"""``ellm simulate`` and ``ellm plan`` on the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app


def ellm(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_writes_json_and_shows_a_table(tmp_path: Path) -> None:
    """Figures go to the terminal, everything to the file, each request too where that was asked for."""
    file = tmp_path / "out.json"
    result = ellm("simulate", "-n", 60, "--replicas", 2, "--json", file, "--records")
    assert result.exit_code == 0, result.output
    tree = json.loads(file.read_text())
    assert (tree["requests"], len(tree["records"])) == (60, 60)
    assert "attainment" in result.output and "TTFT" in result.output


def test_json_is_all_that_is_printed_where_it_is_asked_for() -> None:
    """`--json -` prints what a file would hold, and no table beside it."""
    run = ellm("simulate", "-n", 60, "--replicas", 2, "--json", "-", "--records")
    assert (run.exit_code, len(json.loads(run.stdout)["records"])) == (0, 60)
    options = ("--request-rate", 20, "-n", 200, "--ttft-ms", 1000, "--tpot-ms", 50, "--step-tokens", 2048)
    planned = ellm("plan", *options, "--json", "-")
    assert planned.exit_code == 0 and json.loads(planned.stdout)["best"]["replicas"] >= 1


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    """The same command twice, the same file."""
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        assert ellm("simulate", "-n", 80, "--seed", 5, "--json", file).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_compares_policies(tmp_path: Path) -> None:
    """Several policies are one line each, and one tree each in the file."""
    file = tmp_path / "out.json"
    result = ellm("simulate", "-n", 60, "--policy", "predicted", "--policy", "random", "--json", file)
    assert result.exit_code == 0, result.output
    assert [one["scenario"]["policy"] for one in json.loads(file.read_text())["policies"]] == ["predicted", "random"]


def test_plots_or_says_why_not(tmp_path: Path) -> None:
    """A picture is written where matplotlib is installed; else a line says how to install it."""
    picture = tmp_path / "out.png"
    result = ellm("simulate", "-n", 60, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.exists() or "matplotlib is not installed" in result.output


def test_classes_come_from_a_configuration(tmp_path: Path) -> None:
    """The classes of a cluster's file are those of the requests, in the shares that are given."""
    config, file = tmp_path / "cluster.yaml", tmp_path / "out.json"
    config.write_text("slo: [{name: chat, ttft_ms: 500.0}, {name: batch, ttft_ms: 60000.0}]\n")
    result = ellm("simulate", "-n", 200, "-c", config, "--share", "chat=3", "--share", "batch=1", "--json", file)
    assert result.exit_code == 0, result.output
    counts = {name: one["requests"] for name, one in json.loads(file.read_text())["slo"]["classes"].items()}
    assert 120 < counts["chat"] < 180 and sum(counts.values()) == 200


def test_plan_says_how_many_replicas(tmp_path: Path) -> None:
    """The answer is a sentence, the curve is in the file."""
    file = tmp_path / "plan.json"
    options = ("--request-rate", 20, "-n", 200, "--ttft-ms", 1000, "--tpot-ms", 50, "--step-tokens", 2048)
    result = ellm("plan", *options, "--json", file)
    assert result.exit_code == 0, result.output
    best = json.loads(file.read_text())["best"]
    assert f"{best['replicas']} replicas of llama-3.1-8b-h100" in result.output


def test_plan_fails_where_nothing_reaches_the_goal() -> None:
    """Exit status 1, and what could be changed."""
    result = ellm("plan", "-n", 50, "--ttft-ms", 0.01, "--max-replicas", 2, "--step-tokens", 2048)
    assert result.exit_code == 1
    assert "2 replicas do not reach 99.0%" in result.output


def test_profiles_are_listed_with_their_sources() -> None:
    """``--gpu list`` shows what there is."""
    result = ellm("simulate", "--gpu", "list")
    assert result.exit_code == 0
    assert "llama-3.1-8b-h100: " in result.output and "inference-sim" in result.output
    profiles = json.loads(ellm("plan", "--gpu", "list", "--json", "-").stdout)["profiles"]
    assert [f"{one['name']}: {one['kv_tokens']} KV tokens; {one['source']}" for one in profiles] == (
        result.stdout.splitlines()
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpu", "tpu"], "no engine profile 'tpu': give one of"),
        (["--policy", "best"], "--policy 'best' does not exist: give one of predicted"),
        (["--replicas", 0], "--replicas 0 is too small"),
        (["--fault", "node:0"], "--fault 'node:0' does not fit"),
        (["--fault", "replica:9@1+1"], "there are 4 replicas, from 0"),
        (["--ttft-ms", -1], "--ttft-ms -1 does not fit"),
        (["--request-rate", 0], "--request-rate 0 does not fit"),
        (["--limit", 5], "--limit belongs to a trace"),
        (["--trace", "no.csv"], "no such trace: no.csv"),
        (["--trace", "no.csv", "-n", 5], "--num-requests belongs to made-up requests"),
        (["--share", "gold=1"], "--share 'gold=1' does not fit: give CLASS=NUMBER with one of standard"),
        (["--max-replicas", 2], "--max-replicas 2 is less than --replicas 4"),
        (["--records"], "--records needs a place"),
        (["--plot", "out.pdf"], "give a file that ends in .png"),
        (["--step-tokens", 8], "--step-tokens 8 is too small: give at least 256"),
    ],
)
def test_bad_input_is_answered_with_what_would_work(args: list[object], words: str) -> None:
    """Exit status 1 and one line, no traceback."""
    result = (
        ellm("simulate", "-n", 20, *args) if "-n" not in args and "--trace" not in args else ellm("simulate", *args)
    )
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
