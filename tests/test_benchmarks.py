"""Every script of benchmarks/ runs, at sizes so small that its figures mean nothing."""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import modelled, neighbours, papers, published, summary
from cocodiff.models.shapes import Shape
from cocodiff.parallel.mesh import Degrees
from cocodiff.parallel.placement import Placement
from tests.distributed.ranks import run_ranks
from tests.house import ROOT


def _printed(module: str, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What `main` of a benchmark prints on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        importlib.import_module(f"benchmarks.{module}").main(*args, **options)
    return out.getvalue()


def test_summary_makes_the_tables_that_are_in_the_repository(tmp_path: Path) -> None:
    for path in summary.RESULTS.rglob("*.json"):
        copy = tmp_path / path.relative_to(summary.RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    summary.main(tmp_path)
    for name in ("README.md", "meshes/README.md", "selective/README.md"):
        assert (tmp_path / name).read_bytes() == (summary.RESULTS / name).read_bytes(), name


def test_gloo_duplex_times_both_ways() -> None:
    table, nothing = run_ranks(2, _printed, "gloo_duplex", ((4000,), 2), {})
    lines = table.splitlines()
    assert len(lines) == 4 and "gloo's all_to_all" in lines[2] and "receives first" in lines[3]
    assert all(len(line.split("|")[3].split()) == 2 for line in lines[2:])  # a rate for each repetition
    assert nothing == ""


@pytest.mark.parametrize("ring_degree", [1, 2])
def test_ablation_switches_each_mechanism_off_and_draws_the_same(ring_degree: int) -> None:
    shape = Shape("small", "flux", 1, 2, heads=4, head_dim=16, text=32, image=64)
    table, nothing = run_ranks(2, _printed, "ablation", (1, ring_degree), {"shape": shape, "pieces": 2})
    rows = {cells[1].strip(): cells[-2].strip() for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert len(rows) == (9 if ring_degree == 1 else 7) and rows.pop("compute") == ""
    assert all(float(difference) < 1e-5 for difference in rows.values()), rows
    assert nothing == ""


def test_neighbours_compares_diffusers_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    neighbours.main(["flux text2image"], {"divisible": [(2, 1, 2)]})
    document = capsys.readouterr().out
    assert document.startswith("# ") and "    python -m benchmarks.neighbours" in document
    row = next(line for line in document.splitlines() if line.startswith("| flux text2image | divisible | 2 | 1 x 2 |"))
    assert row.count("right (") == 2, row


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("nonsense", 2)])
def test_sweep_says_how_it_is_used_and_runs_nothing(argument: str, status: int) -> None:
    done = subprocess.run([ROOT / "benchmarks" / "sweep", argument], capture_output=True, text=True, timeout=10)
    assert done.returncode == status
    assert "Usage: benchmarks/sweep [PART ...]" in done.stdout + done.stderr and "==" not in done.stdout


def test_soak_counts_what_each_round_leaves() -> None:
    table, nothing = run_ranks(2, _printed, "soak", (1, 1, 1), {})
    rows = [line.split("|") for line in table.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["failed calls", "drops", "drops"] and nothing == ""
    assert all(int(cell) > 0 for row in rows for cell in row[2:6])


def test_papers_models_every_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def few(*given: Any) -> Any:
        what, blocks = given[:6], min(4, *(one for one in given[6:] if one is not None), 4)
        return modelled.asked(*what, blocks=blocks)

    for module in (papers, published):
        monkeypatch.setattr(module, "asked", few)
    monkeypatch.setattr(papers, "SEARCHED", 256)
    rows = [row for row in published.LATENCIES if row[0] == "flux-dev" and row[2].ulysses * row[2].ring < 4]
    papers.main(
        {
            "AoiZora": papers.aoizora(("wan-1.3b",), ((2, 2),), ((64, 64, 5),), (2, 2)),
            "CoCoDiff": papers.cocodiff(("flux-dev",), (256,), (1,)),
            "H100": published.h100(rows),
        }
    )
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert "**All of it is MODELLED**" in " ".join(lines) and "ASSUMED" in page
    tables = [line for line in lines if line.startswith("|")]
    assert sum(line.startswith("|---") for line in tables) == 1 + 3 + 2 + 1
    for schedule in papers.SCHEDULES:
        row = next(line for line in lines if line.startswith(f"| {schedule} |"))
        assert float(row.split("|")[-2]) > 0.9, "three blocks rank plans as all do"
    assert "(chosen by it)" in page and "which fits them best" in page


def test_ranks_of_plans_and_placements() -> None:
    assert modelled.spearman([1, 2, 3, 4], [2, 4, 6, 8]) == 1 and modelled.spearman([1, 2], [4, 3]) == -1
    assert modelled.spearman([1.0, 1.0 + 1e-12, 2.0], [5.0, 5.0, 6.0]) == 1, "equal up to rounding"
    one, two = Degrees(1, 1, 4), Degrees(1, 2, 2)
    assert modelled.placement_effect({(one, None): 9.0, (two, None): 2.0, (two, _placed()): 3.0}) == 1.5


def _placed() -> Placement:
    return Placement((1, 1), (2, 1), (1, 2))
