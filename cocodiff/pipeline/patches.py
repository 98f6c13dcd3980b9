"""Reversible patches: attributes set on instances, found again wherever hooks of others have moved them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cocodiff.errors import PatchError

_ABSENT = object()


@dataclass(frozen=True)
class _Patch:
    instance: Any
    name: str
    before: Any
    ours: Any
    may_be_replaced: bool

    def places(self) -> Iterator[tuple[Any, str]]:
        """Where an attribute may be now: hooks of accelerate and diffusers move a forward aside and call it there."""
        yield self.instance, self.name
        yield self.instance, f"_old_{self.name}"
        for reference in getattr(vars(self.instance).get("_diffusers_hook"), "_fn_refs", ()):
            yield reference, "forward"
            yield reference, "original_forward"

    def find(self) -> tuple[Any, str] | None:
        return next((place for place in self.places() if vars(place[0]).get(place[1], _ABSENT) is self.ours), None)


class Patches:
    """A list of attributes set on instances, and how to take them back.

    >>> from types import SimpleNamespace
    >>> thing, patches = SimpleNamespace(colour="red"), Patches()
    >>> patches.set(thing, "colour", "blue"); patches.undo(); thing.colour
    'red'
    """

    def __init__(self) -> None:
        self._done: list[_Patch] = []

    def set(self, instance: Any, name: str, value: Any, *, may_be_replaced: bool = False) -> None:
        """Set an attribute; under accelerate's hook, if there is one, so that removing the hook leaves it in place.

        One that may be replaced later by others is left to them by `check` and `undo`.
        """
        holder = f"_old_{name}" if f"_old_{name}" in vars(instance) else name
        self._done.append(_Patch(instance, name, vars(instance).get(holder, _ABSENT), value, may_be_replaced))
        setattr(instance, holder, value)

    def check(self) -> None:
        """PatchError where something of ours is no longer in place."""
        for patch in self._done:
            if patch.find() is None and not patch.may_be_replaced:
                raise PatchError(
                    f"{type(patch.instance).__name__}.{patch.name} was replaced after cocodiff.wrap. Take off what was "
                    "added later (hooks, compilation, caches); or unwrap(pipe) before it is added and wrap(pipe) after."
                )

    def undo(self) -> None:
        """Take everything back, last change first. PatchError, with nothing undone, where others patched over ours."""
        self.check()
        for patch in reversed(self._done):
            place = patch.find()
            if place is None:
                continue
            if patch.before is _ABSENT and place == (patch.instance, patch.name):
                delattr(*place)
            else:
                by_class = patch.before is _ABSENT
                value = getattr(type(patch.instance), patch.name).__get__(patch.instance) if by_class else patch.before
                setattr(*place, value)
        self._done.clear()
