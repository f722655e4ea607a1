"""The OpenAI API of a real cluster, through HTTP: two elastic replicas of a real model behind one ingress."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

DEADLINE_S = 30.0
FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather of a city",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def api(cluster: str) -> OpenAI:
    return OpenAI(base_url=f"{cluster}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
async def async_api(cluster: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{cluster}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def http(cluster: str) -> httpx.Client:
    return httpx.Client(base_url=cluster, timeout=60, trust_env=False)


def gauge(http: httpx.Client, name: str) -> list[float]:
    """Values of a metric, one an engine or model."""
    lines = http.get("/metrics").text.splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}(\{{|$)", line)]


def until(reached: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.1)


def test_models_lists_the_served_model(api: OpenAI, model: str) -> None:
    """/v1/models names the model that requests use."""
    assert [card.id for card in api.models.list()] == [model]


def test_chat_answers(api: OpenAI, model: str) -> None:
    """A greedy chat gives the model's real answer, with usage that adds up."""
    answer = api.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_tokens=16)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat_is_the_same_answer_in_pieces(api: OpenAI, model: str) -> None:
    """A stream comes in several pieces, ends with its reason and usage, and is the answer without streaming."""
    whole = api.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_tokens=12)
    chunks = list(
        api.chat.completions.create(
            model=model,
            messages=FRANCE,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage


def test_completion_and_its_stream(api: OpenAI, model: str) -> None:
    """A text completion has exactly the tokens asked for, streamed and not."""
    asked: dict[str, Any] = {"model": model, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    asked["extra_body"] = {"ignore_eos": True}
    whole = api.completions.create(**asked)
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (8, "length")
    assert "Paris" in whole.choices[0].text
    streamed = api.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_several_answers_to_one_prompt(api: OpenAI, model: str) -> None:
    """n = 2 gives two answers with their indices; with a seed and temperature they differ."""
    answer = api.chat.completions.create(model=model, messages=FRANCE, n=2, temperature=1.5, seed=1, max_tokens=24)
    assert sorted(choice.index for choice in answer.choices) == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content


def test_several_prompts_in_one_request(api: OpenAI, model: str) -> None:
    """A list of prompts gives an answer to each, in order."""
    prompts = ["The capital of France is", "One, two, three,"]
    answer = api.completions.create(model=model, prompt=prompts, temperature=0, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text
    assert "four" in answer.choices[1].text


def test_forced_tool_call(api: OpenAI, model: str) -> None:
    """A tool that is named must be called: the answer is a call of it whose arguments fit its schema."""
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Weather in Paris?"}],
        tools=WEATHER,
        tool_choice=choice,
        temperature=0,
        max_tokens=64,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_tools_may_be_left_alone(api: OpenAI, model: str) -> None:
    """With automatic tool choice a request with tools is answered, by text or by a call."""
    answer = api.chat.completions.create(
        model=model, messages=FRANCE, tools=WEATHER, tool_choice="auto", temperature=0, max_tokens=32
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_structured_output_fits_its_schema(api: OpenAI, model: str) -> None:
    """With a JSON schema the answer is JSON that fits it."""
    answer = api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Describe a person."}],
        temperature=0,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 99


def test_stop_string_ends_the_answer(api: OpenAI, model: str) -> None:
    """A stop string ends the answer before it, inside a stream too, and frees the request in its engine."""
    asked: dict[str, Any] = {"model": model, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 40, "stop": ["7"]}
    answer = api.completions.create(**asked)
    assert answer.choices[0].finish_reason == "stop"
    assert "6" in answer.choices[0].text
    assert "7" not in answer.choices[0].text
    streamed = api.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_logprobs_of_tokens(api: OpenAI, model: str) -> None:
    """Each token comes with its log probability and those of the best alternatives, the greedy one first."""
    answer = api.chat.completions.create(
        model=model, messages=FRANCE, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0


def test_prompt_logprobs_cross_the_hop(http: httpx.Client, model: str) -> None:
    """Log probabilities of the prompt, the largest thing that a replica sends back, arrive for each token but the
    first."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 1, "prompt_logprobs": 1}
    answer = http.post("/v1/completions", json=body).json()
    prompt_logprobs = answer["choices"][0]["prompt_logprobs"]
    assert len(prompt_logprobs) == answer["usage"]["prompt_tokens"]
    assert prompt_logprobs[0] is None
    assert all(prompt_logprobs[1:])


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "no-such-model", "messages": FRANCE}, 404, "no-such-model"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "maximum context length"),
        ({"messages": FRANCE, "max_tokens": 5000}, 400, "max_tokens"),
        ({"messages": FRANCE, "temperature": "hot"}, 400, "temperature"),
        ({"messages": FRANCE, "temperature": -1}, 400, "temperature"),
        ({"messages": "hello"}, 400, "messages"),
        ({}, 400, "messages"),
        ({"messages": FRANCE, "n": 0}, 400, "n"),
        ({"messages": FRANCE, "response_format": {"type": "json_schema"}}, 400, "json_schema"),
    ],
)
def test_bad_requests(http: httpx.Client, model: str, body: dict[str, Any], status: int, says: str) -> None:
    """A request that cannot be served gets a 4xx in OpenAI's error form that names the cause."""
    answer = http.post("/v1/chat/completions", json={"model": model} | body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_malformed_json(http: httpx.Client) -> None:
    """A body that is no JSON gets a 400 in OpenAI's error form."""
    answer = http.post("/v1/chat/completions", content='{"model": ', headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_errors_are_what_the_client_library_expects(api: OpenAI) -> None:
    """The openai client raises its own error for an unknown model."""
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.chat.completions.create(model="no-such-model", messages=FRANCE)


def test_routes_that_do_not_work_say_so(http: httpx.Client) -> None:
    """A route of vLLM's API that does not work on a cluster answers 404 with the reason."""
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"})
    assert answer.status_code == 404
    assert "LoRA" in answer.json()["error"]["message"]


def test_health_and_status(http: httpx.Client, model: str) -> None:
    """/health is 200, and /ellm/status shows both replicas with their memory."""
    assert http.get("/health").status_code == 200
    snapshot = http.get("/ellm/status").json()
    replicas = [r for node in snapshot["nodes"] for device in node["devices"] for r in device["replicas"]]
    assert [replica["model"] for replica in replicas].count(model) == 2
    assert all(replica["held_bytes_os"] > 0 for replica in replicas if replica["model"] == model)


def test_metrics_count_real_tokens(http: httpx.Client, api: OpenAI, model: str) -> None:
    """vLLM's counters follow what is generated: seven tokens more after a request of seven tokens."""
    before = sum(gauge(http, "vllm:generation_tokens_total"))
    api.completions.create(model=model, prompt="Hello", max_tokens=7, extra_body={"ignore_eos": True})
    until(lambda: sum(gauge(http, "vllm:generation_tokens_total")) == before + 7, "seven more tokens")


def test_disconnect_ends_the_request_in_its_engine(http: httpx.Client, model: str) -> None:
    """A client that goes away in the middle of a stream frees its request: nothing is in flight or running after
    it."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1900, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        for _ in range(6):
            next(lines)
        until(lambda: sum(gauge(http, "vllm:num_requests_running")) == 1, "the request is seen running")
        assert gauge(http, "ellm_requests_in_flight") == [1.0]
    until(lambda: gauge(http, "ellm_requests_in_flight") == [0.0], "the ingress has let go")
    until(lambda: sum(gauge(http, "vllm:num_requests_running")) == 0, "the engine has let go")


def test_disconnect_without_a_stream(http: httpx.Client, model: str) -> None:
    """A client that goes away while it waits for a whole answer frees its request too."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1900, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=0.8)
    until(lambda: gauge(http, "ellm_requests_in_flight") == [0.0], "the ingress has let go")
    until(lambda: sum(gauge(http, "vllm:num_requests_running")) == 0, "the engine has let go")


async def test_mixed_requests_at_once(async_api: AsyncOpenAI, http: httpx.Client, model: str) -> None:
    """Eight different requests at once all get what they asked for, and both replicas work on them."""

    async def count(tokens: int) -> int:
        answer = await async_api.completions.create(
            model=model, prompt="Once upon a time", max_tokens=tokens, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    async def streamed(tokens: int) -> int:
        chunks = await async_api.completions.create(
            model=model,
            prompt="The sea",
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        usage = [chunk.usage async for chunk in chunks if chunk.usage is not None]
        return usage[-1].completion_tokens

    async def capital() -> str:
        answer = await async_api.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_tokens=12)
        return answer.choices[0].message.content or ""

    async def watch() -> list[float]:
        most = [0.0, 0.0]
        while True:
            running = await asyncio.to_thread(gauge, http, "vllm:num_requests_running")
            most = [max(pair) for pair in zip(most, running, strict=True)]
            if min(most) > 0:
                return most
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    plain, streams, texts = await asyncio.gather(
        asyncio.gather(*(count(tokens) for tokens in (48, 40, 33))),
        asyncio.gather(*(streamed(tokens) for tokens in (48, 40, 33))),
        asyncio.gather(capital(), capital()),
    )
    assert plain == [48, 40, 33]
    assert streams == [48, 40, 33]
    assert all("Paris" in text for text in texts)
    async with asyncio.timeout(DEADLINE_S):
        assert min(await watching) > 0
