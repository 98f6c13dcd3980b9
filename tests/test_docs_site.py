"""The pages build as a site, strictly: no broken link, no page or docstring that is left out; nothing is fetched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import ROOT

pytestmark = pytest.mark.slow


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # Not --quiet: what is not logged is not counted by --strict.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", root / "mkdocs.yml", "--site-dir", out],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("", "docs/results/", "docs/api/", "docs/cli/", "benchmarks/results/", "CONTRIBUTING/"):
        html = (tmp_path / page / "index.html").read_text()
        assert re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', html) == [], page
    api = (tmp_path / "docs" / "api" / "index.html").read_text()
    for name in ("wrap", "unwrap", "Config", "Selective", "Cluster", "Level", "CopiesDifferError", "report"):
        assert re.search(rf'id="cocodiff\.[\w.]*\b{name}"', api), name
    assert "--transmission" in (tmp_path / "docs" / "cli" / "index.html").read_text()


def test_control_a_broken_link_and_a_page_without_a_place_are_found(tmp_path: Path) -> None:
    """In a copy without results, which are most of the pages."""
    for part in ("docs", "cocodiff"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*.cff"), ROOT / "mkdocs.yml", ROOT / "LICENSE"):
        shutil.copy(path, tmp_path)
    (tmp_path / "docs" / "lost.md").write_text("# Lost\n\n[nowhere](nowhere.md) [no anchor](faq.md#nothing)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for words in ("docs/lost.md", "'nowhere.md'", "#nothing", "results/README.md"):
        assert words in done.stdout + done.stderr, done.stdout + done.stderr
