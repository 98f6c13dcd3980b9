"""README.md and docs/ as data for their tests: blocks of code with their marks, and inline code.

Before each block of Python or of a shell stands a comment that says what becomes of it:

    <!-- run -->              a test runs it as it is;  <!-- run: WORDS --> and finds these files or words afterwards
    <!-- run with: ARGS -->   a test runs it with these arguments added
    <!-- run by: TEST -->     that test runs it
    <!-- needs: WHAT -->      it needs a machine, weights or time that tests have not
    <!-- not run: WHY -->     it is not whole
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.house import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
CODE = ("python", "bash")
FENCE = re.compile(
    r"(?:<!-- (?P<kind>[a-z ]+?)(?:: (?P<words>[^>]*?))? -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
MARK = re.compile(r"<!--.*?-->", re.S)
INDENTED = re.compile(r"(?:^|\n)\n {4,}(?![-*\d:])\S.*")


class Block(NamedTuple):
    """A fenced block. `kind` is "run", "run with", "run by", "needs", "not run", or "" without a mark."""

    page: str
    language: str
    text: str
    kind: str
    words: str

    @property
    def name(self) -> str:
        """For a test's name."""
        return f"{self.page}: {self.text.strip().splitlines()[0][:40]}"


def blocks(path: Path) -> Iterator[Block]:
    for found in FENCE.finditer(path.read_text()):
        yield Block(path.name, found["language"], found["text"], found["kind"] or "", (found["words"] or "").strip())


def all_blocks() -> list[Block]:
    return [block for path in PAGES for block in blocks(path)]


def without_code(text: str) -> str:
    """The text without fenced blocks."""
    return FENCE.sub("", text)


def commands(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments taken off."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line and line[0] != "#"]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code(text))
