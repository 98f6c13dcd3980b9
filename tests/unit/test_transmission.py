"""Settings of selective transmission and its schedule of bits."""

import pytest

from cocodiff.errors import ConfigError
from cocodiff.selective.schedule import LADDER, METHODS, PRESETS, RAW, Coding, Selective


def _mean_bits(codings, width, itemsize, rows=4000):
    row_bytes = (coding.row_bytes(width, itemsize) for coding in codings)
    total = sum(coding.bytes_of(rows, size, "v") for coding, size in zip(codings, row_bytes, strict=True))
    return total * 8 / rows / width / len(codings)


@pytest.mark.parametrize("steps", [20, 28, 50])
@pytest.mark.parametrize("width", [24, 48, 128, 1536])
def test_budgets_are_kept_and_used(steps, width):
    for budget in (1 / 2, 1 / 4, 1 / 8, 1 / 16):
        codings = Selective(budget=budget).codings(steps, width, 2)
        assert len(codings) == steps
        assert 0.9 * 16 * min(budget, 0.5) < _mean_bits(codings, width, 2) <= 16 * budget * 1.001
        places = [LADDER.index(coding) for coding in codings]
        assert places == sorted(places), "many bits early, few late"
        assert codings[0].share == 1, "what is never sent whole is never right"


def test_short_runs_fall_back_towards_exact():
    shares = [_mean_bits(Selective(budget=1 / 8).codings(steps, 128, 2), 128, 2) / 16 for steps in (28, 12, 8, 4, 2)]
    assert shares == sorted(shares) and shares[0] <= 1 / 8 and shares[-1] >= 0.9
    assert all(coding.bits == RAW and coding.share == 1 for coding in Selective(budget=1 / 8).codings(1, 128, 2))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("budget", [1 / 2, 1 / 4, 1 / 8, 1 / 16])
def test_methods_to_compare_spend_the_same(method, budget):
    try:
        codings = Selective(budget=budget, method=method).codings(28, 96, 2)
    except ConfigError:
        assert method == "plain" and budget == 1 / 16  # a bit an element, and the scale, are more
        return
    assert _mean_bits(codings, 96, 2) / 16 <= budget * 1.02


def test_the_papers_rule_falls_in_a_straight_line_from_all_rows_to_none():
    codings = Selective.v_major(1 / 2, refresh=0).codings(41, 128, 2)
    shares = [coding.share for coding in codings]
    falls = {round(before - after, 6) for before, after in zip(shares[1:], shares[2:], strict=False)}
    assert len(falls) == 1 and shares[0] == 1 and shares[1] > 0.95 and shares[-1] < 0.05
    refreshed = [coding.share for coding in Selective.v_major(1 / 2, refresh=10).codings(41, 128, 2)]
    assert [step for step, share in enumerate(refreshed) if share == 1] == [0, 10, 20, 30, 40]


def test_presets_and_names():
    assert Selective.of("exact") is None and Selective.of(Selective(budget=1)) is None
    assert {name: Selective.of(name).budget for name in PRESETS} == {"high": 1 / 4, "balanced": 1 / 8, "fast": 1 / 16}
    assert PRESETS["fast"].share(28, ring=True) == 1 / 32 and PRESETS["high"].share(28, ring=True) == 1 / 4
    assert PRESETS["high"].share(10, ring=True) == 1 / 2 and PRESETS["high"].share(3, ring=False) == 1
    assert Coding(1, 0.25).told(8, "v") and not Coding(1).told(8, "v") and not Coding(1, 0.0).told(8, "v")


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
        (lambda: Selective(warmup=0), "warmup=0"),
        (lambda: Selective(refresh=2), "method='predicted' has no such steps"),
        (lambda: Selective(budget="1/8"), "Write budget=1/8, no text"),
        (lambda: Selective(check="yes"), "neither True nor False"),
        (lambda: Selective(level=3), "level=3"),
        (
            lambda: Selective(budget=1e-3).codings(28, 128, 2),
            "takes a bit an element .* at least 0.00238",
        ),
        (
            lambda: Selective(budget=1 / 32, method="plain").codings(28, 128, 2),
            "each step takes .* 0.0665",
        ),
        (
            lambda: Selective(budget=1 / 64, method="v_major").codings(28, 128, 2),
            "step is whole. Use at least 0.0358",
        ),
    ],
)
def test_what_cannot_be_is_said_with_its_numbers(make, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        make()
