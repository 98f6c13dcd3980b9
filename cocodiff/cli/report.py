"""`cocodiff report` shows what runs have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cocodiff.bench.results import write
from cocodiff.cli.files import check_file

report_app = typer.Typer(no_args_is_help=True)


@report_app.callback()
def report() -> None:
    """Show what runs have written."""


@report_app.command()
def trace(
    folder: Annotated[Path, typer.Argument(help="Folder that --trace of generate or bench has written.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Write the merged trace into this file. If left out, into merged.json in the folder."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the first step into this PNG file.")] = None,
    title: Annotated[str, typer.Option(help="Title of that drawing.")] = "one step",
) -> None:
    """Merge the traces of all ranks, and say how long compute waited, what was hidden and which rank was slowest."""
    from cocodiff.observe.draw import plot_step
    from cocodiff.observe.summary import describe, summary
    from cocodiff.observe.trace import read_traces, spans_by_rank

    if plot is not None:
        check_file(plot, "--plot")
    events = read_traces(folder)
    merged = out or folder / "merged.json"
    check_file(merged, "--out")
    write(merged, json.dumps({"traceEvents": events}))
    spans = spans_by_rank(events)
    print(describe(summary(spans)))
    print(f"merged: {merged} (open it in https://ui.perfetto.dev)")
    if plot is not None:
        plot_step(spans, plot, title)
