"""The command line: `cocodiff generate`, `bench`, `report`, `doctor`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cocodiff.cli.bench import bench_app
from cocodiff.cli.copies import copies
from cocodiff.cli.generate import generate
from cocodiff.cli.report import report_app
from cocodiff.cli.start import rank_words
from cocodiff.errors import CocodiffError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Diffusion transformers on many ranks.",
)
app.command()(generate)
bench_app.command()(copies)
app.add_typer(bench_app, name="bench")
app.add_typer(report_app, name="report")


def main() -> None:
    """Entry point: errors meant for users are printed as one line, with the rank that met them."""
    try:
        app()
    except CocodiffError as error:
        print(f"cocodiff{rank_words()}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Machine readable.")] = False) -> None:
    """Say what is installed, what was detected, and why. Under a launcher, for the whole run."""
    from cocodiff.cli.doctor import diagnose, render

    findings, is_main = diagnose()
    if is_main:
        print(render(findings, as_json=json))
