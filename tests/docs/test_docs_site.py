"""The site shows what GitHub shows, has every page in its navigation, and its made parts are as they are made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import markdown
import pytest
import yaml
from markdown_it import MarkdownIt

import made_pages
import site_hooks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.UnsafeLoader)
PAGES = [*site_hooks.BROUGHT_IN.values(), *sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))]
COUNTED = {"h1", "h2", "h3", "h4", "li", "ol", "pre", "table", "td", "th", "tr", "ul"}


class _Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found[tag] += tag in COUNTED


def built(page: str) -> str:
    """As MkDocs makes it, without its theme."""
    source = ROOT / site_hooks.written_at(page)
    at: Any = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    nothing: Any = None
    text = site_hooks.on_page_markdown(source.read_text(encoding="utf-8"), page=at, config=nothing, files=nothing)
    extensions = [each if isinstance(each, str) else next(iter(each)) for each in CONFIG["markdown_extensions"]]
    colours = {"pymdownx.highlight": {"use_pygments": False}}  # which take most of the time
    return markdown.markdown(text, extensions=extensions, extension_configs=colours)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "python.md"])  # there mkdocstrings writes
def test_a_page_is_made_of_what_github_makes_of_it(page: str) -> None:
    text = (ROOT / site_hooks.written_at(page)).read_text(encoding="utf-8")
    shown = MarkdownIt("commonmark").enable("table").render(text)
    assert _Elements(built(page)).found == _Elements(shown).found


def test_a_pipe_in_code_in_a_table_is_a_pipe() -> None:
    assert "NAME|FILE|DIR" in built("guardrails.md")


def test_links_out_of_the_pages_lead_to_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compose.yaml" in built("images.md")
    assert 'href="../compose.yaml"' not in built("images.md")
    monkeypatch.setenv("DOCS_SOURCE", "https://git.example/o/r/blob/main")
    assert 'href="https://git.example/o/r/blob/main/compose.yaml"' in built("images.md")
    assert 'href="adr/README.md"' in built("index.md")
    assert 'href="changelog.md"' in built("upgrade.md")


def test_a_link_to_nothing_ends_the_build() -> None:
    with pytest.raises(site_hooks.PluginError, match=r"README.md: docs/nothing.md leads to nothing"):
        site_hooks._turned("[x]", "docs/nothing.md", site_hooks.written_at("index.md"), "index.md")


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(part)


@pytest.mark.parametrize("html", ['<script src="https://cdn.example/a.js">', "<link rel=icon href='//cdn.example/i'>"])
def test_a_page_that_fetches_from_elsewhere_ends_the_build(html: str) -> None:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    nothing: Any = None
    with pytest.raises(site_hooks.PluginError, match=r"x\.md: fetches from another host"):
        site_hooks.on_post_page(f"<p>{html}</p>", page=page, config=nothing)
    ours = '<script src="a.js"></script> <a href="https://kserve.github.io">KServe</a>'
    assert site_hooks.on_post_page(ours, page=page, config=nothing) == ours


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(pages_of(CONFIG["nav"])) == sorted(PAGES)


def test_made_parts_are_as_they_are_made() -> None:
    assert [str(page) for page in made_pages.stale()] == [], "make docs-pages"
    said = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    assert set(re.findall(r"<!-- made: (.+?) -->", said)) == made_pages.PARTS.keys()


def test_every_annotation_of_the_code_is_on_its_page() -> None:
    page = (DOCS / "annotations.md").read_text(encoding="utf-8")
    folders = ("profiles", "runtimes", "transformers", "trainers")
    texts = [file.read_text(encoding="utf-8") for each in folders for file in (ROOT / each).rglob("*.py")]
    named = {key for text in texts for key in re.findall(r"[\w.]*aim\.amd\.com/[\w-]+", text)}
    no_keys = {key for key in named if key.endswith(("/v1alpha1", "/operator"))}  # an API, a finalizer
    assert len(named) > 8
    known = {f"{found}" for found in re.findall(r"`(?:label )?([\w.]*aim\.amd\.com/[\w-]+)", page)}
    known |= {f"aim.amd.com/{short}" for short in re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)}
    assert named - no_keys - known == set()


def test_a_newcomer_reads_ten_minutes_to_a_guarded_service() -> None:
    """At 200 words a minute, code counted: all of README.md, and of docs/install.md up to the service that is asked."""
    first = (ROOT / "README.md").read_text(encoding="utf-8")
    steps, _, _ = (DOCS / "install.md").read_text(encoding="utf-8").partition("## 6. Ask it")
    assert "(docs/install.md)" in first
    assert "aim.amd.com/guardrail-policy: chat" in steps
    assert len(f"{first} {steps}".split()) < 10 * 200
