"""How long a rank waits for others, and for what: settings that a user may change by environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from math import isfinite

from cocodiff.errors import LaunchError

# gloo and NCCL count milliseconds in 64 bits and add them to the time of day: a longer wait could overflow.
_MOST_SECONDS = 1e9


@dataclass(frozen=True)
class Waits:
    """Deadlines in seconds. `COCODIFF_START_SECONDS` and so on, one variable for each field, change them.

    Attributes:
        start_seconds: until all ranks have started and joined. Loading weights before `wrap` counts.
        notice_seconds: until a rank that waits for others says so, once, and which ranks they are.
        absent_seconds: until a rank ends because others are alive but do not make the call that it is in.
        silent_seconds: until a rank ends because another one in the same run gives no sign of life: it was stopped, or
            its link was cut.
        collective_seconds: the time-out of every collective. It is long, since a service may be idle for days and a
            rank may be slow; failures are noticed by the guard.
    """

    start_seconds: float = 600.0
    notice_seconds: float = 30.0
    absent_seconds: float = 600.0
    silent_seconds: float = 300.0
    collective_seconds: float = 30 * 86_400.0

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Waits:
        """Return the settings that `environ` has. Raises `LaunchError` for a value that is no number of seconds."""
        given = {}
        for field in fields(cls):
            variable = f"COCODIFF_{field.name.upper()}"
            if variable in environ:
                given[field.name] = _seconds(variable, environ[variable])
        return cls(**given)

    @property
    def collective(self) -> timedelta:
        return timedelta(seconds=self.collective_seconds)


def _seconds(variable: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not isfinite(value) or not 0 < value <= _MOST_SECONDS:
        raise LaunchError(
            f"{variable}={text!r} is not a number of seconds above 0, at most {_MOST_SECONDS:g}: unset it, or set such "
            "a number, the same on every rank"
        )
    return value
