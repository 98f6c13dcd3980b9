"""`cocodiff report`: what runs have left behind, for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cocodiff.errors import ConfigError

report_app = typer.Typer(no_args_is_help=True, help="Look at what runs have written.")


@report_app.callback()
def report() -> None:
    """Look at what runs have written."""


@report_app.command()
def trace(
    folder: Annotated[Path, typer.Argument(help="What --trace named.")],
    out: Annotated[
        Path | None, typer.Option(help="Merge the ranks into this file; DIR/merged.json if left out.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the first step there (PNG).")] = None,
    title: Annotated[str, typer.Option(help="Of the picture.")] = "one step",
) -> None:
    """Merge the ranks of a trace and say what was exposed, what was hidden, and who was waited for."""
    from cocodiff.observe import trace as reports

    events = reports.read_traces(folder)
    merged = out or folder / "merged.json"
    try:
        merged.write_text(json.dumps({"traceEvents": events}))
    except OSError as error:
        raise ConfigError(f"{merged}: cannot be written ({error.strerror or error}).") from None
    spans = reports.spans_by_rank(events)
    print(reports.describe(reports.summary(spans)))
    print(f"merged: {merged} (open it in https://ui.perfetto.dev)")
    if plot is not None:
        reports.plot_step(spans, plot, title)
