"""Figures that the pages quote are those of benchmarks/results, and no figure stands there without saying so."""

from __future__ import annotations

import re

import pytest

from benchmarks import figures, kept
from tests.pages import FENCE

PAGES = {page.name: page.read_text() for page in figures.PAGES}
# Ratios, decibels and shares: what a page quotes from a result.
QUOTED = re.compile(r"\d\.\d\dx|\d+(?:\.\d+)?(?: to \d+)? dB\b|\d+ %")
BY_HAND = re.compile(r"<!-- by hand: [^>]+ -->\n\n.*?(?:\n\n|\Z)", re.S)
# Made by another program, or about what is not a result.
ELSEWHERE = ("tested.md",)
# Thresholds, not results.
PLAIN = ("47 to 60 %", "over 60 %", "over 80 %", "above 80 %", "under 30 %", "within 10 %")


def unmarked(text: str) -> list[str]:
    """Figures of a page that neither a mark nor a table makes, and that are not said to be there by hand."""
    for pattern in (FENCE, figures.TABLE, BY_HAND):
        text = pattern.sub("", text)
    text = re.sub(r"\d[\d.]*(?:x| %)?<!--= .*? -->(?: dB)?", "", text)
    for words in PLAIN:
        text = text.replace(words, "")
    return QUOTED.findall(text)


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_the_results(page: str) -> None:
    assert figures.renewed(PAGES[page]) == PAGES[page], "python -m benchmarks.figures"


def test_enough_is_marked() -> None:
    text = "".join(PAGES.values())
    assert len(figures.FIGURE.findall(text)) > 30 and len(figures.TABLE.findall(text)) >= 7
    for mark in re.findall(r"<!--= (.*?) -->", text):
        assert mark in [found["words"] for found in figures.FIGURE.finditer(text)], f"no figure before {mark}"
    assert text.count("<!-- table ") == len(figures.TABLE.findall(text)) == text.count("<!-- end of table -->")


@pytest.mark.parametrize("page", [name for name in PAGES if name not in ELSEWHERE])
def test_no_figure_stands_alone(page: str) -> None:
    assert unmarked(PAGES[page]) == []


def test_control_a_figure_that_was_changed_is_found() -> None:
    page = PAGES["results.md"]
    first = figures.FIGURE.search(page)
    table = figures.TABLE.search(page)
    assert first is not None and table is not None
    for start, old, new in ((first.start(), first["text"], "9.87x"), (table.start("text"), "1.71x", "1.81x")):
        changed = page[:start] + page[start:].replace(old, new, 1)
        assert changed != page and figures.renewed(changed) == page


def test_control_a_result_that_was_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "1.43x<!--= speedup flux-dev-768-4-ranks-115mbit exact diffusers -->"
    assert figures.renewed(page) == page
    monkeypatch.setattr(figures, "ratio", lambda name, method, base: kept.ratio(name, method, base) * 1.1)
    assert figures.renewed(page) == page.replace("1.43x", "1.57x")


def test_control_a_figure_without_a_mark_is_found() -> None:
    assert unmarked("It is 1.43x as fast, 61 dB, 55 %.") == ["1.43x", "61 dB", "55 %"]
    assert unmarked("<!-- by hand: a trial -->\n\nIt was 61 dB.\n\nNow 62 dB.") == ["62 dB"]
