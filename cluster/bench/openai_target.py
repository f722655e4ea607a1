"""A server that speaks OpenAI's API, as a target.

aiohttp is the client: its C parser leaves the event loop free where hundreds of streams arrive at once. The answer's
events are split and decoded here, one line each, into typed structs that hold only what is measured.
"""

import resource
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
import msgspec
import numpy as np

from cluster.bench.errors import RequestFailed, TargetError
from cluster.bench.target import Chunk, Usage
from cluster.bench.workload import DEFAULT_VOCAB_SIZE, MIN_TOKEN_ID, Request, Tokens

_KEEPALIVE_S = 2.0
"""Below the 5 s after which uvicorn and others close an idle connection: a request on a closing one would fail."""
_CONNECT_S = 30.0
_REASON_CHARS = 300
_NOUNS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea kid body "
    "information back parent face others level office door health person art war history party result change morning "
    "reason research girl guy moment air teacher force education"
)
_WORDS = _NOUNS.split()
"""About one token each with any tokeniser in use."""


@dataclass(frozen=True)
class ServerOptions:
    """Which server, and what each request says beside prompt and length.

    Attributes:
        base_url: with or without /v1.
        model: None takes the first that /v1/models names.
        chat: /v1/chat/completions instead of /v1/completions.
        ignore_eos: generate all tokens asked for; vLLM's extension.
        extra_body: added to every request, over what is there; headers: likewise.
        timeout_s: longest a request may take, from sending to its last token.
        vocab_size: prompts are checked to be taken up to this id.
    """

    base_url: str
    model: str | None = None
    api_key: str | None = None
    chat: bool = False
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 3600.0
    vocab_size: int = DEFAULT_VOCAB_SIZE


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class OpenAITarget:
    """As an async context: connected, the model known, and one short request answered."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._root = options.base_url.rstrip("/").removesuffix("/v1")
        self._url = f"{self._root}/v1/{'chat/completions' if options.chat else 'completions'}"
        self._decoder = msgspec.json.Decoder(_Event)
        self.model = options.model or ""
        self.takes_token_ids = False
        """Prompts are sent as token ids; otherwise as words, whose number of tokens the server decides."""
        self.why_text: str | None = None
        """What the server answered to token ids, where it refused them."""

    async def __aenter__(self) -> "OpenAITarget":
        """Raises TargetError."""
        _allow_many_files()
        options = self._options
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", **options.headers}
        if options.api_key:
            headers["Authorization"] = f"Bearer {options.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=options.timeout_s, sock_connect=_CONNECT_S),
            headers=headers,
        )
        try:
            self.model = await self._find_model()
            await self._probe()
        except BaseException:  # undone whatever the reason, then raised again
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    def stream(self, request: Request) -> AsyncIterator[Chunk | Usage]:
        return self._answer(self._body(request.prompt, request.output_len))

    async def _answer(self, body: bytes) -> AsyncIterator[Chunk | Usage]:
        finished, rest = False, b""
        try:
            async with self._session.post(self._url, data=body) as response:
                if response.status != 200:
                    raise RequestFailed(f"status {response.status}: {_reason(await response.read())}")
                async for data in response.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if not line.startswith(b"data:"):
                            continue
                        payload = line[5:].strip()
                        if payload == b"[DONE]":
                            finished = True
                            continue
                        event = self._decoder.decode(payload)
                        if event.error is not None:
                            raise RequestFailed(f"the stream ended with an error: {_reason(payload)}")
                        if event.choices:
                            finished |= event.choices[0].finish_reason is not None
                            if _carries_token(event.choices[0]):
                                yield Chunk()
                        if event.usage is not None:
                            yield Usage(event.usage.prompt_tokens, event.usage.completion_tokens)
        except TimeoutError as error:
            raise RequestFailed(f"no complete answer within {self._options.timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}"[:_REASON_CHARS]) from error
        except msgspec.DecodeError as error:
            raise RequestFailed(f"an event is not OpenAI's: {error}") from error
        if not finished:
            raise RequestFailed("the stream broke off without finish_reason or [DONE]")

    def _body(self, prompt: Tokens, output_len: int) -> bytes:
        options = self._options
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if options.chat:
            body["messages"] = [{"role": "user", "content": _text(prompt)}]
            body["max_completion_tokens"] = output_len
        else:
            body["prompt"] = prompt.tolist() if self.takes_token_ids else _text(prompt)
            body["max_tokens"] = output_len
        if options.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body | options.extra_body)

    async def _find_model(self) -> str:
        """The model's name, checked against /v1/models. A server without that route is taken at its word."""
        url, wanted = f"{self._root}/v1/models", self._options.model
        try:
            async with self._session.get(url) as response:
                status, body = response.status, await response.read()
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise TargetError(f"{self._root!r} is no address; it looks like http://127.0.0.1:8000") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TargetError(
                f"no server answers at {self._root} ({error or type(error).__name__}); start one with `ellm serve`, or "
                "name its address with --base-url"
            ) from error
        if status in (401, 403):
            raise TargetError(f"{url} refused the API key (status {status}); give one with --api-key or OPENAI_API_KEY")
        try:
            names = [str(model["id"]) for model in msgspec.json.decode(body)["data"]] if status == 200 else []
        except (msgspec.DecodeError, KeyError, TypeError):
            names = []
        if not names and wanted is None:
            raise TargetError(f"{url} names no model (status {status}); name one with --model")
        if names and wanted is not None and wanted not in names:
            raise TargetError(f"{self._root} does not serve {wanted!r}; give --model one of: {', '.join(names)}")
        return wanted or names[0]

    async def _probe(self) -> None:
        """One request of two tokens in, one out: with token ids first, then with text. Raises TargetError."""
        prompt = np.array([MIN_TOKEN_ID, self._options.vocab_size - 1], dtype=np.int32)
        refusals: list[str] = []
        for takes_token_ids in (False,) if self._options.chat else (True, False):
            self.takes_token_ids = takes_token_ids
            try:
                async for _ in self._answer(self._body(prompt, 1)):
                    pass
            except RequestFailed as error:
                refusals.append(str(error))
            else:
                self.why_text = refusals[0] if refusals else None
                return
        hint = "; a server without vLLM's extension wants --no-ignore-eos" if self._options.ignore_eos else ""
        raise TargetError(f"{self._url} refused a first short request: {refusals[-1]}{hint}")


def _carries_token(choice: _Choice) -> bool:
    """Every chunk but the one by which a chat announces its role: that one can come before the first token. A chunk
    without text can carry a token that ends inside a character."""
    delta = choice.delta
    if delta is None or delta.role is None:
        return True
    return bool(delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls)


def _text(prompt: Tokens) -> str:
    """A word for each token id: equal ids give equal words."""
    return " ".join(_WORDS[token % len(_WORDS)] for token in prompt.tolist())


def _reason(body: bytes) -> str:
    """The message in an error of OpenAI's form, or the beginning of the body."""
    try:
        answer = msgspec.json.decode(body)
        error = answer.get("error", answer)
        message = str(error.get("message", error))
    except (msgspec.DecodeError, AttributeError):
        message = body.decode(errors="replace")
    return " ".join(message.split())[:_REASON_CHARS]


def _allow_many_files() -> None:
    """Raise this process's soft limit of open files to the hard one: every stream is a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
