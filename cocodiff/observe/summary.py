"""What a trace shows: how long compute waited for lanes, how much of each tensor's time was hidden, who was slowest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cocodiff.observe.timeline import COMPUTE, Span

TENSORS = ("v", "k", "q", "o")


def summary(spans: Mapping[int, Sequence[Span]]) -> dict[str, Any]:
    """Summarise the spans of each rank over all forwards of a trace.

    Returns:
        `steps`: the number of forwards.
        `seconds`: seconds a step on the rank that took longest.
        `exposed_seconds`: rank -> seconds a step that compute waited for lanes.
        `hidden`: tensor -> the share of its time on lanes during which compute did not wait for it, over all ranks;
            None if no lane carried it.
        `slowest`: the rank that waited least, since the others wait for it.
        `bubble`: the longest wait: `rank`, `label`, `seconds`, and `at`, the second at which it began; None if compute
            never waited.
    """
    steps = max(1, *(sum(span.label == "forward" for span in mine) for mine in spans.values()))
    waits = {rank: [span for span in mine if span.label.startswith("wait ")] for rank, mine in spans.items()}
    exposed = {rank: sum(span.seconds for span in mine) / steps for rank, mine in waits.items()}
    every = [span for mine in spans.values() for span in mine]
    hidden = {}
    for tensor in TENSORS:
        busy = sum(span.seconds for span in every if span.lane != COMPUTE and span.label == tensor)
        waited = sum(span.seconds for mine in waits.values() for span in mine if span.label == f"wait {tensor}")
        hidden[tensor] = None if busy == 0 else max(0.0, 1 - waited / busy)
    every_wait = ((span, rank) for rank, mine in waits.items() for span in mine)
    longest = max(every_wait, key=lambda x: x[0].seconds, default=None)
    forwards = [sum(span.seconds for span in mine if span.label == "forward") / steps for mine in spans.values()]
    return {
        "steps": steps,
        "seconds": max(forwards),
        "exposed_seconds": exposed,
        "hidden": hidden,
        "slowest": min(exposed, key=lambda rank: exposed[rank]),
        "bubble": None
        if longest is None
        else {
            "rank": longest[1],
            "label": longest[0].label,
            "seconds": longest[0].seconds,
            "at": longest[0].begin,
        },
    }


def describe(found: Mapping[str, Any]) -> str:
    """Return the summary as a Markdown table and a few lines of text."""
    lines = [
        f"{found['steps']} step(s), {found['seconds']:.3f} s each on the slowest to finish",
        "",
        "| rank | exposed communication a step | share |",
        "|---|---|---|",
    ]
    for rank, seconds in found["exposed_seconds"].items():
        share = seconds / found["seconds"] if found["seconds"] > 0 else 0.0
        mark = " (waits least: the others wait for it)" if rank == found["slowest"] else ""
        lines.append(f"| {rank}{mark} | {seconds:.3f} s | {share:.0%} |")
    shares = [f"{name.upper()} {share:.0%}" for name, share in found["hidden"].items() if share is not None]
    lines += ["", f"hidden share of each tensor's time on the lanes: {', '.join(shares) or 'nothing was on a lane'}"]
    bubble = found["bubble"]
    if bubble is None:
        return "\n".join([*lines, "compute never waited"])
    lines.append(
        f"biggest bubble: rank {bubble['rank']}, {bubble['label']}, {bubble['seconds'] * 1e3:.1f} ms "
        f"at {bubble['at']:.3f} s"
    )
    return "\n".join(lines)
