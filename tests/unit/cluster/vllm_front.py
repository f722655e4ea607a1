"""What an ingress holds for one model, in this process: vLLM's own server over a ClusterCore, behind our HTTP layers.

The replicas are played (``fake_replicas``); templates, tokens, streams and errors are vLLM's.
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.usage.usage_lib import UsageContext

from cluster.api import build_api
from cluster.api_metrics import IngressMetrics, MetricsEndpoint
from cluster.app import ApiModel
from cluster.cluster_status import ControllerAwayError
from cluster.cluster_view import ControllerMeasures
from cluster.config import HttpLimits, SloClass
from cluster.core_client import ClusterCore
from cluster.door import Door
from cluster.engine import ClusterEngine
from cluster.ingress import guard, vllm_args
from cluster.ingress_peers import IngressPeers
from cluster.key_ring import KeyRing
from cluster.malformed import answer_malformed
from cluster.model_table import ModelTable, ServedModel
from cluster.slo_layer import SloLayer
from cluster.slo_ledger import SloLedger
from cluster.slo_reports import SloReports
from replicas.answer_journal import AnswerJournal
from replicas.engine_config import build_engine_args
from replicas.spec import EngineSpec
from tests.unit.cluster.fake_replicas import INFO, FakeHandle, Step

MODEL = "words"
WORDS = 64


def small_checkpoint(folder: Path) -> Path:
    """A model without weights whose tokens are the words w0 to w63, and a chat template that is the last message."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": WORDS, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(model | sizes | {"max_position_embeddings": 128}))
    words = Tokenizer(models.WordLevel({f"w{at}": at for at in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Front:
    """http: a client of ``api``. ledger: what it has counted."""

    http: httpx.AsyncClient
    api: Starlette
    core: ClusterCore
    handle: FakeHandle
    ledger: SloLedger


class VllmServer:
    """vLLM's application over a core, made once: it takes seconds. Belongs to one event loop."""

    def __init__(self, checkpoint: Path) -> None:
        self._spec = EngineSpec(
            MODEL, str(checkpoint), 128, 1 << 20, 1 << 20, 1 << 20, 1, elastic=False, max_num_seqs=8
        )
        self._handle = FakeHandle()
        self._table = ModelTable(self._build)

    async def open(self) -> None:
        self._table.follow([ApiModel(self._spec, 1, None, None)])
        await self._table.until_ready([MODEL])
        assert self._table.routed, self._table.state().failed

    async def close(self) -> None:
        await self._table.close()

    @asynccontextmanager
    async def front(
        self,
        scripts: Sequence[Sequence[Step]],
        classes: Sequence[SloClass],
        door: Door,
        keys: KeyRing | None = None,
        limits: HttpLimits | None = None,
    ) -> AsyncIterator[Front]:
        """An API of its own over replicas that play ``scripts``, with ``door`` in front of them; asks for ``keys``."""
        core, ledger = self._table.routed[0].engine.engine_core, SloLedger()
        self._handle.scripts, self._handle.calls, core.door = list(scripts), [], door
        self._handle.journals = [AnswerJournal("replica-a")]
        layer, reports = SloLayer(classes, ledger), SloReports(ledger, IngressPeers(1))
        api = build_api(
            self._table,
            layer,
            MetricsEndpoint(IngressMetrics(self._table, ledger), IngressPeers(1), no_controller),
            reports.read,
            _follow,
            IngressPeers(1),
        )
        guard(api, limits or HttpLimits(), keys)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://api") as http:
            yield Front(http, api, core, self._handle, ledger)
        await core.abort_requests_async(list(core._relays))
        core.reachable = 1
        door.close()

    async def _build(self, model: ApiModel) -> ServedModel:
        config = build_engine_args(self._spec).create_engine_config(UsageContext.OPENAI_API_SERVER)
        handle: Any = self._handle
        core = ClusterCore(MODEL, handle, INFO, replicas=1, replica_limit=100)
        await core.open("127.0.0.1")
        engine, args = ClusterEngine(config, core, []), vllm_args(model)
        app = build_app(args, ("generate",), engine.model_config)
        answer_malformed(app)
        await init_app_state(engine, app.state, args, ("generate",))

        async def close() -> None:
            self._handle.channels.close()

        return ServedModel(MODEL, engine, app, CollectorRegistry(), close)


async def no_controller(timeout_s: float) -> ControllerMeasures:
    raise ControllerAwayError("there is none")


async def _follow() -> None:
    """The model stays."""
