"""What the command line says beside its results: what is not used, what is announced, what needs several ranks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from cocodiff import cli
from cocodiff.cli import drawing
from cocodiff.cli.drawing import Drawing
from cocodiff.cli.request import Request
from cocodiff.errors import ConfigError
from cocodiff.launch.job import Job
from tests.unit import test_cli
from tests.unit.test_cli import Started

run = test_cli.run  # the fixture: it runs the command line


@pytest.mark.parametrize("arguments", [("--ranks", "1"), ("--ranks", "1", "--methods", "single,exact")])
def test_methods_that_exchange_are_refused_on_one_rank_before_anything_starts(run, arguments):
    status, said = run("bench", *arguments)
    assert status == 2 and "one rank has nothing to exchange. Start the bench under a launcher" in said, said
    assert run("bench", "--ranks", "1", "--methods", "single") == ("started", "")


def test_methods_that_exchange_are_refused_without_a_launcher_before_a_model_is_built(run, monkeypatch):
    from cocodiff.bench import run as bench_run

    def built(*args):
        raise Started

    monkeypatch.setattr(bench_run, "build_transformer", built)
    small = ("--device", "cpu", "--scale", "1/64")
    status, said = run("bench", *small)
    assert status == 2 and "--methods diffusers,ulysses,exact: one rank has nothing to exchange" in said, said
    assert run("bench", *small, "--methods", "single")[0] == "started"  # control


def test_a_type_that_a_tiny_pipeline_does_not_have_is_said(monkeypatch, capsys):
    job = Job(0, 1, SimpleNamespace(type="cpu"), "none", ("host",))
    for dtype, times in (("bf16", 1), ("fp32", 0), (None, 0)):
        one = Drawing(Request(prompt="red", dtype=dtype))
        one.job = job
        one._say_what_comes(Started, clip=False)
        said = capsys.readouterr().err
        assert said.count("--dtype bf16 is not used: tiny pipelines run in float32.") == times, said
        assert "in float32 for 1 rank on cpu ..." in said


def test_the_reference_is_announced_and_is_no_part_of_loading(monkeypatch, capsys, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(drawing, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    seen = []

    def draw(self, pipe, timeline=None):
        clock[0] += 1000.0
        return "picture"

    monkeypatch.setattr(Drawing, "_draw", draw)
    monkeypatch.setattr(Drawing, "_draw_and_report", lambda self, pipe, expected, loading: seen.append(loading))
    Drawing(Request(prompt="red", compare=True, device="cpu", out=tmp_path / "out.png")).run()
    said = capsys.readouterr().err
    assert said.index("drawing the reference on one rank first") < said.index("loaded in 0.0 s, without the reference")
    assert seen == [0.0]


def test_doctor_on_one_rank_says_that_there_is_no_mesh(capsys):
    from cocodiff.cli.doctor import diagnose, render

    findings, _ = diagnose()
    assert "one rank shares nothing; under your launcher" in render(findings, as_json=False)


def test_verbose_shows_the_traceback_once_for_all_ranks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cocodiff", "--verbose"])

    def shown(spoke, cause):
        def fail(**kwargs):
            raise ConfigError("bad") from cause

        monkeypatch.setattr(cli, "say_once", lambda text: spoke)
        monkeypatch.setattr(cli, "app", fail)
        with pytest.raises(SystemExit):
            cli.main()
        return "Traceback" in capsys.readouterr().err

    assert shown(True, None) and not shown(False, None) and not shown(False, OSError("of a library"))
    assert shown(False, ConfigError("of this rank alone"))
