"""Ends all ranks of a run within a deadline after one has failed or vanished, under any launcher.

A rank that raises leaves the others waiting in a collective, and the launcher does not always end them. Here a failed
rank writes a report into the run's store, and every rank gives signs of life there. A thread of every rank reads them
and decides, since the main thread of a waiting rank is blocked.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from cocodiff.errors import LaunchError, UsageError
from cocodiff.launch.leaving import leave_after_failure
from cocodiff.launch.mailbox import Mailbox
from cocodiff.launch.presence import Lookout, Sign, View
from cocodiff.launch.waits import Waits
from cocodiff.launch.words import printable, rank_words

if TYPE_CHECKING:
    import torch.distributed as dist

_LOOK_SECONDS = 1.0
# Rank 0 may hold the store. It waits at most this long for the others to read the last reports.
_LINGER_SECONDS = 3.0
# A rank whose connection broke waits this long to hear why: signs of life come every second.
_CAUSE_SECONDS = 5.0
_LAST_WORD_SECONDS = 2.0


class Guard:
    """Ends this process if another rank has failed, or is gone, in the collective call that this rank is in.

    Making a guard and calling `watch` are collective: all ranks do both in the same order, one call at a time. A rank
    that leaves the call by itself within `grace_seconds`, because it fails too or finishes, is not ended, and the next
    call starts without any report.

    The threads stop on `close` and at the interpreter's exit. A rank that exits while others enter another call counts
    as failed in that call.

    Args:
        store: a store that all ranks share, such as that of the default group. The guard keeps it alive.
        grace_seconds: how long a rank may go on after it has read of a failure.
        token: a secret of these ranks. Who does not know it cannot tell them anything by the store.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        grace_seconds: float = 10.0,
        waits: Waits | None = None,
        token: str = "",
    ) -> None:
        import torch.distributed as dist

        self._rank, self._world_size, self._grace_seconds = rank, world_size, grace_seconds
        # Several guards may share a store, so each has keys of its own.
        number = store.add(f"cocodiff/guards{token}/{rank}", 1)
        self._mail = Mailbox(dist.PrefixStore(f"cocodiff/guard{token}/{number}", store), rank, world_size)
        self._lookout = Lookout(waits or Waits())
        self._thread: threading.Thread | None = None
        self._owner = 0  # the thread that is in a call
        self._what = ""
        self._closed = False
        self._last_failed = False

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """While inside, end this process `grace_seconds` after another rank has failed in the same call.

        An exception raised inside is reported to the other ranks and raised again. An inner `watch` marks a part of
        the outer one's call that all ranks must enter: a rank that is still in such a part `grace_seconds` after
        another has left the call, even in good order, would wait for ever, so it is ended as well.

        Raises:
            LaunchError: the store cannot be reached; or a connection broke inside because another rank failed, which
                is named; or a call is left by `sys.exit(0)`, since the other ranks still wait in it.
            UsageError: another thread of this process is inside.

        Args:
            what: names the call in messages.
        """
        if self._world_size == 1 or self._closed:
            yield
            return
        is_outer = self._enter(what)
        try:
            yield
        except BaseException as error:
            told = self._failed(what, error) if is_outer else None
            if told is not None:
                raise told from error
            raise
        finally:
            self._leave()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Stop the threads. Idempotent, and called at exit. A closed guard watches nothing.

        Rank 0 first waits, for at most 3 seconds, until ranks that are still in the last call have read that the store
        is going to end.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        if self._thread is None:
            return
        self._mail.update(ended=1)
        if threading.current_thread().name.startswith("cocodiff-"):
            self._mail.close(wait=False)  # the garbage collector called this in a thread of a guard
            return
        if self._rank == 0:
            self._linger(next_call=True)
        self._mail.close()
        self._thread.join()

    def _at_exit(self) -> None:
        self.close()
        if self._last_failed or hasattr(sys, "last_value"):  # an exception ends the interpreter
            leave_after_failure()

    def _enter(self, what: str) -> bool:
        """Count this call, or a part of the call that this rank is in. Return whether it is a call."""
        with self._mail.changed:
            sign, thread = self._mail.sign, threading.get_ident()
            if sign.depth:
                if self._owner != thread:
                    raise UsageError(
                        f"another thread of this process is in {self._what}: one call at a time, in the same order on "
                        "every rank."
                    )
                self._mail.update(at_once=False, inner=sign.inner + 1, depth=sign.depth + 1)
                return False
            if self._thread is None:
                self._mail.start()
                atexit.register(self._at_exit)
                self._thread = threading.Thread(target=self._run, name="cocodiff-guard", daemon=True)
                self._thread.start()
            self._owner, self._what, self._last_failed = thread, what, False
            self._mail.update(call=sign.call + 1, inner=0, depth=1)
            return True

    def _leave(self) -> None:
        with self._mail.changed:
            depth = self._mail.sign.depth - 1
            self._mail.update(at_once=depth == 0, depth=depth)
        if depth == 0 and self._last_failed and self._rank == 0 and not self._closed:
            self._linger(next_call=False)

    def _failed(self, what: str, error: BaseException) -> LaunchError | None:
        """Report that this call failed here. Return what to raise instead of `error`, if that says more."""
        self._last_failed = True
        said = f"rank {self._rank} failed in {what}: {type(error).__name__}: {error}"
        told = None
        if isinstance(error, SystemExit):
            said = f"rank {self._rank} left {what} by sys.exit({error.code!r}), and the other ranks wait in it"
            _say(said)
            told = None if error.code else LaunchError(said)
        elif is_lost_connection(error):
            before = self._mail.letters
            self._mail.wait_for(lambda: self._view().reason_to_end(must_meet=True) is not None, _CAUSE_SECONDS)
            reason, after = self._view().reason_to_end(must_meet=True), self._mail.letters
            if reason is not None:
                return LaunchError(f"rank {self._rank} lost a connection in {what}, because {reason}")
            silent = [rank for rank, sign in after.signs.items() if sign is not None and sign == before.signs[rank]]
            said = f"rank {self._rank} lost a connection in {what}: {type(error).__name__}: {error}"
            if silent and after.answers > before.answers:
                told = LaunchError(
                    f"rank {self._rank} lost a connection in {what}, and there is no sign of life from "
                    f"{rank_words(silent)} since: look there for the cause (killed, out of memory)"
                )
                said = str(told)
        self._mail.post(self._mail.sign.call, printable(said))
        return told

    def _view(self) -> View:
        with self._mail.changed:
            sign, letters = self._mail.sign, self._mail.letters
            report = letters.report[1] if letters.report[0] == sign.call else None
            return View(self._rank, self._what, sign, letters.signs, report, letters.answers, letters.gone)

    def _linger(self, next_call: bool) -> None:
        """Wait a little until every rank has left this call, or the next one too, or heard how this rank left it."""
        mine, before = self._mail.sign.call, self._mail.letters.answers

        def waits(sign: Sign | None) -> bool:
            if sign is None or sign.call < mine:
                return sign is None or not sign.ended
            return sign.depth > 0 and not sign.ended and sign.heard < sign.call and (next_call or sign.call == mine)

        def done() -> bool:  # by signs that were read after this began: they come with the second round at the latest
            letters = self._mail.letters
            return letters.answers > before + 1 and not any(map(waits, letters.signs.values()))

        self._mail.wait_for(done, _LINGER_SECONDS)

    def _run(self) -> None:
        mail = self._mail
        while True:
            with mail.changed:
                mail.changed.wait_for(lambda: mail.sign.depth > 0 or self._closed)
                if self._closed:
                    return
                call, verdict = mail.sign.call, self._lookout.look(time.monotonic(), self._view(), self._grace_seconds)
            if verdict.line is not None:
                _say(f"rank {self._rank}: {verdict.line}")
            if verdict.end is not None:
                self._end(call, verdict.end)
            with mail.changed:
                mail.changed.wait_for(partial(self._gone_on, call), timeout=_LOOK_SECONDS)

    def _gone_on(self, call: int) -> bool:
        return self._closed or self._mail.sign.depth == 0 or self._mail.sign.call != call

    def _end(self, call: int, why: str) -> None:
        said = printable(f"rank {self._rank} ends: {why}")
        self._mail.post(call, said, _LAST_WORD_SECONDS)
        with self._mail.changed:
            if self._gone_on(call):
                return
            _say(said)
            # Not sys.exit, since only the main thread could end the process in order, and it is blocked.
            os._exit(1)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a backend raised this because a connection to another rank, or the wait for it, ended."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or type(error).__module__.startswith("mpi4py"):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo/", "oneCCL"))


def _say(text: str) -> None:
    # Not print, since a blocked main thread may hold a lock of sys.stderr.
    os.write(2, f"cocodiff: {text}\n".encode(errors="replace"))
