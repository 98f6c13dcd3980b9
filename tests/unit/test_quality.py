"""The quality benchmark without a model: metrics, comparison methods, names of units, the tables of what is kept."""

import json

import pytest
import torch

from benchmarks.quality import gallery
from benchmarks.quality.methods import COMPARED, comparison
from benchmarks.quality.metrics import psnr, relative_error, ssim
from benchmarks.quality.simulate import Hosts
from benchmarks.quality.sweep import Unit, collected, summary, units
from cocodiff.errors import ConfigError
from tests.house import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "quality"
BLOCKS, WIDTH, STEPS = (40, 60), 48, 28


def _played(name, budget):
    """(rows, received, bytes) of each step."""
    method, generator = comparison(name, budget, STEPS, WIDTH, 2), torch.Generator().manual_seed(0)
    rows = torch.randn(sum(BLOCKS), WIDTH, generator=generator)
    played = []
    for step in range(STEPS):
        rows = rows + 0.1 * torch.randn(rows.shape, generator=generator)
        played.append((rows, *method(step, rows, BLOCKS)))
    return played


@pytest.mark.parametrize("name", COMPARED)
def test_comparison_methods_spend_their_budget_and_no_more(name):
    share = sum(sent for *_, sent in _played(name, 1 / 4)) / (sum(BLOCKS) * WIDTH * 2 * STEPS)
    assert (1 / 8 if name == "plain" else 0.23) < share <= 1 / 4 * 1.02, "plain sends whole bits"


@pytest.mark.parametrize("name", ["changed_rows", "random_rows", "oldest_rows"])
def test_rows_that_travel_are_exact_and_the_others_are_those_received_last(name):
    held = None
    for step, (rows, received, _) in enumerate(_played(name, 1 / 4)):
        fresh = (received == rows).all(1)
        assert fresh.all() if step == 0 else 0 < fresh.sum() < len(rows)
        assert held is None or torch.equal(received[~fresh], held[~fresh].bfloat16().float())
        held = received


def test_skip_sends_everything_or_nothing():
    sent = [count for *_, count in _played("skip", 1 / 4)]
    assert sent[0] == max(sent) and sorted(set(sent)) == [0, sum(BLOCKS) * WIDTH * 2] and sent.count(max(sent)) == 7


def test_budgets_that_hold_nothing_are_refused_and_short_runs_send_everything():
    for name in COMPARED:
        with pytest.raises(ConfigError, match="a budget of"):
            comparison(name, 1 / 64, STEPS, WIDTH, 2)
        rows = torch.randn(sum(BLOCKS), WIDTH)
        received, sent = comparison(name, 1 / 4, 4, WIDTH, 2)(0, rows, BLOCKS)
        assert torch.equal(received, rows) and sent == rows.numel() * 2


def test_metrics():
    assert psnr(torch.zeros(1, 4, 4, 3), torch.full((1, 4, 4, 3), 0.1)).tolist() == pytest.approx([20.0], abs=1e-4)
    assert psnr(torch.zeros(1, 4, 4, 3), torch.zeros(1, 4, 4, 3)).tolist() == pytest.approx([120.0])
    assert ssim(torch.ones(1, 16, 16, 3), torch.ones(1, 16, 16, 3)).tolist() == pytest.approx([1.0])
    assert relative_error(torch.full((1, 4), 1.1), torch.ones(1, 4)).tolist() == pytest.approx([0.1], abs=1e-6)


def test_the_kept_units_have_the_names_that_a_sweep_looks_for_and_make_the_kept_table():
    for path in (RESULTS / "units").glob("*.json"):
        unit = json.loads(path.read_text())["unit"]
        assert Unit(**unit | {"hosts": Hosts(**unit["hosts"])}).name == path.stem
    results = collected(RESULTS)
    assert gallery.table(results) == (RESULTS / "quality.md").read_text()
    kept = json.loads((RESULTS / "quality.json").read_text())["units"]
    assert [one["unit"] | summary(one) for one in results] == kept


def test_units_are_those_that_a_budget_holds():
    some = units(["text2image"], [28], [Hosts()], ["rounding", "plain", "v_major"], [1 / 8, 1 / 32])
    assert [unit.name.split("ulysses-")[1] for unit in some] == ["rounding-1", "plain-8", "v_major-8"]
    with pytest.raises(ConfigError, match="--methods guess: there are rounding, predicted, v_major, changed_rows"):
        units(["text2image"], [28], [Hosts()], ["guess"], [1 / 8])
