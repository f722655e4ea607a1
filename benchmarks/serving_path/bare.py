"""A bare uvicorn server that streams events as vLLM writes them: what the load generator itself can take in.

python -m benchmarks.serving_path.bare PORT
"""

import json
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from benchmarks.serving_path.events import MODEL, stream_events
from benchmarks.serving_path.runner import serve_until_told


async def models(request: Request) -> JSONResponse:
    return JSONResponse({"data": [{"id": MODEL, "root": MODEL}]})


async def complete(request: Request) -> StreamingResponse:
    body = json.loads(await request.body())

    async def events() -> AsyncIterator[str]:
        async for event in stream_events(len(body["prompt"]), body["max_tokens"]):
            yield event

    return StreamingResponse(events(), media_type="text/event-stream")


def main() -> None:
    port = int(sys.argv[1])
    app = Starlette(
        routes=[Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])],
        on_startup=[serve_until_told],
    )
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", loop="uvloop")


if __name__ == "__main__":
    main()
