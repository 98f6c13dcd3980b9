"""A drawing of one step of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cocodiff.errors import ConfigError
from cocodiff.observe.timeline import Span
from cocodiff.observe.trace import lanes

COLOURS = {
    "v": "#d1495b",
    "k": "#edae49",
    "q": "#66a182",
    "o": "#2e4057",
    "attend": "#8d6cab",
    "parallel": "#b9b4c7",
    "finish": "#9fb8d0",
    "gather": "#777777",
}


def plot_step(spans: Mapping[int, Sequence[Span]], path: Path, title: str) -> None:
    """Draw the first forward of every rank: a row for compute, and below it one for each lane. Waits stay white.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except Exception:
        raise ConfigError("plots need matplotlib: pip install 'cocodiff[plot]'") from None
    rows = [(rank, lane) for rank, mine in spans.items() for lane in lanes(mine)]
    figure = Figure(figsize=(12, 0.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (rank, lane) in enumerate(rows):
        forward = next(span for span in spans[rank] if span.label == "forward")
        for span in spans[rank]:
            inside = forward.begin <= span.begin and span.end <= forward.end and span.lane == lane
            if inside and span.label in COLOURS:
                axes.barh(place, span.seconds, left=span.begin, height=0.8, color=COLOURS[span.label], linewidth=0)
    axes.set_yticks(range(len(rows)), [f"rank {rank} {lane}" for rank, lane in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title, fontsize=10)
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in COLOURS.items()],
        loc="outside lower center", ncols=len(COLOURS), fontsize=8, frameon=False,
    )  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise ConfigError(f"{path}: cannot be written ({error}).") from None
