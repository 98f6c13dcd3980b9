"""Carries a rank's signs of life to the run's store, and those of the others back, in a thread of its own.

An operation of the store can block for as long as a link is cut, whatever its time-out says. No other thread of ours
touches the guard's keys, so the rest of the guard always comes to its decisions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from cocodiff.errors import LaunchError
from cocodiff.launch.presence import Sign
from cocodiff.launch.words import printable

if TYPE_CHECKING:
    import torch.distributed as dist

_ROUND_SECONDS = 1.0
_URGENT_SECONDS = 0.05
_STORE_SECONDS = 5.0
# Each rank reads the signs of all: many ranks do so less often, and the store has the same work for each of them.
_SIGNS_A_SECOND = 32


@dataclass(frozen=True)
class Letters:
    """What the store has said so far.

    Attributes:
        signs: the last sign of each other rank; None where it has given none yet.
        report: a call and what another rank has reported of it; call 0 before any report.
        answers: how many rounds the store has answered.
        gone: whether it has refused to answer. Nothing is asked after that.
    """

    signs: dict[int, Sign | None]
    report: tuple[int, str] = (0, "")
    answers: int = 0
    gone: bool = False


class Mailbox:
    """One rank's letters to and from the others. `changed` guards all attributes; waiters are notified of any change.

    Attributes:
        sign: what this rank says; `update` changes it.
        letters: what was heard.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.changed = threading.Condition()
        self.sign = Sign()
        self.letters = Letters({other: None for other in range(world_size) if other != rank})
        self._store, self._rank = store, rank
        self._thread: threading.Thread | None = None
        self._link: dist.Store | None = None
        self._report: tuple[int, str] | None = None
        self._reported_call = 0
        self._dirty = self._urgent = self._closed = False
        self._signs_read_at = 0.0

    @property
    def started(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Connect to the store and start the thread. Raises `LaunchError` if the store cannot be reached."""
        try:
            self._link = self._store.clone()  # type: ignore[attr-defined]
            self._link.set_timeout(timedelta(seconds=_STORE_SECONDS))
        except RuntimeError as error:
            raise LaunchError(f"rank {self._rank} cannot reach the run's store: {error}") from error
        self._thread = threading.Thread(target=self._run, name="cocodiff-mailbox", daemon=True)
        self._thread.start()

    def update(self, at_once: bool = True, **fields: int) -> None:
        """Say this of this rank from now on; with the next round if not `at_once`."""
        with self.changed:
            self.sign = replace(self.sign, **fields)
            self._dirty |= at_once
            self.changed.notify_all()

    def post(self, call: int, text: str, timeout_seconds: float = _STORE_SECONDS) -> str | None:
        """Report a failure of this call; return what is known as its first failure, or None if the store is silent."""
        with self.changed:
            self._report, self._dirty = (call, text), True
            self.changed.notify_all()
            self.wait_for(lambda: self._report is None, timeout_seconds)
            told, first = self.letters.report
            return None if self._report is not None else first if told == call else text

    def wait_for(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        """Exchange letters as fast as possible until the condition holds, the time is over or the store is gone."""
        with self.changed:
            self._urgent = self._dirty = True
            self.changed.notify_all()
            try:
                self.changed.wait_for(lambda: condition() or self.letters.gone, timeout_seconds)
            finally:
                self._urgent = False
            return condition()

    def close(self, wait: bool = True) -> None:
        """Send what is still to be said and end the thread; wait for that, but twice the store's time-out at most."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        if self._thread is not None and wait:
            # A daemon thread inside torch while the interpreter dies can abort the process, hence the wait.
            self._thread.join(timeout=2 * _STORE_SECONDS)

    def _run(self) -> None:
        while True:
            with self.changed:
                closing, self._dirty = self._closed, False
                sign = self.sign = replace(self.sign, beat=self.sign.beat + 1)
                report = self._report
            try:
                letters = self._round(sign, report)
            except Exception:  # the connection is refused or broken: rank 0, which may hold the store, has ended
                with self.changed:
                    self.letters = replace(self.letters, gone=True)
                    self.changed.notify_all()
                return
            with self.changed:
                if report is not None and self._report is report:
                    self._report, self._reported_call = None, report[0]
                self.letters = letters
                first = letters.signs.get(0)
                if letters.report[0] == sign.call or (first is not None and first.ended):
                    self._dirty |= self.sign.heard != sign.call
                    self.sign = replace(self.sign, heard=sign.call)
                self.changed.notify_all()
                if closing:
                    return
                pause = _URGENT_SECONDS if self._urgent else _ROUND_SECONDS
                self.changed.wait_for(lambda: self._dirty or self._closed, pause)

    def _round(self, sign: Sign, report: tuple[int, str] | None) -> Letters:
        """Send this sign and report, and return what was heard. The only place that asks the store."""
        link, heard = self._link, self.letters
        assert link is not None
        link.set(f"sign/{self._rank}", sign.to_text())
        if report is not None:
            call, text = report
            first = printable(link.compare_set(f"failed/{call}", "", text).decode(errors="replace"))
            if first != text:
                heard = replace(heard, report=(call, first))
        elif self._asks(sign) and link.check([f"failed/{sign.call}"]):
            text = printable(link.get(f"failed/{sign.call}").decode(errors="replace"))
            heard = replace(heard, report=(sign.call, text))
        signs, pause = heard.signs, len(heard.signs) / _SIGNS_A_SECOND * (_URGENT_SECONDS if self._urgent else 1)
        if time.monotonic() - self._signs_read_at >= pause:
            signs = {other: self._read(link, other, last) for other, last in signs.items()}
            self._signs_read_at = time.monotonic()
        return replace(heard, signs=signs, answers=heard.answers + 1)

    def _asks(self, sign: Sign) -> bool:
        """Return whether this rank is in a call of which no report is known."""
        return sign.depth > 0 and sign.call not in (self.letters.report[0], self._reported_call)

    def _read(self, link: dist.Store, other: int, last: Sign | None) -> Sign | None:
        key = f"sign/{other}"
        if last is None and not link.check([key]):
            return None
        return Sign.from_text(link.get(key).decode(errors="replace")) or last
