"""The command ``ellm bench``. Light until it runs: numpy and the HTTP client wait for it."""

import gc
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.bench.errors import BenchError

if TYPE_CHECKING:
    from cluster.bench.arrivals import Arrivals
    from cluster.bench.openai_target import ServerOptions
    from cluster.bench.report import LoadReport, RequestRecord, Slo
    from cluster.bench.workload import Workload

STANDARD_OUTPUT = Path("-")
JSON_HELP = "Write everything to this file; - prints it, in place of the tables."
_DEFAULT_REQUESTS = 100
_DEFAULT_INPUT_LEN = 512
_DEFAULT_OUTPUT_LEN = 128


def bench(
    base_url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model to ask.", show_default="the first of /v1/models")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=["ELLM_API_KEY", "OPENAI_API_KEY"], help="Key of the API.")
    ] = None,
    endpoint: Annotated[Literal["completions", "chat"], typer.Option(help="Route of the API.")] = "completions",
    request_rate: Annotated[
        float | None,
        typer.Option(help="Open loop: requests a second, inf for all at once.", show_default="inf; a trace's times"),
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(help="Shape of the gamma intervals: 1 Poisson, less is burstier, inf constant.", show_default="1"),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: clients that each wait for their answer.")
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option("--num-requests", "-n", help="Random requests to count.", show_default="100")
    ] = None,
    input_len: Annotated[int | None, typer.Option(help="Random prompt's tokens.", show_default="512")] = None,
    output_len: Annotated[int | None, typer.Option(help="Tokens to generate.", show_default="128")] = None,
    range_ratio: Annotated[
        float | None, typer.Option(help="Lengths vary by this share up and down.", show_default="0")
    ] = None,
    prefix_len: Annotated[
        int | None, typer.Option(help="Shared tokens before a random prompt.", show_default="0")
    ] = None,
    num_prefixes: Annotated[int | None, typer.Option(help="Different shared prefixes.", show_default="1")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Replay this: CSV of Azure's LLM inference traces, or JSONL of Mooncake.")
    ] = None,
    time_scale: Annotated[
        float | None, typer.Option(help="2 replays the trace twice as fast.", show_default="1")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Requests of the trace to count.", show_default="all")] = None,
    max_input_len: Annotated[int | None, typer.Option(help="Longest prompt taken from the trace.")] = None,
    max_output_len: Annotated[int | None, typer.Option(help="Longest answer taken from the trace.")] = None,
    fit: Annotated[
        Literal["clip", "scale"] | None,
        typer.Option(help="Longer ones: cut them, or scale all until the longest fits.", show_default="clip"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of lengths, prompts and times.")] = 0,
    warmup: Annotated[int, typer.Option(help="Requests sent ahead that do not count.")] = 0,
    percentiles: Annotated[str, typer.Option(help="Of every latency.")] = "90,95,99",
    goodput: Annotated[
        str | None, typer.Option(help="What a good request keeps, in ms: 'ttft:500 tpot:50 e2el:2000'.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Generate all tokens asked for (vLLM's extension).")] = True,
    extra_body: Annotated[
        str | None, typer.Option(help="JSON object added to every request, such as '{\"temperature\": 0}'.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Prompts use token ids from 1000 to below this.")] = 32000,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 3600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help=JSON_HELP)] = None,
    records: Annotated[bool, typer.Option("--records", help="Write each request into the JSON file too.")] = False,
) -> None:
    """Measure a server that speaks OpenAI's API under load. Exit status 1 where no request was answered."""
    random_options = {
        "--num-requests": num_requests,
        "--input-len": input_len,
        "--output-len": output_len,
        "--range-ratio": range_ratio,
        "--prefix-len": prefix_len,
        "--num-prefixes": num_prefixes,
    }
    trace_options = {
        "--time-scale": time_scale,
        "--limit": limit,
        "--max-input-len": max_input_len,
        "--max-output-len": max_output_len,
        "--fit": fit,
    }
    try:
        import uvloop

        from cluster.bench.openai_target import ServerOptions
        from cluster.bench.report import Slo, parse_percentiles

        if warmup < 0:
            raise BenchError(f"--warmup {warmup} does not fit: give 0 or more")
        if trace is None:
            _refuse(trace_options, "belongs to a trace: give --trace, or leave it out")
            work = _random(random_options, warmup, seed, vocab_size)
        else:
            _refuse(random_options, "belongs to random prompts: leave it out, or leave out --trace")
            work = _replayed(trace, trace_options, warmup, seed, vocab_size)
        arrivals = _arrivals(request_rate, burstiness, concurrency, time_scale, trace is not None)
        check_output(json_file, records)
        options = ServerOptions(
            base_url=base_url,
            model=model,
            api_key=api_key,
            chat=endpoint == "chat",
            ignore_eos=ignore_eos,
            extra_body=_body(extra_body),
            timeout_s=timeout,
            vocab_size=vocab_size,
        )
        slo = Slo.parse(goodput) if goodput is not None else None
        ranks = parse_percentiles(percentiles)
        gc.collect()
        gc.freeze()  # the prompts are not looked through again by every collection during the run
        report = uvloop.run(_measure(options, work, arrivals, seed, warmup, slo, ranks))
    except BenchError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    _show(report, json_file, records)
    if not report.answered:
        raise typer.Exit(1)


async def _measure(
    options: "ServerOptions",
    work: "Workload",
    arrivals: "Arrivals",
    seed: int,
    warmup: int,
    slo: "Slo | None",
    percentiles: tuple[float, ...],
) -> "LoadReport":
    from cluster.bench.load import run_load
    from cluster.bench.openai_target import OpenAITarget

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with OpenAITarget(options) as target:
        if target.why_text is not None:
            typer.echo(
                "note: prompts are sent as words, whose tokens the server counts; it refused token ids: "
                + target.why_text,
                err=True,
            )
        with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
            task = progress.add_task(target.model, total=len(work.requests) - warmup)

            def advance(record: "RequestRecord") -> None:
                progress.advance(task)

            report = await run_load(
                target, work, arrivals, seed=seed, warmup=warmup, slo=slo, percentiles=percentiles, on_done=advance
            )
        report.settings["target"] = {
            "base_url": options.base_url,
            "model": target.model,
            "endpoint": "chat" if options.chat else "completions",
            "prompts": "token ids" if target.takes_token_ids else "words",
            "token_ids_refused": target.why_text,
            "ignore_eos": options.ignore_eos,
            "extra_body": options.extra_body,
            "timeout_s": options.timeout_s,
        }
    return report


def _random(given: dict[str, Any], warmup: int, seed: int, vocab_size: int) -> "Workload":
    from cluster.bench.workload import random_workload

    def value(option: str, default: Any) -> Any:
        return default if given[option] is None else given[option]

    counted = value("--num-requests", _DEFAULT_REQUESTS)
    if counted < 1:
        raise BenchError(f"--num-requests {counted} is too small: give at least 1")
    return random_workload(
        counted + warmup,
        input_len=value("--input-len", _DEFAULT_INPUT_LEN),
        output_len=value("--output-len", _DEFAULT_OUTPUT_LEN),
        range_ratio=value("--range-ratio", 0.0),
        prefix_len=value("--prefix-len", 0),
        prefixes=value("--num-prefixes", 1),
        seed=seed,
        vocab_size=vocab_size,
    )


def _replayed(path: Path, given: dict[str, Any], warmup: int, seed: int, vocab_size: int) -> "Workload":
    from cluster.bench.traces import Fit, read_trace, trace_workload

    limit = given["--limit"]
    if limit is not None and limit < 1:
        raise BenchError(f"--limit {limit} does not fit: give at least 1")
    return trace_workload(
        read_trace(path, None if limit is None else limit + warmup),
        max_input_len=given["--max-input-len"],
        max_output_len=given["--max-output-len"],
        fit=Fit(given["--fit"] or Fit.CLIP),
        seed=seed,
        vocab_size=vocab_size,
        origin=path.name,
    )


def _arrivals(
    rate: float | None, burstiness: float | None, concurrency: int | None, time_scale: float | None, traced: bool
) -> "Arrivals":
    from cluster.bench.arrivals import ClosedLoop, OpenLoop, Replay

    if concurrency is not None:
        others = {"--request-rate": rate, "--burstiness": burstiness, "--time-scale": time_scale}
        _refuse(others, "belongs to an open loop: leave it out, or leave out --concurrency")
        return ClosedLoop(concurrency)
    if rate is None and traced:
        _refuse({"--burstiness": burstiness}, "needs --request-rate; a trace has its own times")
        return Replay(1.0 if time_scale is None else time_scale)
    _refuse({"--time-scale": time_scale}, "belongs to the trace's own times: leave it out, or leave out --request-rate")
    if rate is None or math.isinf(rate):
        _refuse({"--burstiness": burstiness}, "needs a finite --request-rate")
    return OpenLoop(math.inf if rate is None else rate, 1.0 if burstiness is None else burstiness)


def _refuse(options: dict[str, Any], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise BenchError(f"{option} {why}")


def _body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        body = json.loads(text)
    except ValueError as error:
        raise BenchError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BenchError(f"--extra-body should be a JSON object such as '{{\"temperature\": 0}}', found {text[:50]!r}")
    return body


def check_output(file: Path | None, records: bool) -> None:
    """A run can take hours: find out before it that its result has a place."""
    if file is None:
        if records:
            raise BenchError("--records needs a place: give --json FILE too")
    elif file != STANDARD_OUTPUT and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        raise BenchError(f"cannot write {file}: give --json a file in a folder that exists and that you may write to")


def write_json(file: Path, tree: dict[str, Any]) -> None:
    """Into that file, or to standard output."""
    text = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    if file == STANDARD_OUTPUT:
        typer.echo(text, nl=False)
    else:
        file.write_text(text)


def _show(report: "LoadReport", file: Path | None, records: bool) -> None:
    from cluster.bench.render import render_report

    if file is not None:
        write_json(file, report.to_json(records))
    if file != STANDARD_OUTPUT:
        Console().print(render_report(report))
