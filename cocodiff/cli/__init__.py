"""The command line: `cocodiff generate`, `plan`, `bench`, `report` and `doctor`."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from cocodiff.cli.bench import bench_app
from cocodiff.cli.copies import copies
from cocodiff.cli.doctor import doctor
from cocodiff.cli.generate import generate
from cocodiff.cli.plan import plan
from cocodiff.cli.report import report_app
from cocodiff.cli.together import say_once
from cocodiff.errors import CocodiffError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run diffusion transformers of diffusers on many ranks.",
)
app.command()(generate)
app.command()(plan)
app.command()(doctor)
bench_app.command()(copies)
app.add_typer(bench_app, name="bench")
app.add_typer(report_app, name="report")


def _show_version(asked: bool) -> None:
    if asked:
        from cocodiff import __version__

        print(f"cocodiff {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version of cocodiff.")
    ] = False,
) -> None:
    """Run diffusion transformers of diffusers on many ranks."""


def main() -> None:
    """Run the command line. An error meant for the user is one line, said once for all ranks; the status is 2 then."""
    try:
        raise SystemExit(app(standalone_mode=False) or 0)
    except CocodiffError as error:
        spoke = say_once(str(error))
        # Of an error of one rank alone that rank has the cause; otherwise the rank that speaks shows where it arose.
        if "--verbose" in sys.argv and (spoke or isinstance(error.__cause__, CocodiffError)):
            traceback.print_exc()
        raise SystemExit(2) from None
    except typer.Abort:
        raise SystemExit(130) from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # those of a wrong command line have it, in click and in typer's copy
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "cocodiff"
            said = error.format_message()
            stop = "" if said[-1:] in ".?!" else "."
            say_once(f"{said}{stop} `{command} --help` lists what there is.")
        raise SystemExit(2) from None
