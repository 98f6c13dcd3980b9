"""docs/glossary.md has each term once, and each file that it names has the symbol that it names."""

from __future__ import annotations

import re

from tests.house import ROOT

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| term ")
]


def test_each_term_stands_once_with_one_sentence() -> None:
    terms = [term for term, _, _ in ROWS]
    assert len(terms) > 50 and len(set(terms)) == len(terms)
    assert [term for term, meaning, _ in ROWS if not meaning.endswith(".")] == []


def test_terms_are_where_the_glossary_says() -> None:
    lost = []
    for term, _, where in ROWS:
        path, symbol = re.fullmatch(r"`([\w/.]+)` `(\w+)`", where).groups()  # type: ignore[union-attr]
        file = ROOT / path
        if not file.is_file() or not re.search(rf"\b{symbol}\b", file.read_text()):
            lost.append((term, where))
    assert lost == []
