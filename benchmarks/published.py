"""Latencies of other engines on H100 as they were published, and what the planner's model says of such runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.modelled import asked, plain, table
from cocodiff.parallel.mesh import Degrees
from cocodiff.planner.rates import DEVICES
from cocodiff.planner.search import Task
from cocodiff.topology import PRESETS

DGX, RATES = PRESETS["dgx-h100"], DEVICES["h100"]
# (model, steps, mesh, compiled, published by, seconds), 1024 x 1024 pixels
_ONE, _U2, _U4 = Degrees(1, 1, 1), Degrees(1, 1, 2), Degrees(1, 1, 4)
LATENCIES = (
    ("flux-dev", 28, _ONE, False, "xDiT", 6.71),
    ("flux-dev", 28, _ONE, True, "xDiT", 4.30),
    ("flux-dev", 28, _U2, False, "xDiT", 4.38),
    ("flux-dev", 28, _U2, True, "xDiT", 2.68),
    ("flux-dev", 28, _U4, False, "xDiT", 4.24),
    ("flux-dev", 28, _U4, True, "xDiT", 1.63),
    ("flux-dev", 28, Degrees(1, 2, 2), False, "xDiT", 5.19),
    ("flux-dev", 28, Degrees(1, 2, 2), True, "xDiT", 1.80),
    ("flux-dev", 28, Degrees(1, 4, 1), False, "xDiT", 5.11),
    ("flux-dev", 28, Degrees(1, 4, 1), True, "xDiT", 1.98),
    ("flux-dev", 28, _ONE, False, "xDiT#378", 6.27),
    ("flux-dev", 28, _ONE, True, "xDiT#378", 3.88),
    ("flux-dev", 28, _U4, False, "xDiT#378, its lowest", 2.96),
    ("flux-dev", 28, _U4, True, "xDiT#378, its lowest", 2.21),
    ("flux-dev", 25, Degrees(1, 2, 4), False, "xDiT#416", 2.81),
    ("flux-dev", 25, Degrees(1, 8, 1), False, "xDiT#416", 4.34),
    ("flux-dev", 50, _ONE, False, "cache-dit", 9.30),
    ("flux-dev", 50, _U2, False, "cache-dit", 6.04),
    ("qwen-image", 50, _ONE, False, "cache-dit", 18.49),
    ("qwen-image", 50, _U2, False, "cache-dit", 12.81),
    ("flux-dev", 28, Degrees(1, 1, 8), False, "-", None),
    ("flux-dev", 28, Degrees(1, 1, 8), True, "-", None),
    ("qwen-image", 50, _U4, False, "-", None),
    ("qwen-image", 50, Degrees(1, 1, 8), False, "-", None),
)
FITTED = LATENCIES[:2]
FUSED = 0.06  # of eager's bytes of operators bound by memory, chosen by the second row: the host starts nothing then
STATED_US = {"latency_us": DGX.levels[0].latency_us, "launch_us": RATES.launch_us}
TRIED_US = (5.0, 8.0, 10.0, 12.0, 16.0, 20.0, 25.0, 30.0, 40.0, 50.0, 60.0, 80.0)


Row = tuple[str, int, Degrees, bool, str, float | None]


def h100(latencies: Sequence[Row] = LATENCIES) -> Iterator[str]:
    """Each row beside the model, and what latency and what host would fit them best."""
    model = _Model()
    rows, errors = [], []
    for row in latencies:
        name, steps, degrees, compiled, source, published = row
        seconds = model.seconds(row)
        cells = [name, str(steps), f"{degrees.ring} x {degrees.ulysses}", "compiled" if compiled else "eager", source]
        if published is None:
            rows.append([*cells, "-", f"{seconds:.2f} s", "-"])
            continue
        error, chosen = seconds / published - 1, row in FITTED
        rows.append(
            [*cells, f"{published:.2f} s", f"{seconds:.2f} s", f"{error:+.0%}{' (chosen by it)' if chosen else ''}"]
        )
        if not chosen:
            errors.append(error)
    yield from table(
        ("model", "steps", "ring x ulysses", "how", "published by", "published", "modelled", "error"), rows
    )
    if errors:
        yield (
            f"\nMean error of the {len(errors)} rows by which nothing was chosen {np.mean(np.abs(errors)):.0%}, "
            f"signed {np.mean(errors):+.0%}, "
            f"most {max(map(abs, errors)):.0%}."
        )
    several = [row for row in latencies if row[5] is not None and row[2].ring * row[2].ulysses > 1]
    for compiled, what, words in (
        (True, "latency_us", "a collective that takes"),
        (False, "launch_us", "a host that takes"),
    ):
        some = [row for row in several if row[3] == compiled]
        if some:
            stated = model.error(some)
            best, value = min((model.error(some, **{what: one}), one) for one in TRIED_US)
            yield (
                f"\nThe {len(some)} {'compiled' if compiled else 'eager'} rows of several GPUs: mean error "
                f"{stated:.0%}; with {words} {value:g} us instead of "
                f"{STATED_US[what]:g}, which fits them best, {best:.0%}."
            )


class _Model:
    """Seconds of rows; keeps what was traced."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[str, int], Task] = {}

    def seconds(
        self, row: Row, latency_us: float = STATED_US["latency_us"], launch_us: float = STATED_US["launch_us"]
    ) -> float:
        name, steps, degrees, compiled, _, _ = row
        key = name, degrees.ring * degrees.ulysses
        if key not in self._tasks:
            self._tasks[key] = asked(name, 1024, 1024, None, DGX.resolve(key[1]), RATES)
        of, rates = self._tasks[key], replace(RATES, launch_us=launch_us)
        if compiled:
            rates = replace(rates, launch_us=0.0, memory_gbs=rates.memory_gbs / FUSED)
        levels = tuple(replace(level, latency_us=latency_us) for level in of.cluster.levels)
        return steps * plain(replace(of, rates=rates, cluster=replace(of.cluster, levels=levels)), degrees)

    def error(self, rows: Sequence[Row], **given: float) -> float:
        """Mean of the errors' sizes."""
        return float(np.mean([abs(self.seconds(row, **given) / row[5] - 1) for row in rows if row[5] is not None]))
