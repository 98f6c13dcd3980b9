"""What ranks tell each other while they run, and what follows from it: who has failed, left, gone silent, or not come.

Nothing here waits, reads a clock or touches a store; the guard does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from cocodiff.launch.waits import Waits
from cocodiff.launch.words import rank_words

# A look counts for at most this long. A process that was stopped itself does not hold that against others.
_MOST_SECONDS_A_LOOK = 3.0
STORE_GONE = "the run's store is gone: rank 0, or its launcher, ended"
EVERY_CALL = (
    "Every rank must make every call (rank 0 alone saves). If that rank failed before it, its own output says why"
)


@dataclass(frozen=True)
class Sign:
    """What a rank writes into the store again and again, as a sign of life.

    Attributes:
        beat: grows with each sign.
        call: how many watched calls the rank has entered.
        inner: how many parts of this call that all ranks must enter it has entered.
        depth: 0 outside of calls, 1 in a call, 2 or more in such a part of it.
        heard: the last call of which it has read that another rank failed or that rank 0 has ended.
        ended: 1 if the rank makes no further call.
    """

    beat: int = 0
    call: int = 0
    inner: int = 0
    depth: int = 0
    heard: int = 0
    ended: int = 0

    def to_text(self) -> str:
        return " ".join(map(str, astuple(self)))

    @classmethod
    def from_text(cls, text: str) -> Sign | None:
        """Return the sign, and None for anything else, since the store is open to whoever reaches it."""
        parts = text.split()
        if len(parts) != 6 or not all(part.isascii() and part.isdigit() for part in parts):
            return None
        return cls(*map(int, parts))


@dataclass(frozen=True)
class View:
    """What one rank knows while it is in a call.

    Attributes:
        what: names the call.
        mine: this rank's own sign.
        signs: the last one of each other rank; None where none was read.
        report: what another rank has reported of this call; None if it has not.
        answers: how often the store has answered.
        gone: whether the store has refused to.
    """

    rank: int
    what: str
    mine: Sign
    signs: Mapping[int, Sign | None]
    report: str | None = None
    answers: int = 0
    gone: bool = False

    def behind(self, rank: int) -> bool:
        """Return whether that rank has not reached the place where this one is."""
        sign = self.signs[rank] or Sign()
        same_call = sign.call == self.mine.call and sign.depth > 0
        return sign.call < self.mine.call or (same_call and self.mine.depth > 1 and sign.inner < self.mine.inner)

    def left(self, rank: int) -> bool:
        """Return whether that rank has left this call."""
        sign = self.signs[rank] or Sign()
        return sign.call > self.mine.call or (sign.call == self.mine.call and sign.depth == 0)

    def reason_to_end(self, must_meet: bool) -> str | None:
        """Return why this rank would wait for ever, and None if nothing says so.

        Args:
            must_meet: this rank is where it needs all others.
        """
        if self.report is not None:
            return self.report
        left = [rank for rank in self.signs if self.left(rank)]
        if must_meet and left:
            return f"{rank_words(left)} left {self.what}; this rank is inside"
        ended = [rank for rank, sign in self.signs.items() if sign is not None and sign.ended]
        early = [rank for rank in ended if self.behind(rank)]
        if early:
            return f"{rank_words(early)} ended before this call. {EVERY_CALL}"
        return STORE_GONE if self.gone and 0 not in ended else None


@dataclass(frozen=True)
class Verdict:
    """What follows from one look: a line to say, if any, and why this process must end now, if it must."""

    line: str | None = None
    end: str | None = None


class Lookout:
    """Looks at one `View` after another and decides whether to wait on. One for each guard."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        # Two clocks in seconds: of all looks, and of those between which the store answered.
        self._time = self._answered_time = 0.0
        self._last_look: float | None = None
        self._call = 0
        self._reason_since: float | None = None
        self._answers, self._answer_at = -1, 0.0
        self._beats: dict[int, tuple[int, float]] = {}  # of each rank: the last beat, and when it was first seen
        self._awaited: dict[int, tuple[str, int, float]] = {}  # of each rank: as what, for which part, and since when
        self._said: set[str] = set()  # what lines of this call were about

    def look(self, now: float, view: View, grace_seconds: float) -> Verdict:
        """Return what follows at the time `now`, in seconds of any clock that never goes back."""
        self._advance(now, view)
        reason = view.reason_to_end(view.mine.depth > 1)
        if reason is None:
            self._reason_since = None
        elif self._reason_since is None:
            self._reason_since = self._time
        elif self._time - self._reason_since >= grace_seconds:
            return Verdict(end=f"it still waits {grace_seconds:g} s after it heard: {reason}")
        if reason is not None or view.gone:
            return Verdict()
        unanswered = self._time - self._answer_at
        if unanswered >= min(self._waits.notice_seconds, self._waits.silent_seconds):
            return self._store_is_silent(view, unanswered)
        return self._others(view)

    def _advance(self, now: float, view: View) -> None:
        passed = 0.0 if self._last_look is None else min(now - self._last_look, _MOST_SECONDS_A_LOOK)
        self._last_look = now
        if view.mine.call != self._call:
            self._call, self._reason_since, self._answer_at = view.mine.call, None, self._time
            self._beats, self._awaited, self._said = {}, {}, set()
        self._time += passed
        if view.answers != self._answers:
            self._answers, self._answer_at = view.answers, self._time
            self._answered_time += passed
        for rank, sign in view.signs.items():
            beat = -1 if sign is None else sign.beat
            if self._beats.get(rank, (None,))[0] != beat:
                self._beats[rank] = beat, self._answered_time
            as_what = ""
            if view.behind(rank):
                as_what = "absent" if sign is None or sign.depth == 0 else "busy"
            part = view.mine.inner if as_what == "busy" else 0
            if self._awaited.get(rank, ("", 0))[:2] != (as_what, part):
                self._awaited[rank] = as_what, part, self._answered_time

    def _store_is_silent(self, view: View, seconds: float) -> Verdict:
        limit = self._waits.silent_seconds
        said = (
            f"the run's store, which rank 0 or its launcher holds, has given no answer for {seconds:.0f} s (stopped, "
            "or the link to it is cut)"
        )
        if seconds >= limit:
            return Verdict(end=f"{said}, in {view.what}")
        return self._once("store", f"{said}; this rank ends after {limit:g} s (COCODIFF_SILENT_SECONDS)")

    def _others(self, view: View) -> Verdict:
        waits, now = self._waits, self._answered_time
        silent = {
            rank: now - since
            for rank, (beat, since) in self._beats.items()
            if beat >= 0 and not view.left(rank) and now - since >= min(waits.notice_seconds, waits.silent_seconds)
        }
        awaited: dict[str, dict[int, float]] = {"absent": {}, "busy": {}}
        alive_seconds = min(waits.notice_seconds, max(waits.notice_seconds / 3, _MOST_SECONDS_A_LOOK))
        for rank, (as_what, _, since) in self._awaited.items():
            beat, beat_since = self._beats[rank]
            if as_what and (beat < 0 or now - beat_since < alive_seconds):
                awaited[as_what][rank] = now - since
        dead = [rank for rank, seconds in silent.items() if seconds >= waits.silent_seconds]
        if dead:
            said = f"no sign of life from {rank_words(dead)} for {waits.silent_seconds:g} s (COCODIFF_SILENT_SECONDS)"
            return Verdict(end=f"{said}, in {view.what}")
        absent = [rank for rank, seconds in awaited["absent"].items() if seconds >= waits.absent_seconds]
        if absent:
            said = f"it waited {waits.absent_seconds:g} s (COCODIFF_ABSENT_SECONDS) in vain for {rank_words(absent)}"
            return Verdict(end=f"{said} to make {view.what}")
        if silent and self._speaks(view, silent):
            return self._once(
                "silent",
                f"no sign of life from {rank_words(silent)} for {min(silent.values()):.0f} s in {view.what} (stopped, "
                f"or a link is cut); the run ends after {waits.silent_seconds:g} s (COCODIFF_SILENT_SECONDS)",
            )
        for kind, ranks in awaited.items():
            late = {rank: seconds for rank, seconds in ranks.items() if seconds >= waits.notice_seconds}
            if late and self._speaks(view, late):
                said = f"it has waited {min(late.values()):.0f} s in {view.what} for {rank_words(late)}"
                return self._once(kind, f"{said}, alive but {self._whereabouts(kind)}")
        return Verdict()

    def _whereabouts(self, kind: str) -> str:
        if kind == "busy":
            return "busy elsewhere in this call or the one before (a callback, the VAE): it waits on"
        limit = self._waits.absent_seconds
        return (
            f"outside of it. Every rank must make every call; the run ends after {limit:g} s (COCODIFF_ABSENT_SECONDS)"
        )

    def _speaks(self, view: View, missing: Mapping[int, float]) -> bool:
        """Return whether this rank is the lowest of those that wait, so that one line is said and not one a rank."""
        waiting = [r for r in view.signs if r not in missing and not view.behind(r) and not view.left(r)]
        return all(view.rank < rank for rank in waiting)

    def _once(self, about: str, line: str) -> Verdict:
        if about in self._said:
            return Verdict()
        self._said.add(about)
        return Verdict(line=line)
