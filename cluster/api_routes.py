"""The routes of vLLM's API, and which of them work on a cluster. The documentation's table is printed from here.

python -m cluster.api_routes
"""

import sys
from dataclasses import dataclass
from enum import StrEnum


class RouteState(StrEnum):
    """Whether a route does its work here."""

    WORKS = "works"
    NOT_YET = "not yet"
    """Answers 404 in OpenAI's error form, with the note."""


@dataclass(frozen=True)
class ApiRoute:
    """One path. ``note``: what it is for, or what it waits for."""

    path: str
    state: RouteState
    note: str


_WORKS: dict[str, str] = {
    "/v1/models": "models of the cluster",
    "/v1/chat/completions": "chat: streams, usage, tools, structured output, logprobs, n",
    "/v1/chat/completions/batch": "several chats in one request",
    "/v1/completions": "text completion: streams, usage, stop strings, logprobs, n",
    "/v1/responses": "OpenAI's Responses API, without stored responses",
    "/v1/messages /v1/messages/count_tokens": "Anthropic's Messages API",
    "/tokenize /detokenize": "token ids of a text, and back",
    "/ping /invocations": "SageMaker's names for health and for chat or completion",
    "/health": "200 while a replica of each model is reachable",
    "/metrics": "Prometheus metrics of the whole cluster: vLLM's and ours",
    "/metrics/targets": "what Prometheus has to scrape, for its HTTP service discovery",
    "/ellm/status": "state of the cluster as JSON",
    "/ellm/live": "the same as it changes, as server-sent events: what the live page draws",
    "/ui /ui/ /ui/{name}": "the live page",
    "/ellm/migrate": "moves a running request to another replica (POST)",
    "/ellm/drain /ellm/drains": "empties a replica or a node (POST); what drains now",
    "/ellm/decisions": "the controller's last decisions, with what it saw and why",
    "/ellm/models /ellm/models/{name}": "models listed, added (POST), removed (DELETE), limited (PATCH) while it runs",
    "/load /version": "requests inside this API process; vLLM's release",
    "/openapi.json /docs /docs/oauth2-redirect /redoc": "description of the API",
}
_NOT_YET: dict[str, str] = {
    "/v1/systemone /generative_scoring": "not tried on a cluster",
    "/v1/embeddings /v2/embed /pooling /classify": "pooling models are not served yet",
    "/score /v1/score /rerank /v1/rerank /v2/rerank": "pooling models are not served yet",
    "/v1/audio/transcriptions /v1/audio/translations /v1/realtime": "speech models are not served yet",
    "/v1/chat/completions/render /v1/completions/render": "rendering alone is not offered",
    "/v1/messages/render /v1/responses/render": "rendering alone is not offered",
    "/v1/chat/completions/derender /v1/completions/derender": "rendering alone is not offered",
    "/inference/v1/generate /inference/v1/abort_requests /abort_requests": "tokens in, tokens out is not offered",
    "/v1/load_lora_adapter /v1/unload_lora_adapter": "LoRA adapters are not loaded on replicas yet",
    "/sleep /wake_up /is_sleeping /release_kv_cache_memory": "the replicas' memory is elastic instead",
    "/pause /resume /is_paused": "replicas are not paused one by one",
    "/init_weight_transfer_engine /shutdown_weight_transfer_engine": "weights are not changed while serving",
    "/start_weight_update /start_draft_weight_update /update_weights": "weights are not changed while serving",
    "/finish_weight_update /update_weight_version": "weights are not changed while serving",
    "/weight_info /weight_checker /get_world_size": "weights are not changed while serving",
    "/scale_elastic_ep /is_scaling_elastic_ep": "replicas are scaled by Ray Serve",
    "/start_profile /stop_profile /collective_rpc": "there is no single engine to profile or call into",
    "/reset_prefix_cache /reset_mm_cache /reset_encoder_cache": "caches belong to the replicas",
    "/server_info /kv_event_sources /tokenizer_info /cohere/v2/chat": "not offered by the cluster's API",
    "/fault_tolerance/apply /fault_tolerance/status": "faults are handled by Ray Serve",
    # Last, because the first route that matches a path answers it.
    "/v1/responses/{response_id} /v1/responses/{response_id}/cancel": "a stored response lives in one API process only",
}


def _routes(state: RouteState, notes: dict[str, str]) -> list[ApiRoute]:
    return [ApiRoute(path, state, note) for paths, note in notes.items() for path in paths.split()]


API_ROUTES = (*_routes(RouteState.WORKS, _WORKS), *_routes(RouteState.NOT_YET, _NOT_YET))


def routes_table() -> str:
    """The table as Markdown."""
    lines = ["| route | state | what |", "|---|---|---|"]
    lines += [f"| `{route.path}` | {route.state} | {route.note} |" for route in API_ROUTES]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(routes_table() + "\n")
