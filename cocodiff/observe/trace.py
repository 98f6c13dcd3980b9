"""Trace files: one for each rank of a run, in the Chrome trace format, which https://ui.perfetto.dev opens.

A folder holds `trace-rank0.json` and so on. A process stands for a rank, with a row for compute and one for each lane.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cocodiff.errors import ConfigError
from cocodiff.observe.timeline import COMPUTE, Span, Timeline


def write_trace(timeline: Timeline, folder: Path, rank: int) -> None:
    """Write this rank's spans into `folder/trace-rank<rank>.json`. ConfigError if that cannot be written."""
    spans = timeline.spans()
    rows = lanes(spans)
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}]
    for index, lane in enumerate(rows):
        name = lane if lane == COMPUTE else f"lane {lane}"
        events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": index, "args": {"name": name}})
    for span in spans:
        times = {"ts": span.begin * 1e6, "dur": span.seconds * 1e6}
        events.append({"ph": "X", "name": span.label, "pid": rank, "tid": rows.index(span.lane), **times})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"trace-rank{rank}.json").write_text(json.dumps({"traceEvents": events}))
    except OSError as error:
        raise ConfigError(f"--trace {folder}: cannot be written ({error.strerror or error}).") from None


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """Return the events of all ranks of a folder. ConfigError if there are none, or if a file holds something else."""
    paths = sorted(folder.glob("trace-rank*.json"))
    if not paths:
        raise ConfigError(f"{folder} holds no trace-rank*.json: run generate or bench with --trace {folder} first.")
    events = []
    for path in paths:
        try:
            found = json.loads(path.read_text())["traceEvents"]
            spans = spans_by_rank(found)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"{path} is no trace of cocodiff, or damaged: record it again.") from None
        if not spans or not all(any(span.label == "forward" for span in mine) for mine in spans.values()):
            raise ConfigError(f"{path} holds no step: nothing was drawn while it was recorded.")
        events += found
    return events


def spans_by_rank(events: Sequence[Mapping[str, Any]]) -> dict[int, list[Span]]:
    """Return the spans that `write_trace` wrote, rank by rank. ValueError, TypeError or KeyError for other events."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans: dict[int, list[Span]] = {}
    for event in events:
        if event["ph"] == "X":
            lane = names[event["pid"], event["tid"]].removeprefix("lane ")
            begin, seconds = event["ts"] / 1e6, event["dur"] / 1e6
            if not (math.isfinite(begin) and math.isfinite(seconds) and seconds >= 0 and event["name"].strip()):
                raise ValueError(f"no span: {event}")
            spans.setdefault(int(event["pid"]), []).append(Span(lane, event["name"], begin, begin + seconds))
    return dict(sorted(spans.items()))


def lanes(spans: Sequence[Span]) -> list[str]:
    """Return the names of the rows of one rank: compute, then its lanes in alphabetical order."""
    return [COMPUTE, *sorted({span.lane for span in spans} - {COMPUTE})]
