"""What MkDocs needs to show pages that are written for GitHub.

* README.md is the first page, CONTRIBUTING.md and CHANGELOG.md are pages, too; links to them are turned accordingly.
* A link to a file of the repository that is no page leads to the repository (``DOCS_SOURCE``, the address of a folder
  of it: ``https://HOST/OWNER/NAME/blob/main``); where that is not told, its text stands alone. It must exist.
* No page fetches anything from another host: the site works behind a closed network.
* A list may follow a line of text at once: Python-Markdown wants a blank line between; and one within
  another may stand two blanks further in, where it wants four.
* ``\\|`` in a code span of a table is a pipe: Python-Markdown keeps the backslash.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
#: File of the repository → page of the site.
BROUGHT_IN = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"'>]*""")
_CODE = re.compile(r"`[^`]+`")
_ITEM = re.compile(r"([*-]|\d+\.) ")
_INNER_ITEM = re.compile(r"^  [*-] ")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for source, page in BROUGHT_IN.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called for each page, as it is written."""
    return "\n".join(_lines(markdown, written_at(page.file.src_uri), page.file.src_uri))


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Called for each page, as it is built. Raises PluginError: it would fetch from elsewhere."""
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: fetches from another host: {found[0]}")
    return output


def written_at(page: str) -> PurePosixPath:
    """Where in the repository a page of the site is written."""
    sources = {page: source for source, page in BROUGHT_IN.items()}
    return PurePosixPath(sources.get(page, f"docs/{page}"))


def _lines(markdown: str, source: PurePosixPath, page: str) -> Iterator[str]:
    is_code, before = False, ""
    for line in markdown.split("\n"):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            if _ITEM.match(line) and before.strip() and not _ITEM.match(before) and not before.startswith(" "):
                yield ""
            line = _LINK.sub(lambda link: _turned(link[1], link[2], source, page), line)
            line = _INNER_ITEM.sub(r"  \g<0>", line)
            if line.startswith("|"):
                line = _CODE.sub(lambda code: code[0].replace(r"\|", "|"), line)
        yield line
        before = line


def _turned(text: str, link: str, source: PurePosixPath, page: str) -> str:
    """The link as the site has it; the text alone where it leads out of it. Raises PluginError: to nothing."""
    if link.startswith("#") or re.match(r"\w+:", link):
        return f"{text}({link})"
    file, _, anchor = link.partition("#")
    path = os.path.normpath(source.parent / file)
    if not (ROOT / path).exists():
        raise PluginError(f"{source}: {link} leads to nothing")
    if (ROOT / path / "README.md").is_file():
        path += "/README.md"
    if path in BROUGHT_IN:
        target = BROUGHT_IN[path]
    elif path.startswith("docs/") and (ROOT / path).is_file():
        target = path.removeprefix("docs/")
    elif address := os.environ.get("DOCS_SOURCE"):
        return f"{text}({address.rstrip('/')}/{path})"
    else:
        return text[1:-1]
    relative = os.path.relpath(target, PurePosixPath(page).parent)
    return f"{text}({relative}{'#' if anchor else ''}{anchor})"
