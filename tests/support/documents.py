"""The READMEs and documentation pages for tests: blocks of code, tables, links."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TESTING = ROOT / "libs/sublet/docs/testing.md"
WITH_EXAMPLES = [README, ROOT / "libs/sublet/README.md", ROOT / "deploy/README.md"]
"""Their Python blocks are written to files and run. The blocks of TESTING run as tests of their own."""

_PATTERNS = (
    "*.md",
    "deploy/**/*.md",
    "libs/*/*.md",
    "libs/sublet/docs/*.md",
    "services/*/*.md",
    ".github/*.md",
)
PAGES = sorted({path for pattern in _PATTERNS for path in ROOT.glob(pattern)})

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"(?:#|//) (\w+\.\w+)\n")
_ROW = re.compile(r"^\| `(\w+)` \| (.+?) \|", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


class Link(NamedTuple):
    """A link in ``page`` to a file of this repository. ``anchor`` is empty if the link names no heading."""

    page: Path
    target: Path
    anchor: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)} to {self.target.relative_to(ROOT)}#{self.anchor}".rstrip("#")


def blocks(language: str) -> list[str]:
    """The blocks of code in this language, of all pages with examples."""
    texts = [path.read_text() for path in WITH_EXAMPLES]
    return [code for text in texts for found, code in _BLOCK.findall(text) if found == language]


def files() -> dict[str, str]:
    """The blocks whose first line is a comment with a file name, by that name."""
    return _named(code for language in ("python", "js") for code in blocks(language))


def files_in(text: str) -> dict[str, str]:
    """The same for the text of another page."""
    return _named(code for _, code in _BLOCK.findall(text))


def _named(codes: Iterable[str]) -> dict[str, str]:
    named = [(_NAME.match(code), code) for code in codes]
    return {name[1]: code for name, code in named if name is not None}


def rows() -> dict[str, str]:
    """The second cell of each table row of the README whose first cell is one word of code, by that word."""
    return dict(_ROW.findall(README.read_text()))


def links() -> list[Link]:
    """All links of all pages to files of this repository."""
    return [
        Link(page, (page.parent / path).resolve() if path else page, anchor)
        for page in PAGES
        for path, anchor in _LINK.findall(_BLOCK.sub("", page.read_text()))
    ]


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = _HEADING.findall(_BLOCK.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def write_files(directory: Path) -> None:
    for name, code in files().items():
        (directory / name).write_text(code)
