from __future__ import annotations

from typing import Any


class StepCoding:
    share: float
    first: bool

    def __getattr__(self, n: str) -> Any: ...


class SelectiveCall:
    def __init__(self, *a: Any) -> None: ...
    def __getattr__(self, n: str) -> Any: ...
