"""The models of one ingress: built when wanted, withdrawn at once, closed after their last request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from cluster.app import ApiModel
from cluster.model_table import ModelTable, ServedModel
from tests.unit.cluster.model_examples import spec


def api_models(*names: str) -> list[ApiModel]:
    return [ApiModel(spec(name), 1, None, None) for name in names]


class Builder:
    """Builds models that say what becomes of them; a gate keeps a model from being complete, an error fails it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}

    async def __call__(self, model: ApiModel) -> ServedModel:
        name = model.spec.model_name
        self.events.append(f"build {name}")
        if name in self.gates:
            await self.gates[name].wait()
        if name in self.errors:
            raise self.errors[name]

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            self.events.append(f"end {name}")

        async def close() -> None:
            self.events.append(f"close {name}")

        engine: Any = SimpleNamespace(shutdown=lambda: self.events.append(f"shut down {name}"))
        return ServedModel(name, engine, FastAPI(lifespan=lifespan), CollectorRegistry(), close)


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
async def table(builder: Builder) -> AsyncIterator[ModelTable]:
    table = ModelTable(builder)
    yield table
    await table.close()


async def idle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def names(table: ModelTable) -> list[str]:
    return [model.name for model in table.routed]


async def test_models_are_routed_in_the_order_they_are_wanted(table: ModelTable, builder: Builder) -> None:
    """However long each takes to build; each is built once."""
    builder.gates["a"] = asyncio.Event()
    table.follow(api_models("a", "b"))
    await table.until_ready(["b"])
    assert names(table) == ["b"]
    assert table.get("a") is None
    builder.gates["a"].set()
    await table.until_ready(["a", "unknown"])
    table.follow(api_models("a", "b"))
    assert names(table) == ["a", "b"]
    assert builder.events == ["build a", "build b"]
    assert table.state().routed == {"a", "b"}


async def test_a_withdrawn_model_ends_after_its_last_request(table: ModelTable, builder: Builder) -> None:
    """It is not routed from that moment; its requests, and those of others, go on; then it is closed in order."""
    table.follow(api_models("a", "b"))
    await table.until_ready(["a", "b"])
    model = table.get("a")
    assert model is not None
    with table.request(model):
        with table.request(model):
            table.follow(api_models("b"))
            assert (names(table), table.get("a")) == (["b"], None)
            await idle()
            assert table.state().in_flight == {"a": 2, "b": 0}
        await idle()
        assert table.state().in_flight == {"a": 1, "b": 0}
    await idle()
    assert builder.events[2:] == ["end a", "shut down a", "close a"]
    assert table.state().in_flight == {"b": 0}


async def test_a_model_can_come_back(table: ModelTable, builder: Builder) -> None:
    """Under the same name it is built anew."""
    for _ in range(2):
        table.follow(api_models("a"))
        await table.until_ready(["a"])
        table.follow([])
        await idle()
    assert builder.events == 2 * ["build a", "end a", "shut down a", "close a"]


async def test_a_model_that_cannot_be_built_says_why(table: ModelTable, builder: Builder) -> None:
    """The reason stays until the model is not wanted any more; other models are not concerned."""
    builder.errors["a"] = ValueError("no such parser")
    table.follow(api_models("a", "b"))
    await table.until_ready(["a", "b"])
    assert (table.state().failed, names(table)) == ({"a": "ValueError: no such parser"}, ["b"])
    table.follow(api_models("b"))
    await idle()
    assert table.state().failed == {}


async def test_a_model_that_is_withdrawn_while_it_is_built_is_given_up(table: ModelTable, builder: Builder) -> None:
    """Nothing of it is left, and who waits for it is told."""
    builder.gates["a"] = asyncio.Event()
    table.follow(api_models("a"))
    waiting = asyncio.ensure_future(table.until_ready(["a"]))
    await idle()
    table.follow([])
    await asyncio.wait_for(waiting, 5)
    assert (names(table), table.state().in_flight) == ([], {})


async def test_closing_ends_every_model(table: ModelTable, builder: Builder) -> None:
    """Also one with requests, and one that is being built."""
    builder.gates["b"] = asyncio.Event()
    table.follow(api_models("a", "b"))
    await table.until_ready(["a"])
    model = table.get("a")
    assert model is not None
    with table.request(model):
        await table.close()
    assert builder.events[-2:] == ["shut down a", "close a"]
