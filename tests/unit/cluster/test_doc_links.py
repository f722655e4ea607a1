"""Links of README.md, CONTRIBUTING.md and docs/: each leads to a file, and to a heading in it, that exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dashboards.alerts import RUNBOOKS

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and pictures, without addresses elsewhere; code has none."""
    found = re.findall(r"\]\(([^)\s]+)\)", _CODE.sub("code", text))
    return [target for target in found if "://" not in target]


def anchors(text: str) -> set[str]:
    """Of the headings: what hosts of repositories make of them, and the site too."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    wrong = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file, and to a heading in it."""
    assert broken(page) == []


def test_pages_of_the_site_link_to_none_outside_of_it() -> None:
    """What the site has not, cannot be reached from it."""
    docs = ROOT / "docs"
    out = [
        (page.name, target)
        for page in docs.rglob("*.md")
        for target in links(page.read_text(encoding="utf-8"))
        if not (page.parent / target.partition("#")[0]).resolve().is_relative_to(docs)
    ]
    assert out == []


def test_every_page_is_in_the_navigation() -> None:
    """Once, and the runbooks are where alerts say they are."""

    def pages(tree: object) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        return [page for one in (tree.values() if isinstance(tree, dict) else tree) for page in pages(one)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    docs = ROOT / "docs"
    assert sorted(named) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))
    assert (ROOT / RUNBOOKS).is_dir() and (ROOT / RUNBOOKS).is_relative_to(docs)


def test_the_site_is_made_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """mkdocs finds nothing to warn of, and a browser asks no other host for scripts, styles, fonts or pictures."""
    pytest.importorskip("material", reason="`make docs` installs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    made = list(tmp_path.rglob("*.html"))
    assert {"index.html", "concepts.html", "slo-burn.html"} <= {page.name for page in made}
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\s>]+")
    assert [found for page in made for found in loaded.findall(page.read_text(encoding="utf-8"))] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """The check itself: a missing file, a missing heading, and what only looks like a link."""
    (tmp_path / "b.md").write_text("# One, two\n```\n# no heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[x](b.md) [x](b.md#one-two) ![x](c.svg) [x](b.md#no-heading) `[x](d.md)` [x](https://e/f.md) [x](#g)"
    )
    assert broken(page) == ["c.svg", "b.md#no-heading", "#g"]
