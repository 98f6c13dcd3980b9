"""How long a drawing took: what `cocodiff generate` says when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cocodiff.observe.timeline import Span

RUN, STEP = "run", "step"  # labels of the whole call and of the end of a step, on a lane of their own


@dataclass(frozen=True)
class Figures:
    """Seconds of one drawing on this rank.

    Attributes:
        steps: that were run; image to image leaves out the first of those asked for.
        first: until the end of the first step: text encoders, the picture given, connections and that step.
        step: each step after the first; None of a single one.
        decode: after the last step.
        waiting: the share of the whole call in which compute waited for exchanges; None if it was not recorded.
    """

    total: float
    steps: int = 0
    first: float | None = None
    step: float | None = None
    decode: float | None = None
    waiting: float | None = None


def figures(own: Sequence[Span], session: Sequence[Span] | None) -> Figures:
    """Return the figures of a call.

    Args:
        own: one span RUN of the call, and a span STEP at the end of each step, in any order.
        session: the spans of the wrapped pipeline's timeline, if it kept one.

    >>> own = [Span("", STEP, 1.0, 1.0), Span("", STEP, 1.5, 1.5), Span("", RUN, 0.0, 2.0)]
    >>> figures(own, None)
    Figures(total=2.0, steps=2, first=1.0, step=0.5, decode=0.5, waiting=None)
    """
    run = next(span for span in own if span.label == RUN)
    ends = sorted(span.end for span in own if span.label == STEP)
    waiting = None
    if session is not None and run.seconds > 0:
        waiting = sum(span.seconds for span in session if span.label.startswith("wait ")) / run.seconds
    if not ends:
        return Figures(run.seconds, waiting=waiting)
    step = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None
    return Figures(run.seconds, len(ends), ends[0] - run.begin, step, run.end - ends[-1], waiting)


def describe(found: Figures, loading: float) -> str:
    """Return the figures in one line.

    >>> describe(Figures(2.0, 2, 1.0, 0.5, 0.5, 0.25), loading=3.0)
    'seconds: start and load 3.0, first step 1.00 with what is before it, each further 0.500, decode 0.50; \
drawn in 2.0 (25% waiting for exchanges)'
    """
    parts = [f"start and load {loading:.1f}"]
    if found.first is not None:
        parts.append(f"first step {found.first:.2f} with what is before it")
    if found.step is not None:
        parts.append(f"each further {found.step:.3f}")
    if found.decode is not None:
        parts.append(f"decode {found.decode:.2f}")
    waiting = "" if found.waiting is None else f" ({found.waiting:.0%} waiting for exchanges)"
    return f"seconds: {', '.join(parts)}; drawn in {found.total:.1f}{waiting}"
