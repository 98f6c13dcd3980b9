"""Blocks of code in README.md and docs/ that are marked to be run, run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cocodiff
from tests.distributed.ranks import run_programs, torchrun_variables, without_launcher
from tests.house import ROOT
from tests.pages import Block, all_blocks, commands

PYTHON = [block for block in all_blocks() if block.language == "python" and block.kind == "run"]
SHELL = [block for block in all_blocks() if block.language == "bash" and block.kind in ("run", "run with")]


def check_left(block: Block, folder: Path, printed: str) -> None:
    """The words of a mark are files that are there now, or were printed."""
    if block.kind == "run":
        for word in block.words.split():
            assert (folder / word).exists() or word in printed, (word, printed)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one rank, with the tiny pipeline in the place of released weights."""
    import diffusers

    def tiny(cls: type, name: str, **kwargs: Any) -> Any:
        assert cls is diffusers.FluxPipeline and set(kwargs) <= {"dtype"}, (cls, kwargs)
        return cocodiff.tiny_pipeline()

    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", classmethod(tiny))
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})
    check_left(block, tmp_path, capsys.readouterr().out)


def _cocodiff(folder: str, arguments: list[str]) -> None:
    from cocodiff import cli

    os.chdir(folder)
    sys.argv = ["cocodiff", *arguments]
    cli.main()


@pytest.mark.distributed
@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_shell(block: Block, tmp_path: Path) -> None:
    """Commands of cocodiff, in processes that need not import torch anew; `--ranks` has its own test."""
    printed = ""
    for line in commands(block.text):
        program, *arguments = shlex.split(line) + (shlex.split(block.words) if block.kind == "run with" else [])
        assert program == "cocodiff", line
        ranks = 0
        if "--ranks" in arguments and "copies" not in arguments:
            place = arguments.index("--ranks")
            ranks = int(arguments[place + 1])
            del arguments[place : place + 2]
        variables: list[dict[str, str]] = torchrun_variables(ranks) if ranks else [{}]
        statuses, output = run_programs(variables, _cocodiff, str(tmp_path), arguments)
        assert set(statuses) == {0}, output
        printed += "".join(output)
    check_left(block, tmp_path, printed)


@pytest.mark.distributed
def test_demo(tmp_path: Path) -> None:
    """scripts/demo in a folder where this interpreter stands for .venv, on two ranks and with two steps."""
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    read = "".join((tmp_path / name).read_text() for name in ("pyproject.toml", "setup.py"))
    key = subprocess.run(["cksum"], input=read, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / ".venv" / ".installed-demo").write_text(f"{key} {tmp_path}\n")
    done = subprocess.run(
        ["scripts/demo", "--steps", "2", "--ranks", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=280,
        env=without_launcher(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing" not in done.stdout and (tmp_path / "demo.png").stat().st_size > 500
    assert float(done.stdout.split("relative error ")[1].split()[0]) < 1e-5, done.stdout
