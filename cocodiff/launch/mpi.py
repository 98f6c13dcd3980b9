"""The one place that starts MPI and leaves it. Both wait for all ranks, without a deadline of their own.

MPI starts where mpi4py is imported. That holds Python's lock, so no thread of this process could end the wait.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cocodiff.launch.waits import Waits

# Runs in a process of its own, which ends as soon as its standard input does: with the wait, or with this process.
_WATCHDOG = """
import os, select, sys
parent, waits = os.getppid(), zip(sys.argv[1::2], sys.argv[2::2])
for seconds, text in waits:
    if select.select([0], [], [], float(seconds))[0]:
        os._exit(0)
    os.write(2, (text + chr(10)).encode())
if os.getppid() == parent:
    os.kill(parent, 9)
"""


def load_mpi(rank: int, waits: Waits) -> Any:
    """Return mpi4py's `MPI`; starting it waits for all ranks, as `waiting_for_all` describes. Raises as the import."""
    if "mpi4py.MPI" not in sys.modules:
        atexit.register(_leave_after_an_exception)
        with waiting_for_all(rank, waits):
            from mpi4py import MPI
    from mpi4py import MPI

    return MPI


@contextmanager
def waiting_for_all(rank: int, waits: Waits) -> Iterator[None]:
    """While inside, a wait that holds Python's lock is bounded: after `start_seconds` this process is killed."""
    notice = min(waits.notice_seconds, waits.start_seconds)
    arguments = [
        f"{notice}",
        f"cocodiff: rank {rank} has waited {notice:g} s for all ranks to start: others have not come to cocodiff.wrap "
        "yet, or ended before it",
        f"{waits.start_seconds - notice}",
        f"cocodiff: rank {rank} ends: not all ranks started within {waits.start_seconds:g} s (COCODIFF_START_SECONDS). "
        "Others ended before cocodiff.wrap or never call it: look for an earlier error of another rank",
    ]
    command = [sys.executable, "-I", "-S", "-c", _WATCHDOG, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE):  # leaving closes its input and waits for its end
        yield


def leave_without_waiting() -> None:
    """Make this process end all ranks at its exit, where MPI would wait for them: they wait for this one."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        from mpi4py.run import set_abort_status

        set_abort_status(1)


def _leave_after_an_exception() -> None:
    if hasattr(sys, "last_value"):
        leave_without_waiting()
