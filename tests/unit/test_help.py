"""Every command, argument and option of the command line has a help text in a plain sentence."""

from __future__ import annotations

from collections.abc import Iterator

import typer.main

from cocodiff.cli import app


def _commands(command: typer.main.TyperCommand | typer.main.TyperGroup, name: str) -> Iterator[tuple[str, object]]:
    yield name, command
    for child, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {child}")


def test_every_command_and_option_has_a_help_text() -> None:
    found = dict(_commands(typer.main.get_command(app), "cocodiff"))
    assert {"cocodiff generate", "cocodiff bench collectives", "cocodiff report trace", "cocodiff doctor"} <= set(found)
    texts = {name: command.help for name, command in found.items()}
    texts |= {f"{name} {p.name}": p.help for name, command in found.items() for p in command.params}
    assert {name: text for name, text in texts.items() if not text or len(text.split()) < 3 or text[-1] != "."} == {}
