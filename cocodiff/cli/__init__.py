"""The command line: `cocodiff generate`, `bench`, `report` and `doctor`."""

from __future__ import annotations

import sys

import typer

from cocodiff.cli.bench import bench_app
from cocodiff.cli.copies import copies
from cocodiff.cli.doctor import doctor
from cocodiff.cli.generate import generate
from cocodiff.cli.report import report_app
from cocodiff.cli.start import rank_words
from cocodiff.errors import CocodiffError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run diffusion transformers of diffusers on many ranks.",
)
app.command()(generate)
app.command()(doctor)
bench_app.command()(copies)
app.add_typer(bench_app, name="bench")
app.add_typer(report_app, name="report")


def main() -> None:
    """Run the command line. An error meant for the user is printed as one line with its rank, and the status is 2."""
    try:
        app()
    except CocodiffError as error:
        print(f"cocodiff{rank_words()}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
