"""docs/tested.md is what `python -m tests.table` makes: it has a row for all that the suite draws, and it was right."""

import re

from tests.distributed.draws import ALL, LIMIT, MESHES
from tests.house import ROOT


def test_the_table_of_what_was_tested_is_whole():
    rows = [line for line in (ROOT / "docs" / "tested.md").read_text().splitlines() if line.startswith("|")]
    figures = [float(figure) for row in rows for figure in re.findall(r"\d+e-\d+", row)]
    assert max(figures) < LIMIT
    for name in ALL:
        assert any(f"| {name} |" in row for row in rows), name
    for mesh in (mesh for meshes in MESHES.values() for mesh in meshes):
        assert any(f"| {' x '.join(map(str, mesh))} |" in row for row in rows), mesh
