"""Ranks tell each other that one failed, so that within a deadline every rank has ended, under any launcher.

A rank that raises leaves the others waiting in a collective, and its launcher does not always end them: under
MPI the failed rank itself waits, in MPI_Finalize, for ranks that wait for it. Reports travel through the
run's store, read by a thread, since the main thread of a waiting rank is stuck.
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
# Rank 0 may hold the store: how long it stays, at most, for the others to read what it left there.
_LINGER_SECONDS = 3.0
_STORE_SECONDS = 5.0
_MESSAGE_CHARS = 400


class Guard:
    """Ends this process when another rank has failed in the collective call that this rank cannot finish.

    `store` is one that all ranks share, such as the default group's; it is kept alive. Making guards, and
    calls of `watch`, are collective: same order on all ranks, from one thread each. Ranks that leave the call
    by themselves within `grace_seconds`, because they fail alike or finish, are never ended, and the next
    call starts clean.

    At the interpreter's exit, or on `close`, the thread stops; a rank that exits while others enter another
    call counts as failed in that call.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, grace_seconds: float = 10.0) -> None:
        import torch.distributed as dist

        self._rank = rank
        self._world_size = world_size
        self._grace_seconds = grace_seconds
        # Several guards may share a store: each has keys of its own.
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
        # What the thread has heard of a call: another rank's failure, or None for "rank 0 finished, exits".
        self._heard: tuple[int, str | None] = (0, None)
        # The last call for which this rank has told rank 0 that it needs the store no more.
        self._released_call = 0

    @contextmanager
    def watch(self, what: str, in_step: Callable[[], bool] | None = None) -> Iterator[None]:
        """While inside, a failure of another rank in the same call ends this process after the grace.

        `in_step` answers whether this rank is now where all ranks must be. A rank that is there still, the grace
        after another has left the call in good order, waits for ever, and is ended, too.

        Any exception raised inside is reported to the other ranks and raised on. `what` names the call in
        messages. An inner `watch` belongs to the outer one. Raises `LaunchError` when the store cannot be
        reached.
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
        """Stop the thread. Idempotent; a closed guard watches nothing. Runs by itself at exit.

        Rank 0 first waits, 3 seconds at most, until ranks that are still inside the last call know that the
        store may go.
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
        except Exception:  # the store is gone: nobody is left to tell
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
            self._inside = False
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
        """Wait until every rank has left the current call or read its last news, or for `_LINGER_SECONDS`."""
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
        """What went wrong elsewhere in this call, if anything did."""
        assert self._link is not None
        alone = self._in_step is not None and self._in_step()
        if self._heard[0] == call:  # and never ask again: the store may go
            return self._heard[1] or ("rank 0 has finished this call and ended" if alone else None)
        try:
            if alone and self._link.check([f"left/{call}"]):
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
            # Not print: the stuck main thread may hold a lock of sys.stderr.
            os.write(2, f"cocodiff: rank {self._rank} ends: {said}\n".encode(errors="replace"))
            # Not sys.exit: only the main thread could end the process in order, and it is stuck.
            os._exit(1)
