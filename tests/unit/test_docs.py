"""README.md and docs/: short, whole, and every block of code says who runs it; commands in them exist."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

import cocodiff
from cocodiff.cli import app
from cocodiff.topology import Cluster
from tests.distributed.draws import ALL, LIMIT, MESHES
from tests.house import ROOT
from tests.pages import CODE, INDENTED, PAGES, Block, all_blocks, blocks, commands, inline_code, without_code

KINDS = ("run", "run with", "run by", "needs", "not run")


def test_the_table_of_what_was_tested_is_whole() -> None:
    """docs/tested.md is what `python -m tests.table` makes: it has a row for all that the suite draws."""
    rows = [line for line in (ROOT / "docs" / "tested.md").read_text().splitlines() if line.startswith("|")]
    figures = [float(figure) for row in rows for figure in re.findall(r"\d+e-\d+", row)]
    assert max(figures) < LIMIT
    for name in ALL:
        assert any(f"| {name} |" in row for row in rows), name
    for mesh in (mesh for meshes in MESHES.values() for mesh in meshes):
        assert any(f"| {' x '.join(map(str, mesh))} |" in row for row in rows), mesh


def test_the_first_page_is_short_and_says_what_a_newcomer_must_know() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 6 * 1024
    screen = text[: text.index("## ")]
    for words in ("many GPUs", "one GPU would draw", "Not yet run on a GPU", "may\n", "Every rank holds all weights"):
        assert words.strip() in screen, words
    assert "\nscripts/test " in text, "continuous integration finds the command here"


def marks_that_lack(block: Block) -> bool:
    """Whether a block of code says neither who runs it nor why nobody does."""
    if block.language not in CODE:
        return block.language not in ("json", "text")
    return block.kind not in KINDS or (block.kind != "run" and not block.words)


def test_every_block_of_code_says_who_runs_it() -> None:
    assert [block.name for block in all_blocks() if marks_that_lack(block)] == []
    for path in PAGES:
        found = INDENTED.search(without_code(re.sub(r"^::: .*(\n .*)*", "", path.read_text(), flags=re.M)))
        assert found is None or path.name == "glossary.md", (path.name, found and found[0])


def test_control_a_block_without_a_mark_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n```python\nx = 1\n```\n\n```bash\nls\n```\n\n<!-- needs -->\n```bash\nls\n```\n")
    assert [marks_that_lack(block) for block in blocks(page)] == [False, True, True]


def test_tests_that_are_said_to_run_a_block_exist() -> None:
    for block in all_blocks():
        if block.kind == "run by":
            file, test = block.words.split("::")
            assert f"def {test}(" in (ROOT / file).read_text(), block.words


def test_cluster_files_in_the_pages_can_be_read() -> None:
    documents = [json.loads(block.text) for block in all_blocks() if block.language == "json"]
    assert [Cluster.from_json(json.dumps(one)).name for one in documents if "levels" in one] == ["mine"]


def fault_of_command(line: str) -> str | None:
    """What does not exist of a command that a page shows; None if nothing is wrong or it is not ours."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if ("-m", "cocodiff") in pairwise(words):
        words = words[words.index("-m") + 1 :]
    elif "--" in words:
        words = words[words.index("--") + 1 :]
    program = words[0] if words else ""
    if program.startswith(("scripts/", "benchmarks/")):
        return None if (ROOT / program).is_file() else f"there is no {program}"
    if program == "python" and words[1:2] == ["-m"] and words[2].split(".")[0] in ("benchmarks", "tests"):
        path = ROOT / words[2].replace(".", "/")
        return None if path.with_suffix(".py").is_file() or path.is_dir() else f"there is no module {words[2]}"
    if program != "cocodiff":
        return None
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if rest and rest[0][0] != "-" and getattr(command, "commands", None):
        return f"there is no command {rest[0]}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known | {"--help"}]
    return f"{program} has no {', '.join(unknown)}" if unknown else None


def test_commands_in_the_pages_exist_with_their_options() -> None:
    lines = [line for block in all_blocks() if block.language == "bash" for line in commands(block.text)]
    inline = [code for path in PAGES for code in inline_code(path.read_text())]
    lines += [code for code in inline if re.match(r"(cocodiff|torchrun|python -m|scripts/\w+|benchmarks/\w+) ", code)]
    assert len(lines) > 30
    assert {line: fault for line in lines if (fault := fault_of_command(line))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "cocodiff draw",
        "cocodiff generate --speed 2",
        "scripts/tset x",
        "python -m tests.tables",
        "torchrun --nproc-per-node 8 -m cocodiff bench --speed 2",
        "python -m cocodiff draw",
    ],  # fmt: skip
)
def test_control_a_command_that_does_not_exist_is_found(line: str) -> None:
    assert fault_of_command(line) is not None


def test_files_that_the_pages_name_exist() -> None:
    named = re.compile(r"(?:cocodiff|tests|scripts|benchmarks|examples|kernels|docs)/[\w./-]+")
    lost = [
        (path.name, code)
        for path in PAGES
        for code in inline_code(path.read_text())
        if named.fullmatch(code) and not (ROOT / code.split("::")[0]).exists()
    ]
    assert lost == []


def lost_of_the_api(page: str) -> list[str]:
    """Public names and settings that the table, which needs no build, does not have."""
    table = page[: page.index("\n::: ")]
    named = [f"cocodiff.{name}" for name in cocodiff.__all__] + [field.name for field in fields(cocodiff.Config)]
    named += ["rank", "world_size", "is_main", "device", "mesh", "plan", "report()"]
    return [name for name in named if not re.search(rf"[`.]{re.escape(name)}(?!\w)", table)]


def test_the_api_is_listed_without_a_build() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert lost_of_the_api(page) == []
    assert lost_of_the_api(page.replace("`pieces`", "").replace("report()", "")) == ["pieces", "report()"]  # control
