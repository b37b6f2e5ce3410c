"""The READMEs as tests see them: blocks of code, tables, links."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
OTHERS = [ROOT / "libs/sublet/README.md", ROOT / "deploy/README.md"]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"(?:#|//) (\w+\.\w+)\n")
_ROW = re.compile(r"^\| `(\w+)` \| (.+?) \|", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def blocks(language: str) -> list[str]:
    """Of all READMEs."""
    texts = [path.read_text() for path in (README, *OTHERS)]
    return [code for text in texts for found, code in _BLOCK.findall(text) if found == language]


def files() -> dict[str, str]:
    """The blocks that begin with a comment that names them, by that name."""
    return _named(code for language in ("python", "js") for code in blocks(language))


def files_in(text: str) -> dict[str, str]:
    """The same of another document."""
    return _named(code for _, code in _BLOCK.findall(text))


def _named(codes: Iterable[str]) -> dict[str, str]:
    named = [(_NAME.match(code), code) for code in codes]
    return {name[1]: code for name, code in named if name is not None}


def rows() -> dict[str, str]:
    """The second cell of each table row whose first cell is one word of code, by that word."""
    return dict(_ROW.findall(README.read_text()))


def links() -> list[Path]:
    """The files of this repository that the READMEs point to."""
    return [path.parent / link for path in (README, *OTHERS) for link in _LINK.findall(path.read_text())]


def write_files(directory: Path) -> None:
    for name, code in files().items():
        (directory / name).write_text(code)
