"""The live page in a real browser: over a real cluster under load, and over a played one with many replicas."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, expect  # noqa: E402

pytestmark = pytest.mark.slow

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
REPLICAS = 64
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}
PATIENCE_MS = 30_000
FRAMES_LEAST = 30
SHOTS = os.environ.get("ELLM_SCREENSHOTS")
"""A folder for pictures of what the tests see; none are taken where it is not set."""

STATE_OF_THE_PAGE = """() => {
  const value = (node, selector) => Number(node.querySelector(selector).dataset.value);
  const rows = (selector, of) => Object.fromEntries([...document.querySelectorAll(selector)].map(of));
  return {
    at: Number(document.body.dataset.takenAt),
    devices: rows("[data-device]", (node) => [node.dataset.device,
      rows(`[data-device="${node.dataset.device}"] [data-memory]`,
        (one) => [one.dataset.memory, Number(one.dataset.value)])]),
    replicas: rows("[data-replica]", (node) => [node.dataset.replica,
      ["held", "limit", "running", "waiting"].map((name) => value(node, `.${name}`))]),
    classes: rows("[data-class]", (node) => [node.dataset.class,
      [Number(node.dataset.requests), value(node, ".share")]]),
  };
}"""


def state_of(status: dict[str, Any]) -> dict[str, Any]:
    """The same of what ``ellm status --json`` prints."""
    devices = [(node["node"], device) for node in status["nodes"] for device in node["devices"]]
    replicas = [one for _, device in devices for one in device["replicas"]]
    keys = ("held_bytes_os", "limit_bytes", "running", "waiting")
    return {
        "devices": {f"{node} {device['device']}": device["memory"] for node, device in devices},
        "replicas": {one["engine_id"]: [one[key] for key in keys] for one in replicas},
        "classes": {name: [one["requests"], one["kept"]] for name, one in status["slo"]["classes"].items()},
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: install Debian's package chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def played() -> Iterator[str]:
    """The page over a played cluster of many replicas, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.played_page", "--replicas", str(REPLICAS), "--port", str(port)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + 300
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < deadline_s, "the played cluster does not start"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ui/", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class Seen:
    """A page, and what went wrong in it: errors, refused resources, requests to other hosts."""

    def __init__(self, browser: Browser, url: str, scheme: str = "light", size: dict[str, int] = WIDE) -> None:
        self.context = browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on(
            "console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda one: self.wrong.append(one.url) if not one.url.startswith(url) else None)
        self.page.goto(f"{url}/ui")
        expect(self.page.locator("#link")).to_have_attribute("data-state", "live", timeout=PATIENCE_MS)

    def shot(self, name: str, full: bool = False) -> None:
        if SHOTS:
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=full)

    def __enter__(self) -> "Seen":
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_width_and_scheme(browser: Browser, played: str, scheme: str, size: dict[str, int]) -> None:
    """All replicas are there, nothing is cut off sideways, the scheme is taken, text can be told from its ground, and
    the browser complains of nothing."""
    with Seen(browser, played, scheme, size) as seen:
        expect(seen.page.locator(".replica")).to_have_count(REPLICAS, timeout=PATIENCE_MS)
        seen.page.wait_for_timeout(2000)
        wide = seen.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= size["width"]
        ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(part) for part in ground[4:-1].split(",")) < 384) == (scheme == "dark")
        assert seen.page.evaluate(WORST_CONTRAST) >= 4.5
        seen.shot(f"played-{scheme}-{size['width']}")
        assert seen.wrong == []


WORST_CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parts(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
  };
  let worst = 21;
  for (const node of document.querySelectorAll("main *, header *")) {
    if (![...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim()) || !node.checkVisibility()) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(ground(node))];
    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return worst;
}"""
"""WCAG's contrast of the text that differs least from its ground."""


def test_many_replicas_move_smoothly(browser: Browser, played: str) -> None:
    """Frames a second with many replicas, while every bar and the chart move."""
    with Seen(browser, played) as seen:
        expect(seen.page.locator(".replica")).to_have_count(REPLICAS, timeout=PATIENCE_MS)
        seen.page.wait_for_timeout(2000)
        frames = seen.page.evaluate(
            """() => new Promise((done) => {
              const began = performance.now();
              let frames = 0;
              (function count() {
                frames++;
                const ms = performance.now() - began;
                if (ms < 5000) requestAnimationFrame(count);
                else done(frames / ms * 1000);
              })();
            })"""
        )
        assert frames >= FRAMES_LEAST


def test_the_keyboard_reaches_everything_in_order(browser: Browser, played: str) -> None:
    """Tab goes through the page from top to bottom, shows where it is, and the chat is used without a pointer."""
    with Seen(browser, played, size=PHONE) as seen:
        expect(seen.page.locator("#chat-model option")).to_have_count(1)
        reached, outlines = [], []
        for _ in range(40):
            seen.page.keyboard.press("Tab")
            told = "[document.activeElement.id || document.activeElement.className || document.activeElement.tagName, "
            told += "getComputedStyle(document.activeElement).outlineStyle]"
            name, outline = seen.page.evaluate(told)
            if name == "BODY":
                break
            if name != "SUMMARY":
                reached.append(name)
                outlines.append(outline)
        wanted = ["skip", "decisions", "talk", "chat-text", "chat-model", "chat-clear", "chat-send"]
        assert [name for name in reached if name in wanted] == wanted
        assert "none" not in outlines
        seen.page.focus("#chat-text")
        seen.page.keyboard.type("Hello")
        seen.page.keyboard.press("Enter")
        expect(seen.page.locator("#talk .assistant")).to_contain_text("no engine runs here.", timeout=PATIENCE_MS)
        expect(seen.page.locator("#chat-pace")).to_contain_text("tokens/s")
        assert seen.wrong == []


def test_a_cleared_conversation_is_forgotten(browser: Browser, played: str) -> None:
    """Also where it is cleared in the middle of an answer: the next question goes alone."""
    with Seen(browser, played) as seen:
        asked: list[Any] = []
        seen.page.on("request", lambda one: asked.append(one.post_data_json) if one.method == "POST" else None)
        expect(seen.page.locator("#chat-model option")).to_have_count(1)
        seen.page.fill("#chat-text", "First")
        seen.page.press("#chat-text", "Enter")
        expect(seen.page.locator("#talk .assistant")).to_contain_text("This", timeout=PATIENCE_MS)
        seen.page.click("#chat-clear")
        expect(seen.page.locator("#chat-send")).to_have_text("Send")
        seen.page.fill("#chat-text", "Second")
        seen.page.press("#chat-text", "Enter")
        expect(seen.page.locator("#talk .assistant")).to_contain_text("no engine runs here.", timeout=PATIENCE_MS)
        assert asked[-1]["messages"] == [{"role": "user", "content": "Second"}]


def test_a_server_that_goes_away_is_told_and_found_again(browser: Browser, played: str) -> None:
    """The page says that what it shows is old, and is live again by itself."""
    with Seen(browser, played) as seen:
        seen.context.set_offline(True)
        seen.page.evaluate("0")
        expect(seen.page.locator("#link")).to_have_attribute("data-state", "away", timeout=PATIENCE_MS)
        seen.context.set_offline(False)
        expect(seen.page.locator("#link")).to_have_attribute("data-state", "live", timeout=PATIENCE_MS)


def test_a_cluster_with_keys_asks_for_one(browser: Browser, played: str) -> None:
    """Where the feed is refused the page asks for a key, sends it with each request, and forgets it with the tab."""
    context = browser.new_context()
    page = context.new_page()
    sent: list[str] = []

    def guard(route: Any) -> None:
        key = route.request.headers.get("authorization", "")
        sent.append(key)
        if key == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, content_type="application/json", body='{"error": {"message": "no key"}}')

    page.route("**/ellm/live", guard)
    page.goto(f"{played}/ui/")
    expect(page.locator("#key")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "key-value"
    page.keyboard.type("right")
    page.keyboard.press("Enter")
    expect(page.locator("#link")).to_have_attribute("data-state", "live", timeout=PATIENCE_MS)
    expect(page.locator("#key")).to_be_hidden()
    assert sent[0] == "" and sent[-1] == "Bearer right"
    assert page.evaluate("localStorage.length") == 0
    context.close()


class Recorder:
    """What ``ellm status --json`` would have said, many times a second."""

    def __init__(self, url: str) -> None:
        self.states: list[tuple[float, dict[str, Any]]] = []
        self._url, self._ends = url, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, trust_env=False, timeout=30) as client:
            while not self._ends.wait(0.02):
                status = client.get("/ellm/status").json()
                self.states.append((status["taken_at_s"], state_of(status)))

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()


def test_what_it_shows_is_what_status_says(browser: Browser, cluster: str, model: str) -> None:
    """Under load, each time the page is looked at, every byte and count on it is what the status was when the page's
    snapshot was taken, to within the time between two looks of a close watch; and the load is seen."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True}

    def load(number: int) -> None:
        httpx.post(f"{cluster}/v1/completions", json=body, timeout=300, trust_env=False).raise_for_status()

    with Seen(browser, cluster) as seen, Recorder(cluster) as recorder, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(load, number) for number in range(24)]
        looks = []
        while not all(one.done() for one in asked) and len(looks) < 25:
            seen.page.wait_for_timeout(700)
            looks.append(seen.page.evaluate(STATE_OF_THE_PAGE))
            if len(looks) == 8:
                seen.shot("cluster-light", full=True)
                seen.page.emulate_media(color_scheme="dark")
                seen.page.wait_for_timeout(600)
                seen.shot("cluster-dark")
        for one in asked:
            one.result()
        assert seen.wrong == []
    assert len(looks) >= 5
    for look in looks:
        at = look.pop("at")
        near = [state for taken_at, state in recorder.states if abs(taken_at - at) < 2.0]
        # Parts of a status come from several processes; each part is compared by itself.
        for part, shown in look.items():
            assert shown in [state[part] for state in near], f"{part} shows what status never said: {json.dumps(shown)}"
    assert any(sum(counts[2] for counts in look["replicas"].values()) > 0 for look in looks)
    used = [memory["kv_used_bytes"] for look in looks for memory in look["devices"].values()]
    assert len(set(used)) > 2, "memory has to be seen moving"


def greedily(route: Any) -> None:
    """The request goes on with no chance in its answer: a small model says anything where it draws lots."""
    route.continue_(post_data=json.dumps(route.request.post_data_json | {"temperature": 0}))


def test_the_chat_answers(browser: Browser, cluster: str) -> None:
    """A question typed into the page is answered by the model, streamed, and can be stopped."""
    with Seen(browser, cluster) as seen:
        seen.page.route("**/v1/chat/completions", greedily)
        seen.page.fill("#chat-text", "What is the capital of France?")
        seen.page.press("#chat-text", "Enter")
        expect(seen.page.locator("#talk .assistant")).to_contain_text("Paris", timeout=60_000)
        expect(seen.page.locator("#chat-send")).to_have_text("Send", timeout=60_000)
        assert "first token" in seen.page.inner_text("#chat-pace")
        seen.page.fill("#chat-text", "Count from one to one thousand, in words.")
        seen.page.press("#chat-text", "Enter")
        expect(seen.page.locator("#talk .assistant").nth(1)).not_to_have_text("…", timeout=60_000)
        seen.page.click("#chat-send")
        expect(seen.page.locator("#chat-send")).to_have_text("Send")
        seen.shot("chat")
        assert seen.wrong == []
