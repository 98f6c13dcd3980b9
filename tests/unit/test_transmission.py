"""Settings of selective transmission and its schedule of bits."""

import pytest

from cocodiff.config import METHODS, PRESETS, Config, Selective
from cocodiff.errors import ConfigError
from cocodiff.selective import schedule
from cocodiff.selective.schedule import LADDER, RAW, Coding, StepSchedule, codings, share


def _mean_bits(planned, width, itemsize, rows=4000):
    total = sum(coding.block_bytes(rows, coding.row_bytes(width, itemsize), "v") for coding in planned)
    return total * 8 / rows / width / len(planned)


@pytest.mark.parametrize("steps", [20, 28, 50])
@pytest.mark.parametrize("width", [24, 48, 128, 1536])
def test_budgets_are_kept_and_used(steps, width):
    for budget in (1 / 2, 1 / 4, 1 / 8, 1 / 16):
        planned = codings(Selective(budget=budget), steps, width, 2)
        assert len(planned) == steps
        assert 0.9 * 16 * min(budget, 0.5) < _mean_bits(planned, width, 2) <= 16 * budget * 1.001
        places = [LADDER.index(coding) for coding in planned]
        assert places == sorted(places), "many bits early, few late"
        assert planned[0].share == 1, "what is never sent whole is never right"


def test_short_runs_fall_back_towards_exact():
    eighth = Selective(budget=1 / 8)
    shares = [_mean_bits(codings(eighth, steps, 128, 2), 128, 2) / 16 for steps in (28, 12, 8, 5)]
    assert shares == sorted(shares) and shares[0] <= 1 / 8 and shares[-1] > 0.45
    assert [share(eighth, steps) for steps in (20, 10, 5, 3, 2, 1)] == [1 / 8, 1 / 4, 1 / 2, 5 / 6, 1, 1]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("budget", [1 / 2, 1 / 4, 1 / 8, 1 / 16])
def test_methods_spend_the_same(method, budget):
    assert _mean_bits(codings(Selective(budget=budget, method=method), 28, 96, 2), 96, 2) / 16 <= budget * 1.02


def test_the_papers_rule_falls_in_a_straight_line_from_all_rows_to_none():
    planned = codings(Selective.v_major(1 / 2, refresh=0), 41, 128, 2)
    shares = [coding.share for coding in planned]
    assert all(coding.bits == RAW for coding in planned)
    falls = {round(before - after, 6) for before, after in zip(shares[1:], shares[2:], strict=False)}
    assert len(falls) == 1 and shares[0] == 1 and shares[1] > 0.95 and shares[-1] < 0.05
    refreshed = [coding.share for coding in codings(Selective.v_major(1 / 2, refresh=10), 41, 128, 2)]
    assert [step for step, share in enumerate(refreshed) if share == 1] == [0, 10, 20, 30, 40]


def test_presets_and_names():
    assert Selective.of("exact") is None and Selective.of(Selective(budget=1)) is None
    assert {name: Selective.of(name).budget for name in PRESETS} == {"high": 1 / 4, "balanced": 1 / 8, "fast": 1 / 16}
    assert share(PRESETS["fast"], 28, kv_only=True) == 1 / 32 and share(PRESETS["high"], 28, kv_only=True) == 1 / 4
    assert share(PRESETS["high"], 10, kv_only=True) == 1 / 2 and share(PRESETS["high"], 3, kv_only=False) == 1


def test_masks_are_sent_where_the_receiver_cannot_know_which_rows_travel():
    assert Coding(1, 0.25).has_mask(8, "k") and Coding(RAW, 0.25).has_mask(8, "v")
    assert not Coding(1).has_mask(8, "v") and not Coding(1, 0.0).has_mask(8, "v")
    assert not Coding(RAW, 0.25).has_mask(8, "k"), "K's rows of v_major are those of V"


def test_a_step_carries_more_after_the_guard_and_all_rows_where_nothing_is_held():
    def at(step, rungs=0, first=False):
        return StepSchedule(Selective(budget=1 / 16), 28, True, step, rungs).coding(96, 2, first)

    assert LADDER.index(at(20, rungs=2)) == LADDER.index(at(20)) - 2 and at(20, rungs=9) == LADDER[0]
    assert at(20, first=True) == at(0) == at(28), "also at steps that the scheduler did not announce"


def _planned_one_by_one(bits, steps, width):
    """`codings` with every possible rise of every step looked at again before each: slow, and easy to see right."""
    left = dict(zip(LADDER, schedule._LEFT, strict=True))
    costs = {one: one.block_bytes(8000, one.row_bytes(width, 0), "v") / 1000 / width for one in LADDER}
    weights = [(1 + 28 * t / steps) ** -schedule._DECAY * (1 if t else schedule._FIRST) for t in range(steps)]
    at = [Coding(1)] + [LADDER[-1]] * (steps - 1)
    while True:
        spent = sum(costs[one] for one in at)
        rises = [
            (weights[t] * (left[at[t]] - left[to]) / max(costs[to] - costs[at[t]], 1e-9), -t, -LADDER.index(to))
            for t in range(steps)
            for to in LADDER[: LADDER.index(at[t])]
            if spent + costs[to] - costs[at[t]] <= bits * steps + 1e-9
        ]
        if not rises:
            return at
        _, step, rung = max(rises)
        at[-step] = LADDER[-rung]


@pytest.mark.parametrize("budget", [1 / 16, 1 / 8, 0.4])
@pytest.mark.parametrize("width", [3, 48, 128])
def test_the_plan_is_that_of_looking_at_everything_each_time(budget, width):
    planned = codings(Selective(budget=budget), 24, width, 2)
    assert list(planned) == _planned_one_by_one(16 * share(Selective(budget=budget), 24), 24, width)


def test_a_run_of_thousands_of_steps_is_planned():
    """Looking at everything each time would take minutes."""
    assert len(codings(Selective(), 3000, 128, 2)) == 3000


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_narrow_rows_have_a_schedule(width):
    planned = codings(Selective(budget=1 / 2), 28, width, 2)
    assert _mean_bits(planned, width, 2) <= 8 and planned[0].share == 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Selective.of("fastest"), "'fastest' is not one of 'exact', 'high', 'balanced', 'fast'"),
        (lambda: Selective.of(0.5), "neither a name nor"),
        (lambda: Selective(budget=0), "budget=0 "),
        (lambda: Selective(budget=2), "budget=2 "),
        (lambda: Selective(max_error=-1.0), "max_error=-1.0"),
        (lambda: Selective(max_error=0.1, method="v_major"), "does not heed it"),
        (lambda: Selective(method="guess"), "'guess' is not one of"),
        (lambda: Selective(method="plain"), "'plain' is not one of predicted, residual, v_major"),
        (lambda: Selective(warmup=0), "warmup=0"),
        (lambda: Selective(refresh=2), "method='predicted' has no such steps"),
        (lambda: Selective(budget="1/8"), "Write budget=1/8, no text"),
        (lambda: Selective(check="yes"), "neither True nor False"),
        (lambda: Selective(level=3), "level=3"),
        (lambda: Selective(method=[]), "method=[] is not one of"),
        (lambda: Selective(method=None), "method=None is not one of"),
        (lambda: Config(pieces=0), "pieces=0"),
        (lambda: Config(cluster="frontier"), "unknown cluster 'frontier'"),
        (lambda: Config(cluster=""), "unknown cluster ''"),
        (lambda: Config(cluster="a\0b"), "unknown cluster"),
        (lambda: Config(cluster=[]), "neither a name, a path"),
        (lambda: codings(Selective(), 28, 0, 2), "rows of 0 elements"),
        (lambda: codings(Selective(), 0, 8, 2), "steps=0"),
        (
            lambda: codings(Selective(budget=1e-3), 28, 128, 2),
            "takes a bit an element .* at least 0.00238",
        ),
        (
            lambda: codings(Selective(budget=1 / 64, method="v_major"), 28, 128, 2),
            "step is whole. Use at least 0.0358",
        ),
    ],
)
def test_what_cannot_be_is_said_with_its_numbers(make, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").replace("[", r"\[")):
        make()
