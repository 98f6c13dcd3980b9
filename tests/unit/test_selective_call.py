"""One call of a pipeline: which branch and step a forward is, when copies begin anew, and what the guard does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cocodiff.config import Selective
from cocodiff.errors import ConfigError
from cocodiff.selective.run import SelectiveCall
from cocodiff.selective.schedule import LADDER

STEPS = 24
COND, UNCOND = torch.ones(2), torch.zeros(2)
LINKS: Any = SimpleNamespace(level=1)


def _call(branches=1, steps=STEPS, said=None, **settings):
    return SelectiveCall(
        Selective(**{"budget": 1 / 8} | settings),
        kv_only=True,
        times=lambda: [1000.0 - 1000 / steps * step for step in range(steps)],
        branches=branches,
        device=torch.device("cpu"),
        say=lambda about, text: None if said is None else said.append(text),
        links=LINKS,
    )


def _held(call, coding):
    """The forward sends something, so that something is held."""
    layer = coding.layer("a layer")
    parcel = layer.parcel("v", ("send", "0", 0), (4,), ((0, 1),), 8, 4)
    layer.encode(parcel, torch.randn(32))
    return parcel


def test_a_forward_knows_its_step_and_time_and_only_the_first_is_first():
    call = _call()
    codings = [call.step(COND, torch.randn(2), "shape") for _ in range(3)]
    assert [(one.branch, one.step, one.first) for one in codings] == [(0, 0, True), (0, 1, False), (0, 2, False)]
    assert [one.time for one in codings] == pytest.approx([0, 1, 2]) and codings[0].share == 1 / 8
    assert [one.layer("b").layer for one in codings] == [0, 0, 0] and codings[1].layer("a").layer == 1


@pytest.mark.parametrize("names", [("cond", "uncond"), (None, None)])
def test_branches_go_by_their_names_or_else_by_the_values_of_their_conditions(names):
    call, found = _call(branches=2), []
    for _ in range(3):
        latents = torch.randn(2)  # both branches of a step see them
        found += [call.step(x.clone(), latents, 0, name) for x, name in zip((COND, UNCOND), names, strict=True)]
    assert [(one.branch, one.step) for one in found] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_equal_conditions_are_told_apart_by_name_or_by_the_latents_that_each_branch_sees_once():
    for names in (("cond", "uncond"), (None, None)):
        call, found = _call(branches=2), []
        for _ in range(2):
            latents = torch.randn(2)
            found += [call.step(COND, latents, 0, name) for name in names]
        assert [one.branch for one in found] == [0, 1, 0, 1], names
        assert not any(one.schedule.step != one.step for one in found)


def test_names_beyond_the_expected_branches_are_exact():
    call = _call(branches=2)
    assert call.step(COND, COND, 0, "cond") and call.step(UNCOND, COND, 0, "uncond")
    assert call.step(COND, COND, 0, "uncond_stg") is None
    assert call.step(COND, COND, 0, "cond").step == 1, "and count for no branch"


@pytest.mark.parametrize("name", ["cond", None])
def test_a_prompt_that_changes_begins_anew_and_another_shape_forgets_what_is_held(name):
    call = _call()
    parcel = _held(call, call.step(COND, COND, 0, name))
    call.step(COND, COND, 0, name)
    assert call.copies.get(parcel.key) is not None
    other = call.step(COND + 1, COND, 0, name)
    assert (other.step, other.schedule.step) == (2, 0) and call.copies.get(parcel.key) is None
    _held(call, other)
    longer = call.step(COND + 1, COND, "longer", name)
    assert (longer.step, longer.schedule.step) == (3, 1) and call.copies.get(parcel.key) is None
    assert call.held_bytes > 0, "the most that was held"


def test_what_a_layer_sends_at_a_step_and_whole_rows_where_nothing_is_held():
    call = _call()
    first = _held(call, call.step(COND, COND, 0))
    for _ in range(STEPS - 2):
        call.step(COND, COND, 0)
    last = call.step(COND, COND, 0).layer("a layer")
    assert [last.next_piece("v"), last.next_piece("v"), last.next_piece("k")] == [0, 1, 0]
    known, new = (last.parcel("v", ("send", piece, 0), (4,), ((0, 1),), 8, 4) for piece in "01")
    assert known.key == first.key and new.coding == first.coding and new.whole
    assert LADDER.index(known.coding) > LADDER.index(new.coding)


def test_short_runs_are_exact_and_say_so():
    said = []
    call = _call(steps=2, said=said)
    assert call.step(COND, COND, 0) is None and call.planned == 1
    assert ["one of 2 is exact" in text for text in said] == [True]
    call = _call(steps=10, said=said)
    assert call.step(COND, COND, 0).share == 1 / 4 and "may send 0.25 of the bytes instead of 0.125" in said[1]


def test_budgets_too_small_for_a_width_are_refused():
    coding = _call(budget=1e-3).step(COND, COND, 0)
    with pytest.raises(ConfigError, match="budget=0.001 is too small"):
        coding.check_width(48, 2)


def test_the_guard_raises_later_steps_and_never_lowers_them():
    call, errors = _call(max_error=0.1), iter([0.05, 0.2, 0.3, 0.01])
    rungs = []
    for _ in range(4):
        coding = call.step(COND, COND, 0)
        rungs.append(coding.schedule.rungs)
        call.forwarded(coding, lambda number: next(errors))
    assert rungs == [0, 0, 1, 2] and [one[2] for one in call.guarded] == [0, 1, 2, 2]


def test_the_guard_is_given_what_the_step_missed_of_what_it_had_to_send():
    call, given = _call(max_error=0.5), []
    coding = call.step(COND, COND, 0)
    coding.layer("a").missed[0, 0, "v"] += [torch.tensor([1.0, 50.0]), torch.tensor([3.0, 50.0])]
    call.missed[1, 0, "v"].append(torch.tensor([9.0, 9.0]))
    call.forwarded(coding, lambda number: given.append(number) or 0.0)
    assert torch.stack(given).tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("check", [False, True])
def test_copies_are_freed_after_the_last_forward_unless_they_are_to_be_compared(check):
    call = _call(branches=2, check=check)
    for step in range(STEPS):
        for number, conditions in enumerate((COND, UNCOND)):
            coding = call.step(conditions, torch.tensor(float(step)), 0)
            _held(call, coding)
            call.forwarded(coding, lambda number: 0.0)
            last = step == STEPS - 1 and number == 1
            assert (call.copies.held_bytes == 0) == (last and not check)
    assert call.held_bytes == 2 * 4 * 8 * 4, "two branches, 4 rows of 8, value and velocity"


def test_a_step_that_missed_much_is_said():
    said = []
    call = _call(said=said)
    call.judge([0.1, 0.4])
    call.judge([])
    assert said == []
    call.judge([0.1, 0.6])
    assert "at step 1 what was sent missed 60%" in said[0]
