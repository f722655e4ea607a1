"""The live page's files over HTTP: types, caching, and a policy that lets a browser ask nobody else."""

import re
from importlib import resources

import httpx
import pytest
from starlette.applications import Starlette

from cluster.page import page_routes

FOLDER = resources.files("dashboards") / "page"
NAMES = sorted(file.name for file in FOLDER.iterdir())


@pytest.fixture
async def http() -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=Starlette(routes=page_routes()))
    return httpx.AsyncClient(transport=transport, base_url="http://cluster", follow_redirects=True)


async def test_ui_leads_to_the_page(http: httpx.AsyncClient) -> None:
    """With and without the slash; the files are asked for relative to it."""
    answer = await http.get("/ui")
    assert (answer.status_code, answer.url.path) == (200, "/ui/")
    assert answer.text.startswith("<!doctype html>")


@pytest.mark.parametrize("name", NAMES)
async def test_every_file_is_served_once(http: httpx.AsyncClient, name: str) -> None:
    """With its type, the policy and a tag; who has it already gets 304 and no bytes."""
    answer = await http.get(f"/ui/{name}")
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["cache-control"] == "no-cache"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    again = await http.get(f"/ui/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    stale = await http.get(f"/ui/{name}", headers={"If-None-Match": '"another"'})
    assert stale.status_code == 200


@pytest.mark.parametrize("path", ["/ui/nothing.js", "/ui/..%2fpage.py", "/ui/../page.py"])
async def test_nothing_else_is_served(http: httpx.AsyncClient, path: str) -> None:
    """Only the folder's own files: 404 for all else."""
    assert (await http.get(path)).status_code == 404


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_host_or_carries_code_inline(name: str) -> None:
    """What the policy forbids would be silently missing from the page."""
    text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not re.search(r"<style|\sstyle=|\son\w+=\"|javascript:|innerHTML|eval\(", text)
    assert "<script>" not in text


def test_modules_import_only_files_that_are_there() -> None:
    """A misspelt import leaves an empty page."""
    for name in NAMES:
        if name.endswith(".js"):
            for wanted in re.findall(r'from "\./([\w.]+)"', (FOLDER / name).read_text(encoding="utf-8")):
                assert wanted in NAMES, f"{name} imports {wanted}"
