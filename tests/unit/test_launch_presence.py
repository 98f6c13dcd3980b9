"""What follows from the signs that ranks give: on a clock of the test, without threads or a store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cocodiff.errors import LaunchError
from cocodiff.launch.presence import EVERY_CALL, Lookout, Sign, Verdict, View
from cocodiff.launch.waits import Waits

WAITS = Waits(notice_seconds=30, absent_seconds=600, silent_seconds=300)
GRACE = 10.0


class Run:
    """One rank's looks, a second apart, at ranks that beat, or stand still, as the test says."""

    def __init__(self, mine: Sign, signs: dict[int, Sign | None], rank: int = 0) -> None:
        self.lookout, self.now, self.lines = Lookout(WAITS), 0.0, []
        self.view = View(rank, "a call", mine, signs)

    def change(self, **fields) -> None:
        self.view = replace(self.view, **fields)

    def run(self, seconds: float, beating: tuple[int, ...] = (0, 1, 2, 3), answers: bool = True) -> Verdict | None:
        """Look for so long; return the verdict that ends the rank, and None if there was none."""
        end = self.now + seconds
        while self.now < end:
            self.now += 1
            signs = {
                rank: replace(sign, beat=sign.beat + 1) if sign is not None and rank in beating and answers else sign
                for rank, sign in self.view.signs.items()
            }
            self.change(signs=signs, answers=self.view.answers + answers)
            verdict = self.lookout.look(self.now, self.view, GRACE)
            if verdict.line is not None:
                self.lines.append(verdict.line)
            if verdict.end is not None:
                return verdict
        return None


IN_CALL, IN_FORWARD = Sign(call=2, depth=1), Sign(call=2, inner=3, depth=2)


@pytest.mark.parametrize("mine", [IN_CALL, IN_FORWARD])
def test_ranks_that_are_together_may_take_for_ever(mine):
    run = Run(mine, {1: mine, 2: mine})
    assert run.run(2_000) is None and run.lines == []


def test_a_rank_that_never_makes_the_call_is_named_and_ends_the_run():
    run = Run(IN_CALL, {1: IN_CALL, 2: Sign(call=1), 3: None})
    assert run.run(29) is None and run.lines == []
    assert run.run(500) is None
    assert len(run.lines) == 1 and "it has waited 30 s in a call for ranks 2, 3, alive but outside" in run.lines[0]
    end = run.run(200).end
    assert "waited 600 s (COCODIFF_ABSENT_SECONDS) in vain for ranks 2, 3 to make a call" in end
    assert 600 <= run.now <= 603


def test_a_rank_that_comes_late_is_welcome():
    run = Run(IN_CALL, {1: Sign(call=1)})
    assert run.run(590) is None
    run.change(signs={1: IN_CALL})
    assert run.run(2_000) is None and len(run.lines) == 1


@pytest.mark.parametrize("elsewhere", [Sign(call=2, inner=2, depth=1), Sign(call=1, inner=9, depth=1)])
def test_a_rank_that_is_busy_is_named_once_and_waited_for(elsewhere):
    """In a callback or the VAE, of this call or the one before."""
    run = Run(IN_FORWARD, {1: elsewhere, 2: IN_FORWARD})
    assert run.run(2_000) is None
    assert len(run.lines) == 1 and "for rank 1, alive but busy elsewhere" in run.lines[0]


def test_steps_with_a_slow_callback_each_are_no_wait():
    """The time counts from the forward that a rank waits in, not from the first one."""
    run = Run(IN_FORWARD, {1: replace(IN_FORWARD, inner=2, depth=1)})
    for inner in range(4, 20):
        assert run.run(20) is None
        run.change(mine=replace(IN_FORWARD, inner=inner), signs={1: replace(IN_FORWARD, inner=inner - 1, depth=1)})
    assert run.lines == []


@pytest.mark.parametrize("theirs", [IN_CALL, IN_FORWARD, Sign(call=1), Sign(call=1, depth=1)])
def test_a_rank_without_a_sign_of_life_ends_the_run(theirs):
    run = Run(IN_FORWARD, {1: theirs, 2: IN_FORWARD})
    assert run.run(20) is None
    end = run.run(400, beating=(2,)).end
    assert "no sign of life from rank 1 for 300 s (COCODIFF_SILENT_SECONDS)" in end and 318 <= run.now <= 325
    assert any("no sign of life from rank 1 for 30 s" in line for line in run.lines)
    assert not any("alive" in line for line in run.lines)


def test_a_rank_that_was_stopped_and_goes_on_is_no_failure():
    run = Run(IN_FORWARD, {1: IN_FORWARD})
    assert run.run(290, beating=()) is None
    assert run.run(2_000) is None


def test_a_process_that_was_stopped_itself_blames_nobody():
    run = Run(IN_FORWARD, {1: IN_FORWARD})
    run.run(5)
    run.now += 10_000
    assert run.run(1, beating=(), answers=False) is None
    assert run.run(100) is None and run.lines == []


def test_a_store_that_gives_no_answer_ends_the_rank_and_blames_no_other():
    run = Run(IN_FORWARD, {1: IN_FORWARD}, rank=1)
    run.run(5)
    end = run.run(400, answers=False).end
    assert "store, which rank 0 or its launcher holds, has given no answer for 300 s" in end
    assert len(run.lines) == 1 and "no sign of life" not in run.lines[0]


def test_one_rank_speaks_for_all_that_wait():
    signs = {0: IN_CALL, 1: Sign(call=1), 2: IN_CALL}
    said = []
    for rank in (0, 2):
        run = Run(IN_CALL, {other: sign for other, sign in signs.items() if other != rank}, rank)
        run.run(100)
        said.append(len(run.lines))
    assert said == [1, 0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(report="rank 1 failed in a call: ValueError"), "rank 1 failed in a call: ValueError"),
        (dict(signs={1: Sign(call=2, depth=0)}), "rank 1 left a call; this rank is inside"),
        (dict(signs={1: Sign(call=3, depth=1)}), "rank 1 left a call; this rank is inside"),
        (dict(signs={1: Sign(call=1, ended=1)}), f"rank 1 ended before this call. {EVERY_CALL}"),
        (dict(gone=True), "the run's store is gone: rank 0, or its launcher, ended"),
    ],
)
def test_reasons_that_end_a_rank_after_the_grace(changes, reason):
    run = Run(IN_FORWARD, {1: IN_FORWARD}, rank=0)
    run.run(3)
    run.change(**changes)
    assert run.run(GRACE - 1) is None
    assert run.run(5).end == f"it still waits 10 s after it heard: {reason}" and run.lines == []


def test_the_grace_is_of_one_call():
    run = Run(IN_FORWARD, {1: IN_FORWARD})
    run.change(report="rank 1 failed")
    assert run.run(GRACE - 2) is None
    run.change(report=None, mine=replace(IN_FORWARD, call=3), signs={1: replace(IN_FORWARD, call=3)})
    run.run(3)
    run.change(report="rank 1 failed again")
    assert run.run(GRACE - 2) is None and run.run(5) is not None


@pytest.mark.parametrize("theirs", [Sign(call=2, depth=0), Sign(call=2, depth=0, ended=1), Sign(call=3, depth=1)])
def test_outside_of_forwards_others_may_leave_first(theirs):
    run = Run(IN_CALL, {1: theirs})
    assert run.run(2_000, beating=()) is None and run.lines == []


def test_rank_0_that_has_finished_takes_the_store_with_it():
    run = Run(IN_CALL, {0: Sign(call=2, ended=1)}, rank=1)
    run.change(gone=True)
    assert run.run(2_000, answers=False) is None and run.lines == []


def test_signs_travel_as_text_and_nothing_else_is_believed():
    sign = Sign(7, 3, 2, 1, 2, 0)
    assert Sign.from_text(sign.to_text()) == sign
    for text in ("", "1 2 3", "1 2 3 4 5 x", "1 2 3 4 5 -6", "\x1b[31m", "1 2 3 4 5 6 7"):
        assert Sign.from_text(text) is None


def test_waits_come_from_the_environment():
    assert Waits.read({}) == Waits()
    assert Waits.read({"COCODIFF_START_SECONDS": "5", "COCODIFF_SILENT_SECONDS": "1e3"}) == Waits(5, silent_seconds=1e3)
    for text in ("", "soon", "0", "-1", "nan", "inf", "1e99"):
        with pytest.raises(LaunchError, match="COCODIFF_ABSENT_SECONDS=.*is not a number of seconds"):
            Waits.read({"COCODIFF_ABSENT_SECONDS": text})
