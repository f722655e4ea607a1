"""GET /metrics/targets: what Prometheus has to scrape, as its HTTP service discovery wants it.

The cluster's own metrics are one target, by the address under which this list was asked for. Ray's are one target a
node, as Ray's own service discovery file has them; the PodMonitor of a Kubernetes cluster finds both by their ports.
Saved to a file, the same list is what ``file_sd_configs`` take.
"""

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

JOB, RAY_JOB = "ellm", "ray"


def target_routes() -> list[Route]:
    """The route, for the API."""
    return [Route("/metrics/targets", targets)]


async def targets(request: Request) -> Response:
    """The list. Ray's nodes are missing while Ray's control store is away."""
    try:
        nodes = await asyncio.to_thread(ray.nodes)
    except (RayError, ConnectionError, RuntimeError):
        nodes = []
    return JSONResponse(target_list(request.url.netloc, request.url.scheme, nodes))


def target_list(api: str, scheme: str, nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``api``: host and port; ``nodes``: as ``ray.nodes()`` returns them."""
    metered = [node for node in nodes if node["Alive"] and node["MetricsExportPort"] > 0]
    ray_targets = sorted(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in metered)
    own = {"targets": [api], "labels": {"job": JOB, "__scheme__": scheme, "__metrics_path__": "/metrics"}}
    return [own, *([{"targets": ray_targets, "labels": {"job": RAY_JOB}}] if ray_targets else [])]
