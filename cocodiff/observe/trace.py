"""Timelines that people look at: traces for Perfetto, the ranks merged, what was exposed and what was hidden.

A folder of traces holds one file for each rank, `trace-rank0.json` and so on, in the Chrome trace format: a process
per rank, a row for compute and one for each lane. https://ui.perfetto.dev opens them, and the merged one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cocodiff.errors import ConfigError
from cocodiff.observe.timeline import COMPUTE, Span, Timeline

TENSORS = ("v", "k", "q", "o")


def write_trace(timeline: Timeline, folder: Path, rank: int) -> None:
    """This rank's spans as `folder/trace-rank<rank>.json`."""
    spans = timeline.spans()
    lanes = [COMPUTE, *sorted({span.lane for span in spans} - {COMPUTE})]
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}]
    for index, lane in enumerate(lanes):
        name = lane if lane == COMPUTE else f"lane {lane}"
        events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": index, "args": {"name": name}})
    for span in spans:
        times = {"ts": span.begin * 1e6, "dur": span.seconds * 1e6}
        events.append({"ph": "X", "name": span.label, "pid": rank, "tid": lanes.index(span.lane), **times})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"trace-rank{rank}.json").write_text(json.dumps({"traceEvents": events}))
    except OSError as error:
        raise ConfigError(f"--trace {folder}: cannot be written ({error.strerror or error}).") from None


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """The events of all ranks of a folder. ConfigError where there are none."""
    paths = sorted(folder.glob("trace-rank*.json"))
    if not paths:
        raise ConfigError(f"{folder} holds no trace-rank*.json: run generate or bench with --trace {folder} first.")
    events = []
    for path in paths:
        try:
            events += json.loads(path.read_text())["traceEvents"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is no trace of cocodiff.") from None
    return events


def spans_by_rank(events: Sequence[Mapping[str, Any]]) -> dict[int, list[Span]]:
    """What `write_trace` wrote, as spans again, ranks in order."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans: dict[int, list[Span]] = {}
    for event in events:
        if event["ph"] == "X":
            lane = names[event["pid"], event["tid"]].removeprefix("lane ")
            begin, seconds = event["ts"] / 1e6, event["dur"] / 1e6
            spans.setdefault(event["pid"], []).append(Span(lane, event["name"], begin, begin + seconds))
    return dict(sorted(spans.items()))


def summary(spans: Mapping[int, Sequence[Span]]) -> dict[str, Any]:
    """What a trace shows, over all its forwards.

    Returns:
        `exposed_seconds`: rank -> seconds a step that compute waited for lanes; `seconds`: of a step on the slowest
        rank; `hidden`: tensor -> the share of its time on the outermost lane in which no rank-mean compute waited for
        it; `slowest`: the rank that waited least, for which the others wait; `bubble`: the longest wait.
    """
    steps = max(1, sum(span.label == "forward" for span in next(iter(spans.values()))))
    waits = {rank: [span for span in mine if span.label.startswith("wait ")] for rank, mine in spans.items()}
    exposed = {rank: sum(span.seconds for span in mine) / steps for rank, mine in waits.items()}
    every = [span for mine in spans.values() for span in mine]
    hidden = {}
    for tensor in TENSORS:
        busy = sum(span.seconds for span in every if span.lane != COMPUTE and span.label == tensor)
        waited = sum(span.seconds for mine in waits.values() for span in mine if span.label == f"wait {tensor}")
        hidden[tensor] = None if busy == 0 else max(0.0, 1 - waited / busy)
    longest = max(((span, rank) for rank, mine in waits.items() for span in mine), key=lambda x: x[0].seconds)
    forwards = [sum(span.seconds for span in mine if span.label == "forward") / steps for mine in spans.values()]
    return {
        "steps": steps,
        "seconds": max(forwards),
        "exposed_seconds": exposed,
        "hidden": hidden,
        "slowest": min(exposed, key=lambda rank: exposed[rank]),
        "bubble": {
            "rank": longest[1],
            "label": longest[0].label,
            "seconds": longest[0].seconds,
            "at": longest[0].begin,
        },
    }


def describe(found: Mapping[str, Any]) -> str:
    """The summary as a Markdown table and a few lines."""
    lines = [
        f"{found['steps']} step(s), {found['seconds']:.3f} s each on the slowest to finish",
        "",
        "| rank | exposed communication a step | share |",
        "|---|---|---|",
    ]
    for rank, seconds in found["exposed_seconds"].items():
        mark = " (waits least: the others wait for it)" if rank == found["slowest"] else ""
        lines.append(f"| {rank}{mark} | {seconds:.3f} s | {seconds / found['seconds']:.0%} |")
    shares = [f"{name.upper()} {share:.0%}" for name, share in found["hidden"].items() if share is not None]
    bubble = found["bubble"]
    lines += [
        "",
        f"hidden share of each tensor's time on the lanes: {', '.join(shares)}",
        f"biggest bubble: rank {bubble['rank']}, {bubble['label']}, {bubble['seconds'] * 1e3:.1f} ms "
        f"at {bubble['at']:.3f} s",
    ]
    return "\n".join(lines)


def plot_step(spans: Mapping[int, Sequence[Span]], path: Path, title: str) -> None:
    """The first forward of every rank as a picture: compute above, lanes below, waits left white."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except Exception:
        raise ConfigError("plots need matplotlib: pip install 'cocodiff[plot]'") from None
    colours = {"v": "#d1495b", "k": "#edae49", "q": "#66a182", "o": "#2e4057", "attend": "#8d6cab"}
    colours |= {"parallel": "#b9b4c7", "finish": "#9fb8d0", "gather": "#777777"}
    rows = [(rank, lane) for rank, mine in spans.items() for lane in _lanes(mine)]
    figure = Figure(figsize=(12, 0.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (rank, lane) in enumerate(rows):
        forward = next(span for span in spans[rank] if span.label == "forward")
        for span in spans[rank]:
            inside = forward.begin <= span.begin and span.end <= forward.end and span.lane == lane
            if inside and span.label in colours:
                axes.barh(place, span.seconds, left=span.begin, height=0.8, color=colours[span.label], linewidth=0)
    axes.set_yticks(range(len(rows)), [f"rank {rank} {lane}" for rank, lane in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title, fontsize=10)
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()],
        loc="outside lower center", ncols=len(colours), fontsize=8, frameon=False,
    )  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def _lanes(spans: Sequence[Span]) -> list[str]:
    return [COMPUTE, *sorted({span.lane for span in spans} - {COMPUTE})]
