"""How a process leaves after a failure, when threads of it, or MPI, still wait for other ranks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time

from cocodiff.launch.mpi import leave_without_waiting

_PATIENCE_SECONDS = 1.0


def leave_after_failure() -> None:
    """Let this process end now, called at the interpreter's exit. Returns if nothing stands in the way of that.

    A thread that is inside torch while the interpreter goes away aborts the process, and torch cannot call it back
    from a collective. If one of ours still is after a second, which it gets since the end of another rank would free
    it, then the process leaves at once, with the status that it would have had, or 1.
    """
    leave_without_waiting()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while threads_at_work():
        if time.monotonic() >= deadline:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(1)
        time.sleep(0.02)


def threads_at_work() -> list[str]:
    """Return the names of threads of ours that are neither idle nor waiting for a lock of Python's."""
    frames = sys._current_frames()
    ours = [(thread.name, frames.get(thread.ident or 0)) for thread in threading.enumerate()]
    idle = ("_run", "wait")  # of a lane that waits for work, and of a condition
    return [
        name
        for name, frame in ours
        if name.startswith("cocodiff") and frame is not None and frame.f_code.co_name not in idle
    ]
