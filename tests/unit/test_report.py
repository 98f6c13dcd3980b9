"""Timelines and what is made of them."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from cocodiff.cli import main
from cocodiff.errors import ConfigError
from cocodiff.observe.draw import plot_step
from cocodiff.observe.summary import describe, summary
from cocodiff.observe.timeline import Span, Timeline
from cocodiff.observe.trace import read_traces, spans_by_rank, write_trace


def _spans(wait):
    """Ten seconds of one rank: V travels for 4 s of which compute waits for `wait`, O for 2 s, all waited for."""
    return [
        Span("compute", "forward", 0.0, 10.0),
        Span("node", "v", 1.0, 5.0),
        Span("compute", "wait v", 5.0 - wait, 5.0),
        Span("node", "o", 7.0, 9.0),
        Span("compute", "wait o", 7.0, 9.0),
    ]


def test_the_summary_says_what_is_exposed_hidden_slowest_and_longest():
    found = summary({0: _spans(1.0), 1: _spans(3.0)})
    assert found["steps"] == 1 and found["seconds"] == 10.0
    assert found["exposed_seconds"] == {0: 3.0, 1: 5.0} and found["slowest"] == 0
    assert found["hidden"] == {"v": 0.5, "k": None, "q": None, "o": 0.0}
    assert found["bubble"] == {"rank": 1, "label": "wait v", "seconds": 3.0, "at": 2.0}
    text = describe(found)
    assert "V 50%, O 0%" in text and "| 1 | 5.000 s | 50% |" in text


class _Written(Timeline):
    def __init__(self, spans):
        self._given = spans

    def spans(self):
        return self._given


def test_traces_are_written_merged_and_drawn(tmp_path):
    for rank in (0, 1):
        write_trace(_Written(_spans(1.0)), tmp_path, rank)
    events = read_traces(tmp_path)
    spans = spans_by_rank(events)
    assert list(spans) == [0, 1]
    assert [(s.lane, s.label) for s in spans[1]] == [(s.lane, s.label) for s in _spans(1.0)]
    assert all(s.seconds == pytest.approx(t.seconds) for s, t in zip(spans[0], _spans(1.0), strict=True))
    names = {(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"}
    assert {(0, "rank 0"), (0, "compute"), (0, "lane node"), (1, "rank 1")} <= names
    pytest.importorskip("matplotlib")
    plot_step(spans, tmp_path / "step.png", "one step")
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_folders_without_traces_and_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="--trace"):
        read_traces(tmp_path)
    (tmp_path / "trace-rank0.json").write_text("[]")
    with pytest.raises(ConfigError, match="no trace"):
        read_traces(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(_Written([]), tmp_path / "trace-rank0.json", 0)


def test_on_an_accelerator_times_are_those_of_its_events(monkeypatch):
    """Events that the fake device reaches a second apart, whenever the host recorded them."""
    reached = iter(range(100))

    def event(enable_timing):
        made = SimpleNamespace(at=None)
        made.record = lambda: setattr(made, "at", next(reached))
        made.elapsed_time = lambda other: (other.at - made.at) * 1e3
        return made

    waited = []
    fake = SimpleNamespace(Event=event, synchronize=lambda: waited.append(1))
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    timeline = Timeline("cuda")
    timeline.restart()
    with timeline.span("compute", "forward"), timeline.span("compute", "attend"):
        pass
    assert timeline.spans() == [Span("compute", "attend", 2.0, 3.0), Span("compute", "forward", 1.0, 4.0)]
    assert waited


FORWARD = {"ph": "X", "name": "forward", "pid": 0, "tid": 0, "ts": 0, "dur": 1e6}
LANE = {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": "compute"}}


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("3", "damaged"),
        ("null", "damaged"),
        ("[" * 100_000, "damaged"),
        ("\xff", "damaged"),
        ('{"traceEvents": 3}', "damaged"),
        ('{"traceEvents": [3]}', "damaged"),
        ('{"traceEvents": [{}]}', "damaged"),
        ('{"traceEvents": [{"ph": "X", "name": "a"}]}', "damaged"),
        (json.dumps({"traceEvents": [FORWARD]}), "damaged"),
        (json.dumps({"traceEvents": [LANE, FORWARD | {"dur": "x"}]}), "damaged"),
        (json.dumps({"traceEvents": [LANE, FORWARD | {"dur": float("nan")}]}), "damaged"),
        (json.dumps({"traceEvents": [LANE, FORWARD | {"dur": -1}]}), "damaged"),
        (json.dumps({"traceEvents": [LANE, FORWARD | {"name": 3}]}), "damaged"),
        (json.dumps({"traceEvents": [LANE | {"args": 3}, FORWARD]}), "damaged"),
        ('{"traceEvents": []}', "holds no step"),
        (json.dumps({"traceEvents": [LANE, FORWARD | {"name": "v"}]}), "holds no step"),
        (json.dumps({"traceEvents": [LANE, FORWARD]}), None),
    ],
)
def test_traces_that_are_foreign_or_damaged_are_one_line(monkeypatch, capsys, tmp_path, text, words):
    (tmp_path / "trace-rank0.json").write_text(text, encoding="latin-1")
    monkeypatch.setattr(sys, "argv", ["cocodiff", "report", "trace", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    if words is None:
        assert ended.value.code == 0 and "compute never waited" in said.out and "nothing was on a lane" in said.out
    else:
        assert ended.value.code == 2 and words in said.err and said.err.count("\n") == 1, said


def test_where_a_report_cannot_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "trace-rank0.json").write_text(json.dumps({"traceEvents": [LANE, FORWARD]}))
    for option, path in (("--out", tmp_path / "none" / "x"), ("--plot", tmp_path / "none" / "x.png")):
        monkeypatch.setattr(sys, "argv", ["cocodiff", "report", "trace", str(tmp_path), option, str(path)])
        with pytest.raises(SystemExit):
            main()
        assert f"{option} {path}: there is no folder" in capsys.readouterr().err


def test_a_trace_of_no_time_has_no_shares_to_divide():
    found = summary({0: [Span("compute", "forward", 0.0, 0.0), Span("compute", "wait v", 0.0, 0.0)]})
    assert "| 0.000 s | 0% |" in describe(found)
