"""Ends all ranks of a run within a deadline after one has failed, under any launcher.

A rank that raises leaves the others waiting in a collective, and the launcher does not always end them. Under MPI the
failed rank itself waits, in MPI_Finalize, for the ranks that wait for it. Here a failed rank writes a report into the
run's store. A thread of every other rank reads it, since the main thread of a waiting rank is blocked.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from cocodiff.errors import LaunchError

if TYPE_CHECKING:
    import torch.distributed as dist

_POLL_SECONDS = 1.0
# Rank 0 may hold the store. It waits at most this long for the others to read the last reports.
_LINGER_SECONDS = 3.0
_STORE_SECONDS = 5.0
_MESSAGE_CHARS = 400


class Guard:
    """Ends this process if another rank has failed in the collective call that this rank is in.

    Making a guard and calling `watch` are collective: all ranks do both in the same order, each from one thread. A
    rank that leaves the call by itself within `grace_seconds`, because it fails too or finishes, is not ended, and
    the next call starts without any report.

    The thread stops on `close` and at the interpreter's exit. A rank that exits while others enter another call counts
    as failed in that call.

    Args:
        store: a store that all ranks share, such as that of the default group. The guard keeps it alive.
        grace_seconds: how long a rank may go on after it has read of a failure.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, grace_seconds: float = 10.0) -> None:
        import torch.distributed as dist

        self._rank = rank
        self._world_size = world_size
        self._grace_seconds = grace_seconds
        # Several guards may share a store, so each has keys of its own.
        number = store.add(f"cocodiff/guards/{rank}", 1)
        self._store = dist.PrefixStore(f"cocodiff/guard/{number}", store)
        self._link: dist.Store | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._call = 0
        self._depth = 0
        self._inside = False
        self._in_step: Callable[[], bool] | None = None
        self._closed = False
        self._last_failed = False
        # The last report that the thread has read: the call and another rank's failure, or None if rank 0 has finished.
        self._heard: tuple[int, str | None] = (0, None)
        # The last call for which this rank has counted itself among those that need the store no more.
        self._released_call = 0

    @contextmanager
    def watch(self, what: str, in_step: Callable[[], bool] | None = None) -> Iterator[None]:
        """While inside, end this process `grace_seconds` after another rank has failed in the same call.

        An exception raised inside is reported to the other ranks and raised again. An inner `watch` belongs to the
        outer one. Raises `LaunchError` if the store cannot be reached.

        Args:
            what: names the call in messages.
            in_step: returns whether this rank is now in a part of the call that all ranks must enter. A rank that is
                still there `grace_seconds` after another has left the call without an error would wait for ever, so
                it is ended as well.
        """
        if self._world_size == 1 or self._closed or self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        self._enter(in_step)
        self._depth = 1
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self._depth = 0
            self._leave(what, failure)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Stop the thread. Idempotent, and called at exit. A closed guard watches nothing.

        Rank 0 first waits, for at most 3 seconds, until ranks that are still in the last call have read that the store
        is going to end.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._link is None or self._thread is None:
            return
        try:
            self._link.compare_set(f"failed/{self._call + 1}", "", self._report("ended before this call"))
            if self._rank == 0 and not self._last_failed:
                self._link.set(f"finished/{self._call}", "")
                self._linger()
        except Exception:  # the store is gone, and so are the ranks that could read it
            pass
        with self._changed:
            self._changed.notify_all()
        # A daemon thread inside torch while the interpreter dies can abort the process, hence the wait.
        self._thread.join(timeout=2 * _STORE_SECONDS)

    def _enter(self, in_step: Callable[[], bool] | None) -> None:
        if self._link is None:
            try:
                self._link = self._store.clone()  # type: ignore[attr-defined]
                self._link.set_timeout(timedelta(seconds=_STORE_SECONDS))
            except RuntimeError as error:
                raise LaunchError(f"rank {self._rank} cannot reach the run's store: {error}") from error
            atexit.register(self.close)
            self._thread = threading.Thread(target=self._run, name="cocodiff-guard", daemon=True)
            self._thread.start()
        with self._changed:
            self._call += 1
            self._inside = True
            self._in_step = in_step
            self._changed.notify_all()

    def _leave(self, what: str, failure: BaseException | None) -> None:
        with self._changed:
            self._inside, self._in_step = False, None  # or this thread would keep the pipeline that it asks
            released = self._released_call == self._call
            self._released_call = self._call
            self._changed.notify_all()
        self._last_failed = failure is not None
        assert self._link is not None
        try:
            if failure is not None:
                said = f"failed in {what}: {type(failure).__name__}: {failure}"
                self._link.compare_set(f"failed/{self._call}", "", self._report(said))
            else:
                self._link.compare_set(f"left/{self._call}", "", self._report(f"left {what}; this rank is inside"))
            if not released:
                self._link.add("released", 1)
            if failure is not None and self._rank == 0:
                self._linger()
        except Exception:  # the store is gone; the failure itself must reach the caller unchanged
            pass

    def _linger(self) -> None:
        """Wait until every rank has left the current call or read its last report, at most `_LINGER_SECONDS`."""
        assert self._link is not None
        deadline = time.monotonic() + _LINGER_SECONDS
        while self._link.add("released", 0) < self._world_size * self._call and time.monotonic() < deadline:
            time.sleep(0.02)

    def _report(self, text: str) -> str:
        return f"rank {self._rank} " + " ".join(text.split())[:_MESSAGE_CHARS]

    def _run(self) -> None:
        suspected_call, suspected_since = 0, 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inside or self._closed)
                if self._closed:
                    return
                call = self._call
            news = self._news(call)
            now = time.monotonic()
            if news is None:
                suspected_call = 0
            elif suspected_call != call:
                suspected_call, suspected_since = call, now
            elif now - suspected_since >= self._grace_seconds:
                self._end(call, news)
            with self._changed:
                self._changed.wait_for(partial(self._gone_on, call), timeout=_POLL_SECONDS)

    def _gone_on(self, call: int) -> bool:
        return self._closed or not self._inside or self._call != call

    def _news(self, call: int) -> str | None:
        """Return what another rank has reported of this call, and None if nothing happened."""
        assert self._link is not None
        must_meet = self._in_step is not None and self._in_step()
        if self._heard[0] == call:  # and never ask again, since the store may be gone
            return self._heard[1] or ("rank 0 has finished this call and ended" if must_meet else None)
        try:
            if must_meet and self._link.check([f"left/{call}"]):
                return self._link.get(f"left/{call}").decode(errors="replace")
            if self._link.check([f"failed/{call}"]):
                self._heard = call, self._link.get(f"failed/{call}").decode(errors="replace")
                self._release(call)
            elif self._link.check([f"finished/{call}"]):
                self._heard = call, None
                self._release(call)
        except Exception:
            if self._heard[0] != call:
                return "the run's store is gone: rank 0, or its launcher, ended"
        return self._heard[1] if self._heard[0] == call else None

    def _release(self, call: int) -> None:
        assert self._link is not None
        with self._changed:
            if self._gone_on(call) or self._released_call == call:
                return
            self._released_call = call
        self._link.add("released", 1)

    def _end(self, call: int, news: str) -> None:
        with self._changed:
            if self._gone_on(call):
                return
            said = f"it still waits {self._grace_seconds:g} s after it heard: {news}"
            # Not print, since the blocked main thread may hold a lock of sys.stderr.
            os.write(2, f"cocodiff: rank {self._rank} ends: {said}\n".encode(errors="replace"))
            # Not sys.exit, since only the main thread could end the process in order, and it is blocked.
            os._exit(1)
