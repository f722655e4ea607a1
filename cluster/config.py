"""The configuration of a cluster: one tree of models, read once at the edge by ``cluster.config_file``.

    ClusterConfig
    +-- models: list[ModelConfig]     what is served, and by how many replicas
    +-- memory: MemoryConfig          KV bytes that the engines of one device share
    +-- http: HttpConfig              where the OpenAI API listens, and what clients may send
    +-- auth: AuthConfig              who may use it
    +-- slo: list[SloClass]           latency targets
    +-- admission: AdmissionConfig    who waits in front of the replicas, who is refused
    +-- routing: RoutingConfig        how a replica is chosen for a request
    +-- controller: ControllerConfig  what the controller sets for every replica

The docstring under a field is its documentation, that of an "after" validator the rule that it holds: ``ellm config
example`` and docs/configuration.md (``cluster.config_page``) are printed from them. Names follow vLLM and Ray Serve
where they have one. Values are strict: text is not taken for a number. "auto" and null are both None here: the sizes
follow from the model and the machine (``cluster.sizing``).
"""

import os
import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from cluster.default_model import DEFAULT_MODEL_NAME

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_REPLICAS = 2
_TAKEN_ARGS = {
    "model": "use the key source",
    "served_model_name": "use the key name",
    "kv_cache_memory_bytes": "use the key kv_ceiling",
    "gpu_memory_utilization": "use the key kv_ceiling, or memory.budget",
    "enable_prefix_caching": "it is always on",
    "scheduler_cls": "use the key elastic",
    "worker_cls": "use the key elastic",
    "kv_transfer_config": "use the key elastic",
} | {
    key: f"use the key {key}"
    for key in (
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "tensor_parallel_size",
        "async_scheduling",
    )
}
"""vLLM arguments that are decided elsewhere, and where."""


def parse_size(value: object) -> object:
    """Bytes of a size such as 1048576, "512MiB" or "1.5 GB"; None for "auto". Raises ValueError for anything else."""
    if value is None or value == "auto":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise ValueError('should be a size such as "512MiB" or "2GiB" (KB, MB, GB, TB count in thousands), or "auto"')
    return int(float(match[1]) * _UNITS[match[2]])


def _absolute(path: str) -> str:
    """Of a path from here: other processes have other working directories."""
    return os.path.abspath(os.path.expanduser(path))


def _printable(name: str) -> str:
    """Raises ValueError for a name that a log or a terminal would take for more than a name, and no path can have."""
    if odd := next((sign for sign in name if not sign.isprintable()), None):
        raise ValueError(
            f"should have printable characters alone, found {odd!r}; where it is the source's name set the key name"
        )
    return name


def _auto(value: object) -> object:
    return None if value == "auto" else value


_Positive = Annotated[int, Field(ge=1)]
Size = Annotated[
    _Positive | None,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}, {"type": "null"}]}),
]
Count = Annotated[
    _Positive | None,
    BeforeValidator(_auto),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}, {"type": "null"}]}),
]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class AutoscalingConfig(_Section):
    """Bounds between which the number of replicas follows the model's demand; Ray Serve's names. Left out, it is
    `replicas` always. Memory is planned for the most."""

    min_replicas: Annotated[int, Field(ge=0, le=32)] | None = None
    """Fewest replicas. 0: a model that nobody asks for ends its replicas, and starts one with the next request, which
    waits for it. null: as many as `replicas`."""
    max_replicas: Annotated[int, Field(ge=1, le=32)] | None = None
    """Most replicas. null: as many as `replicas`."""
    downscale_delay_s: float = Field(default=120.0, ge=0)
    """How long fewer replicas must be enough before one ends. Requests that it has go on to their end, for at most ten
    minutes."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """`max_replicas` is at least `min_replicas`."""
        least, most = self.min_replicas, self.max_replicas
        if least is not None and most is not None and least > most:
            raise ValueError(f"max_replicas ({most}) should be at least min_replicas ({least})")
        return self


class ModelConfig(_Section):
    """One model and its replicas."""

    name: Annotated[str, AfterValidator(_printable)] = Field(default=DEFAULT_MODEL_NAME, min_length=1, max_length=100)
    """Name that requests use as "model": printable characters, it is a part of paths, logs and metrics. Left out: the
    hub id, or the last part of the folder's path."""
    source: str = Field(default="default", min_length=1)
    """Folder of a checkpoint (config.json, *.safetensors, tokenizer), a hub id such as "Qwen/Qwen3-0.6B", or
    "default"."""
    replicas: int = Field(default=_REPLICAS, ge=1, le=32)
    """Engine replicas of this model, at its start where their number changes. They share the device's KV budget."""
    autoscaling_config: AutoscalingConfig = Field(default_factory=AutoscalingConfig)
    """How the number of replicas follows the demand."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and KV cache. auto: the checkpoint's own, bfloat16 where that is float32. On an x86 CPU without
    AVX-512, which is far slower in bfloat16: float32."""
    max_model_len: Count = None
    """Tokens of one longest request, prompt and output. auto: the model's own limit, at most 8192."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most requests that one replica runs at once."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Most tokens that one step of a replica computes; longer prompts are computed in chunks."""
    guarantee: Size = None
    """Bytes of memory.budget that one replica can always get. auto: what one longest request needs."""
    kv_ceiling: Size = None
    """Most KV bytes that one replica can ever hold, inside memory.budget. auto: the whole budget."""
    weight: float = Field(default=1.0, ge=0.001, le=1e6)
    """Part of what several replicas want at once, beyond their guarantees, and of what nobody wants, against others'
    weights."""
    elastic: bool = True
    """false: plain vLLM with kv_ceiling of KV memory held all the time, beside memory.budget. auto is then two longest
    requests."""
    async_scheduling: bool | None = None
    """Prepare the next step while one runs. null: what vLLM chooses for the platform (off on CPU)."""
    paced_tokens_per_s: float | None = Field(default=None, ge=0)
    """Answer with made-up tokens, so many a second and request, instead of running an engine: for tests and benchmarks
    of everything around it, with elastic: false. 0: as fast as they are taken. null: run the engine."""
    tensor_parallel_size: Literal[1] = 1
    """Devices that one replica spans. Only 1 works yet."""
    tool_call_parser: str | None = "hermes"
    """vLLM's parser that finds tool calls in the output, with automatic tool choice. null: tools are refused."""
    reasoning_parser: str | None = None
    """vLLM's parser that separates reasoning from the answer, for models that reason. null: none."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's AsyncEngineArgs, passed as they are: for example {block_size: 64}. On CPU
    enforce_eager is true unless it is set here."""

    @model_validator(mode="before")
    @classmethod
    def _name_from_source(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("name") is None and isinstance(data.get("source"), str):
            data = {**data, "name": name_of_source(data["source"])}
        return data

    @model_validator(mode="before")
    @classmethod
    def _replicas_from_bounds(cls, data: Any) -> Any:
        """Where replicas is left out its default gives way to the bounds."""
        bounds = data.get("autoscaling_config") if isinstance(data, Mapping) else None
        if not isinstance(bounds, Mapping) or "replicas" in data:
            return data
        least, most = bounds.get("min_replicas"), bounds.get("max_replicas")
        replicas = max(_REPLICAS, least) if isinstance(least, int) else _REPLICAS
        return {**data, "replicas": min(replicas, most) if isinstance(most, int) and most >= 1 else replicas}

    @model_validator(mode="after")
    def _replicas_in_bounds(self) -> Self:
        """`replicas` lies between `autoscaling_config.min_replicas` and `max_replicas`; left out, it follows them."""
        if not self.least_replicas <= self.replicas <= self.most_replicas:
            raise ValueError(
                f"replicas ({self.replicas}) should be at least autoscaling_config.min_replicas "
                f"({self.least_replicas}) and at most autoscaling_config.max_replicas ({self.most_replicas}): it is "
                "how many the model begins with"
            )
        return self

    @property
    def least_replicas(self) -> int:
        """Fewest replicas at a time."""
        least = self.autoscaling_config.min_replicas
        return self.replicas if least is None else least

    @property
    def most_replicas(self) -> int:
        """Most replicas at a time: what memory is planned for."""
        most = self.autoscaling_config.max_replicas
        return self.replicas if most is None else most

    @property
    def scales(self) -> bool:
        """Whether their number changes."""
        return self.least_replicas < self.most_replicas

    @property
    def replicas_shown(self) -> str:
        """For people: "2", or "1 to 4"."""
        return f"{self.least_replicas} to {self.most_replicas}" if self.scales else str(self.replicas)

    @model_validator(mode="after")
    def _no_second_source_of_truth(self) -> Self:
        """`engine_args` has no argument for which there is a key here, or which elastic memory needs: the error names
        what to use instead. `max_num_batched_tokens` is at least `max_num_seqs`. With `paced_tokens_per_s`, `elastic`
        is false."""
        for key in self.engine_args:
            if remedy := _TAKEN_ARGS.get(key):
                raise ValueError(f"engine_args.{key} cannot be set here: {remedy}")
        if self.paced_tokens_per_s is not None and self.elastic:
            raise ValueError("paced_tokens_per_s runs no engine, so there is no memory to share: set elastic: false")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) should be at least max_num_seqs "
                f"({self.max_num_seqs}): each running request computes one token a step"
            )
        return self


class MemoryConfig(_Section):
    """The KV memory of one device: of this host, or of one GPU where vLLM's GPU build is installed."""

    budget: Size = None
    """KV bytes that all engines of the device share, with activations if these are charged; an engine that starts takes
    what loading holds for a while from it too. auto: twice what one longest request of each needs, at least 1GiB, if
    free; on a GPU all that is free."""
    activations: bool = False
    """true: activations count against the budget too. A step computes as many tokens as their activations fit, and
    where the budget is tight gives their memory back at once. Experimental."""
    host_buffer: Size = None
    """Bytes of host memory, beside the budget, in which each elastic replica keeps KV blocks that left the budget, to
    load them instead of computing them again. It also lets it compute prompts before there is memory to decode them.
    auto: none."""
    fetch_rate: Size = None
    """Most bytes a second of KV that a node takes from other nodes, with requests that move there. What takes more than
    eight seconds so is not moved. auto: no bound."""
    rest: Size = None
    """KV bytes that an idle engine shrinks to, at most what one longest request needs. auto: a 64th of its ceiling, at
    least two KV blocks."""


class HttpLimits(_Section):
    """What clients may send to the API, and how slowly."""

    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    """Most bytes of a request's body; more are refused with 413."""
    max_header_bytes: int = Field(default=64 << 10, ge=1024)
    """Most bytes of a request's head; a longer one ends the connection."""
    max_sequences: int = Field(default=128, ge=1)
    """Most answers of one request: prompts times n."""
    header_timeout_s: float = Field(default=30.0, gt=0)
    """How long a request's head may take, from the connection or its first byte on."""
    body_timeout_s: float = Field(default=120.0, gt=0)
    """How long a request's body may take."""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """How long a client may read nothing of an answer that waits for it; then the connection is ended, and with it the
    request."""


class HttpConfig(_Section):
    """Where the OpenAI API listens."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 for all. Another one than this host's own (127.0.0.1) needs API keys, see auth."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port of the API, /health, /metrics and /ellm/status."""
    ingress_replicas: int = Field(default=1, ge=1, le=64)
    """Processes that tokenise, route and stream; those of a host share the port. One is right up to a few thousand
    tokens a second."""
    ssl_certfile: Annotated[str, Field(min_length=1), AfterValidator(_absolute)] | None = None
    """PEM file with the server's certificate and those that lead to its authority. The API then takes TLS alone. null:
    no TLS."""
    ssl_keyfile: Annotated[str, Field(min_length=1), AfterValidator(_absolute)] | None = None
    """PEM file with the certificate's key. null: it is in ssl_certfile."""
    limits: HttpLimits = Field(default_factory=HttpLimits)
    """What clients may send, and how slowly."""

    @model_validator(mode="after")
    def _key_has_certificate(self) -> Self:
        """`ssl_keyfile` needs `ssl_certfile`."""
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile is of no use without ssl_certfile: name the certificate's file too")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach the API."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class AuthConfig(_Section):
    """Who may use the API."""

    keys_file: Annotated[str, Field(min_length=1), AfterValidator(_absolute)] | None = None
    """File with the API keys, on every node that runs an ingress; `ellm keys create` adds one. It is read again when it
    changes. null: no keys, and anybody who reaches the API may use it."""
    allow_open: bool = False
    """true: listen on an address that others can reach though there are no keys, as behind a gateway that asks for its
    own."""


class SloClass(_Section):
    """Latency targets of one class of requests. A request names its class in the header x-slo-class, and targets of its
    own in x-slo-ttft-ms and x-slo-tpot-ms; the first class is the default. The first class's targets also decide how
    many prompts the host buffer lets in before there is memory to decode them."""

    name: str = Field(default="standard", min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the class: letters, digits, dots, dashes and underscores."""
    ttft_ms: float = Field(default=2000.0, gt=0)
    """Target of the time to the first token, in milliseconds."""
    tpot_ms: float = Field(default=200.0, gt=0)
    """Target of the time per output token after the first, in milliseconds."""
    weight: float = Field(default=1.0, ge=0.001, le=1e6)
    """Part of the cluster's work under overload, against other classes' weights."""
    deadline_ms: Annotated[float, Field(gt=0)] | None = None
    """Target of the whole answer, in milliseconds: a request that outlives it is ended, with 504 where its response has
    not begun. null: none."""
    sheddable: bool = True
    """Whether requests are refused, with 429, where their first token would come too late. false: they wait."""


class AdmissionConfig(_Section):
    """The queue in front of a model's replicas. Requests wait there, in the order that their classes deserve, rather
    than in the engines, which serve them as they come."""

    enabled: bool = True
    """false: every request goes to a replica at once."""
    max_requests: int = Field(default=4096, ge=1)
    """Most requests of one model that wait; more are refused with 429. Ingress processes have equal parts of it."""
    max_tokens: int = Field(default=20_000_000, ge=1)
    """Most tokens, of prompts and expected answers, that wait; likewise."""


class RoutingConfig(_Section):
    """How a replica is chosen for a request."""

    policy: Literal["predicted", "load"] = "predicted"
    """predicted: by the latency that each replica is predicted to have, against the request's targets; who has computed
    the beginning of a prompt is faster. load: by running and waiting requests, and memory pressure; it also decides
    where nothing can be predicted."""


class ControllerConfig(_Section):
    """What the controller sets for every replica."""

    batch_sizing: bool = True
    """true: it bounds the tokens of a step and the requests at once so that the tightest TPOT target holds, of the
    requests that run or else of the classes; and gives a replica that is late fewer requests where another one has
    room. false: the two bounds below are all."""
    migration: bool = True
    """true: where a replica is short of KV memory or late and another one has room, it has requests go there; those
    that run take their KV along. false: they move only where somebody asks for it, or their replica drains or ends."""
    token_budget_max: int = Field(default=0, ge=0)
    """Most tokens a step of a replica may schedule; 0 leaves max_num_batched_tokens."""
    active_max: int = Field(default=0, ge=0)
    """Most requests a replica may run at once; 0 leaves max_num_seqs."""


class ClusterConfig(_Section):
    """Configuration of a cluster. Every key may be left out."""

    models: list[ModelConfig] = Field(default_factory=lambda: [ModelConfig()], min_length=1)
    """The models that are served. Their names must differ."""
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    """KV memory of one device."""
    http: HttpConfig = Field(default_factory=HttpConfig)
    """The API server."""
    auth: AuthConfig = Field(default_factory=AuthConfig)
    """Who may use the API."""
    slo: list[SloClass] = Field(default_factory=lambda: [SloClass(sheddable=False)], min_length=1)
    """Latency targets by class. Left out: one class, of which nobody is refused for being late, or held back for the
    others' TPOT."""
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    """Who waits in front of the replicas, and who is refused."""
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    """How a replica is chosen for a request."""
    controller: ControllerConfig = Field(default_factory=ControllerConfig)
    """Targets of every replica."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        """No two models, and no two classes, have the same name."""
        for what, names in (("models", [m.name for m in self.models]), ("slo", [s.name for s in self.slo])):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"two entries of {what} are named {twice!r}: give each its own name")
        return self

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> Self:
        """An `http.host` that others can reach needs `auth.keys_file`, or `auth.allow_open: true`."""
        if not (self.http.is_local or self.auth.keys_file or self.auth.allow_open):
            raise ValueError(
                f"http.host {self.http.host} can be reached from other hosts, and there are no API keys: make one with "
                "`ellm keys create` and set auth.keys_file, or set auth.allow_open: true behind a gateway that asks "
                "for keys of its own, or listen on 127.0.0.1"
            )
        return self


def looks_like_path(source: str) -> bool:
    """True where ``source`` can only be a folder: a hub id is "name" or "owner/name"."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1


def name_of_source(source: str) -> str:
    """The name a model gets where none is given."""
    if source == "default":
        return DEFAULT_MODEL_NAME
    return source.rstrip("/").rsplit("/", 1)[-1] if looks_like_path(source) else source
