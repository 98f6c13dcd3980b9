"""Lays the pages out for mkdocs as they lie in the repository, so that links work in both places alike.

README.md is the front page, pages that are not below docs/ (results, CONTRIBUTING.md) are pages, too, and
docs/cli.md is made from the help texts of the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = (
    "*.md", "LICENSE", "CITATION.cff", "docs/**/*", "scripts/*.pbs", "scripts/*.slurm", "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
)  # fmt: skip
UNLISTED = ("docs/hooks.py", "docs/__pycache__")


def on_files(files: Files, config: Any) -> Files:
    """Put the repository's files, by their paths from its root, in the place of those of docs_dir."""
    root = Path(config.config_file_path).parent
    theme = [file for file in files if not (file.abs_src_path or "").startswith(config.docs_dir)]
    ours = [
        File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path))
        for pattern in PATTERNS
        for path in sorted(root.glob(pattern))
        if path.is_file() and not path.relative_to(root).as_posix().startswith(UNLISTED)
    ]
    return Files([*theme, *ours, File.generated(config, "docs/cli.md", content=command_line())])


def command_line() -> str:
    """The page of all commands and options."""
    import typer.main

    from cocodiff.cli import app

    lines = ["# Command line", "", "Made from `cocodiff --help` and the help of each command.", ""]
    for name, command in _commands(typer.main.get_command(app), "cocodiff"):
        lines += [f"## `{name}`", "", command.help or "", ""]
        if options := [one for one in command.params if one.name != "help"]:
            lines += ["| option | default | meaning |", "|---|---|---|"]
            lines += [f"| `{', '.join(one.opts)}` | {_default(one)} | {one.help} |" for one in options]
            lines.append("")
    return "\n".join(lines)


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if name != "cocodiff":
        yield name, command
    for child, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {child}")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.default is None or callable(option.default) else f"`{option.default}`"
