"""The commands ``ellm simulate`` and ``ellm plan``. Light until they run: numpy and the simulator wait for them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.bench.command import JSON_HELP, STANDARD_OUTPUT, check_output, write_json
from cluster.bench.errors import BenchError
from memory_agent.errors import SettingsError

if TYPE_CHECKING:
    from cluster.config import SloClass
    from cluster.simulator.arrivals import Arrival
    from cluster.simulator.plan import Point
    from cluster.simulator.scenario import Scenario
    from replicas.engine_profile import EngineProfile

_Gpu = Annotated[
    str,
    typer.Option("--gpu", "--profile", help="Engine profile: a name, or a YAML file; `--gpu list` shows the names."),
]
_Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file whose section slo gives the classes of requests.")
]
_Ttft = Annotated[float | None, typer.Option(help="TTFT target in ms, without --config.", show_default="2000")]
_Tpot = Annotated[float | None, typer.Option(help="TPOT target in ms, without --config.", show_default="200")]
_Share = Annotated[
    list[str] | None, typer.Option("--share", help="Part of the requests in a class: interactive=0.7; repeat it.")
]
_Tenants = Annotated[int, typer.Option(help="Tenants that the requests come from, by chance.")]
_Trace = Annotated[Path | None, typer.Option(help="CSV of Azure's LLM inference traces, or JSONL of Mooncake.")]
_Limit = Annotated[int | None, typer.Option(help="Requests of the trace.", show_default="all")]
_Scale = Annotated[float | None, typer.Option(help="2 replays the trace twice as fast.", show_default="1")]
_Rate = Annotated[
    float | None, typer.Option(help="Requests a second on average.", show_default="the trace's own; 10 without one")
]
_Number = Annotated[int | None, typer.Option("--num-requests", "-n", help="Made-up requests.", show_default="2000")]
_Burstiness = Annotated[float | None, typer.Option(help="Shape of the gamma intervals: 1 Poisson.", show_default="1")]
_BurstFactor = Annotated[
    float | None,
    typer.Option(help="The rate is so many times higher in bursts of 10 s, one a minute.", show_default="1"),
]
_Input = Annotated[int | None, typer.Option(help="Median prompt of made-up requests.", show_default="1024")]
_Output = Annotated[int | None, typer.Option(help="Median answer of made-up requests.", show_default="200")]
_Prefix = Annotated[int | None, typer.Option(help="Shared tokens before half of the prompts.", show_default="0")]
_Seed = Annotated[int, typer.Option(help="Of everything that is left to chance.")]
_Json = Annotated[Path | None, typer.Option("--json", help=JSON_HELP)]
_Plot = Annotated[Path | None, typer.Option(help="Write the plots to this PNG file.")]
_Policy = Annotated[
    list[str] | None,
    typer.Option(help="Routing policy; several are compared; all: every one.", show_default="predicted"),
]


def simulate(
    gpu: _Gpu = "llama-3.1-8b-h100",
    replicas: Annotated[int, typer.Option(help="Replicas of the model.")] = 4,
    policy: _Policy = None,
    routers: Annotated[int, typer.Option(help="Ingresses that route by the same reports.")] = 1,
    per_node: Annotated[int, typer.Option(help="Replicas on a node.")] = 8,
    static: Annotated[bool, typer.Option("--static", help="Static memory instead of elastic.")] = False,
    step_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a step.", show_default="the profile's")
    ] = None,
    config: _Config = None,
    ttft_ms: _Ttft = None,
    tpot_ms: _Tpot = None,
    share: _Share = None,
    tenants: _Tenants = 1,
    admission: Annotated[bool, typer.Option(help="Requests wait at the door, by class and deadline.")] = False,
    batch_sizing: Annotated[bool, typer.Option(help="The controller bounds steps and batches by TPOT.")] = False,
    migration: Annotated[bool, typer.Option(help="Requests move from full or late replicas to others.")] = False,
    max_replicas: Annotated[int | None, typer.Option(help="Scale up to so many.", show_default="no scaling")] = None,
    start: Annotated[float, typer.Option(help="Seconds until a replica that is started is ready.")] = 60.0,
    fault: Annotated[
        list[str] | None, typer.Option(help="Such as replica:3@10+20, node:0@30+5, slow:1@5+20x4; repeat it.")
    ] = None,
    trace: _Trace = None,
    limit: _Limit = None,
    time_scale: _Scale = None,
    request_rate: _Rate = None,
    num_requests: _Number = None,
    burstiness: _Burstiness = None,
    burst_factor: _BurstFactor = None,
    input_len: _Input = None,
    output_len: _Output = None,
    prefix_len: _Prefix = None,
    seed: _Seed = 0,
    json_file: _Json = None,
    records: Annotated[bool, typer.Option("--records", help="Write each request into the JSON file too.")] = False,
    plot: _Plot = None,
) -> None:
    """Simulate a cluster: the live policies over a model of the engine. The same seed gives the same bytes."""
    console = Console()
    try:
        from cluster.simulator.faults import Fault
        from cluster.simulator.render import draw_result, render_comparison, render_result
        from cluster.simulator.scenario import Scenario
        from cluster.simulator.sim_router import POLICIES

        profile = _profile(gpu, static, step_tokens, json_file)
        classes = _classes(config, ttft_ms, tpot_ms)
        made_up = (num_requests, burstiness, burst_factor, input_len, output_len, prefix_len)
        arrivals = _arrivals(profile, trace, limit, time_scale, request_rate, made_up, seed)
        arrivals = _in_classes(arrivals, classes, share, tenants, seed)
        names = policy or ["predicted"]
        names = list(POLICIES) if names == ["all"] else names
        _check_outputs(json_file, plot, records)
        scenarios = [
            Scenario(
                profile=profile,
                replicas=replicas,
                policy=name,
                routers=routers,
                per_node=per_node,
                classes=classes,
                faults=tuple(Fault.parse(text) for text in fault or ()),
                seed=seed,
                admission=admission,
                batch_sizing=batch_sizing,
                migration=migration,
                scaling=max_replicas is not None,
                replicas_most=max_replicas or 0,
                start_s=start,
            )
            for name in names
        ]
        results = [_run(scenario, arrivals) for scenario in scenarios]
    except (BenchError, SettingsError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    trees = [result.to_json(records) for result in results]
    if json_file is not None:
        write_json(json_file, trees[0] if len(trees) == 1 else {"policies": trees})
    if json_file != STANDARD_OUTPUT:
        console.print(render_result(results[0]) if len(results) == 1 else render_comparison(results))
    if plot is not None:
        typer.echo(draw_result(results[0], plot), err=True)


def plan(
    gpu: _Gpu = "llama-3.1-8b-h100",
    attainment: Annotated[float, typer.Option(help="Share of the requests that should keep their targets.")] = 0.99,
    max_replicas: Annotated[int, typer.Option(help="Most replicas that are tried.")] = 64,
    config: _Config = None,
    ttft_ms: _Ttft = None,
    tpot_ms: _Tpot = None,
    share: _Share = None,
    tenants: _Tenants = 1,
    policy: Annotated[str, typer.Option(help="Routing policy.")] = "predicted",
    step_tokens: Annotated[
        str, typer.Option(help="Largest steps that are tried: they split memory between KV and activations.")
    ] = "2048,8192",
    trace: _Trace = None,
    limit: _Limit = None,
    time_scale: _Scale = None,
    request_rate: _Rate = None,
    num_requests: _Number = None,
    burstiness: _Burstiness = None,
    burst_factor: _BurstFactor = None,
    input_len: _Input = None,
    output_len: _Output = None,
    prefix_len: _Prefix = None,
    seed: _Seed = 0,
    json_file: _Json = None,
    plot: _Plot = None,
) -> None:
    """How many replicas, and which memory split, meet the targets under a load. Exit status 1 where none does."""
    try:
        from cluster.simulator.plan import make_plan
        from cluster.simulator.render import draw_plan, render_plan
        from cluster.simulator.scenario import Scenario

        profile = _profile(gpu, False, None, json_file)
        classes = _classes(config, ttft_ms, tpot_ms)
        made_up = (num_requests, burstiness, burst_factor, input_len, output_len, prefix_len)
        arrivals = _arrivals(profile, trace, limit, time_scale, request_rate, made_up, seed)
        arrivals = _in_classes(arrivals, classes, share, tenants, seed)
        _check_outputs(json_file, plot, False)
        scenario = Scenario(profile, 1, policy, classes=classes, seed=seed)
        with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task("planning", total=None)

            def show(point: "Point") -> None:
                split = f"{'elastic' if point.elastic else 'static'}, steps of {point.step_tokens}"
                progress.update(task, description=f"{split}: {point.replicas} replicas {point.attainment:.1%}")

            found = make_plan(scenario, arrivals, attainment, max_replicas, _numbers(step_tokens), show)
    except (BenchError, SettingsError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if json_file is not None:
        write_json(json_file, found.to_json())
    as_text = json_file != STANDARD_OUTPUT
    if as_text:
        Console().print(render_plan(found))
    if plot is not None:
        typer.echo(draw_plan(found, plot), err=True)
    best = found.best
    if best is None:
        typer.echo(
            f"error: {max_replicas} replicas do not reach {attainment:.1%}: give a larger --max-replicas, or targets "
            "that one request alone can meet",
            err=True,
        )
        raise typer.Exit(1)
    if as_text:
        typer.echo(
            f"{best.replicas} replicas of {profile.name}, {'elastic' if best.elastic else 'static'} memory, steps of "
            f"at most {best.step_tokens} tokens: {best.attainment:.1%} of the requests keep their targets"
        )


def _run(scenario: "Scenario", arrivals: "Sequence[Arrival]") -> Any:
    from cluster.simulator.simulation import Simulation

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        task = progress.add_task(scenario.policy, total=len(arrivals))
        return Simulation(scenario, arrivals).run(lambda done, total: progress.update(task, completed=done))


def _profile(gpu: str, static: bool, step_tokens: int | None, json_file: Path | None) -> "EngineProfile":
    import msgspec

    from replicas.engine_profile import load_profile, profile_names

    if gpu == "list":
        known = [load_profile(name) for name in profile_names()]
        rows = [{"name": one.name, "kv_tokens": one.kv_tokens, "source": " ".join(one.source.split())} for one in known]
        if json_file is not None:
            check_output(json_file, False)
            write_json(json_file, {"profiles": rows})
        else:
            typer.echo("\n".join(f"{row['name']}: {row['kv_tokens']} KV tokens; {row['source']}" for row in rows))
        raise typer.Exit
    profile = load_profile(gpu)
    if step_tokens is not None:
        if step_tokens < profile.max_num_seqs:
            raise BenchError(f"--step-tokens {step_tokens} is too small: give at least {profile.max_num_seqs}")
        profile = msgspec.structs.replace(profile, max_num_batched_tokens=step_tokens)
    return msgspec.structs.replace(profile, elastic=False) if static else profile


def _classes(config: Path | None, ttft_ms: float | None, tpot_ms: float | None) -> "list[SloClass]":
    from cluster.config import SloClass
    from cluster.config_file import ConfigError, load_config

    if config is not None:
        if ttft_ms is not None or tpot_ms is not None:
            raise BenchError("--ttft-ms and --tpot-ms are for a single class: leave them out, or leave out --config")
        try:
            return list(load_config(config).slo)
        except ConfigError as error:
            raise BenchError(str(error)) from error
    for option, value in (("--ttft-ms", ttft_ms), ("--tpot-ms", tpot_ms)):
        if value is not None and not 0 < value < math.inf:
            raise BenchError(f"{option} {value:g} does not fit: give milliseconds above 0")
    own = SloClass()
    return [SloClass(ttft_ms=float(ttft_ms or own.ttft_ms), tpot_ms=float(tpot_ms or own.tpot_ms))]


def _arrivals(
    profile: "EngineProfile",
    trace: Path | None,
    limit: int | None,
    time_scale: float | None,
    rate: float | None,
    made_up: tuple[int | float | None, ...],
    seed: int,
) -> "list[Arrival]":
    from cluster.bench.traces import read_trace
    from cluster.simulator.arrivals import Synthetic, synthetic_arrivals, trace_arrivals

    options = ("--num-requests", "--burstiness", "--burst-factor", "--input-len", "--output-len", "--prefix-len")
    if trace is not None:
        for option, value in zip(options, made_up, strict=True):
            if value is not None:
                raise BenchError(f"{option} belongs to made-up requests: leave it out, or leave out --trace")
        if rate is not None and time_scale is not None:
            raise BenchError("--request-rate and --time-scale both say how fast the trace is: give one of them")
        return trace_arrivals(read_trace(trace, limit), profile.max_model_len, time_scale or 1.0, rate)
    for option, value in (("--limit", limit), ("--time-scale", time_scale)):
        if value is not None:
            raise BenchError(f"{option} belongs to a trace: give --trace, or leave it out")
    names = ("requests", "burstiness", "burst_factor", "prompt_tokens", "output_tokens", "prefix_tokens")
    given: dict[str, Any] = {name: value for name, value in zip(names, made_up, strict=True) if value is not None}
    shape = Synthetic(**({"requests": 2000, "rate": 10.0 if rate is None else rate} | given))
    return synthetic_arrivals(shape, seed, profile.max_model_len)


def _in_classes(
    arrivals: "list[Arrival]", classes: "Sequence[SloClass]", shares: list[str] | None, tenants: int, seed: int
) -> "list[Arrival]":
    """Requests of each class by ``shares``; equal ones where none are given."""
    from cluster.simulator.arrivals import labelled

    names = [one.name for one in classes]
    parts: dict[str, float] = {}
    for text in shares or ():
        name, _, value = text.partition("=")
        try:
            parts[name] = float(value)
        except ValueError:
            parts[name] = math.nan
        if name not in names or not parts[name] >= 0:
            raise BenchError(f"--share {text!r} does not fit: give CLASS=NUMBER with one of {', '.join(names)}")
    if tenants < 1:
        raise BenchError(f"--tenants {tenants} is too small: give at least 1")
    return labelled(arrivals, parts or dict.fromkeys(names, 1.0), tenants, seed)


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if not all(number >= 1 for number in numbers):
        raise BenchError(f"--step-tokens {text!r} does not fit: give numbers of tokens, such as 2048,8192")
    return numbers


def _check_outputs(json_file: Path | None, plot: Path | None, records: bool) -> None:
    if plot is not None and plot.suffix != ".png":
        raise BenchError(f"--plot {plot} does not fit: give a file that ends in .png")
    check_output(json_file, records)
    if plot is not None:
        check_output(plot, False)
