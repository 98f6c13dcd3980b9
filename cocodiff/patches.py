"""Reversible changes to single instances. Nothing here ever touches a class."""

from __future__ import annotations

from typing import Any

from cocodiff.errors import PatchError

_ABSENT = object()


class Patches:
    """A list of attributes set on instances, and how to take them back.

    >>> from types import SimpleNamespace
    >>> thing, patches = SimpleNamespace(colour="red"), Patches()
    >>> patches.set(thing, "colour", "blue"); patches.undo(); thing.colour
    'red'
    """

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any, bool]] = []

    def set(self, instance: Any, name: str, value: Any, *, may_be_replaced: bool = False) -> None:
        """Set an attribute. One that may be replaced later by others is left to them by `undo`."""
        self._done.append((instance, name, vars(instance).get(name, _ABSENT), value, may_be_replaced))
        setattr(instance, name, value)

    def undo(self) -> None:
        """Take everything back, last change first. PatchError, with nothing undone, where others patched over ours."""
        holders = [self._holder(*change) for change in self._done]
        for (instance, name, before, _, _), holder in zip(reversed(self._done), reversed(holders), strict=True):
            if holder is None:
                continue
            if before is _ABSENT and holder == name:
                delattr(instance, name)
            else:
                setattr(
                    instance, holder, getattr(type(instance), name).__get__(instance) if before is _ABSENT else before
                )
        self._done.clear()

    @staticmethod
    def _holder(instance: Any, name: str, before: Any, ours: Any, may_be_replaced: bool) -> str | None:
        """The attribute that holds our value now: accelerate's hooks move a forward to `_old_forward`."""
        for holder in (name, f"_old_{name}"):
            if vars(instance).get(holder, _ABSENT) is ours:
                return holder
        if may_be_replaced:
            return None
        raise PatchError(
            f"{type(instance).__name__}.{name} was replaced after cocodiff.wrap, so unwrap cannot take ours back. "
            "Remove what was added later (hooks, offload, caches) first."
        )
