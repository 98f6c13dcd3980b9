"""What a single-line fault is."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One line of a file and what stands there instead. `tests` are arguments of pytest.

    The line is a part of the file that occurs in it once; it need not be the whole line.
    """

    name: str
    file: str
    line: str
    faulty: str
    tests: tuple[str, ...]
