"""What a branch of guidance gives out before the other branch has been called: a tensor that must not be read yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cocodiff.errors import PatchError

PAIRS = (
    "cfg_degree=2 expected two calls of the transformer at each step, conditional and unconditional, and "
    "got others (a callback that changes the guidance, three calls a step?). Use cfg_degree=1."
)

# What asks about a tensor, not about its values.
_ABOUT = frozenset(
    ("__get__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "data_ptr")
    + ("untyped_storage", "element_size", "get_device", "is_contiguous", "is_floating_point", "is_complex")
)


class BranchOutput(Tensor):
    """The output of a step's first call, on both halves of the ranks, until the second call has filled it.

    Views may be taken of it, and its shape may be asked. Whatever else is done with it would read what is not there on
    half of the ranks, so it raises PatchError on all of them. `settle` makes it, and its views, plain tensors.
    """

    _aliases: list[BranchOutput]  # it, and all views that were taken of it

    @staticmethod
    def of(x: Tensor) -> BranchOutput:
        """The same memory."""
        return BranchOutput._alias(x, [])

    def settle(self) -> Tensor:
        """Make it a plain tensor in place, with all views that exist; what was filled can be read."""
        for alias in self._aliases:
            alias.__class__ = Tensor  # type: ignore[assignment]  # as torch's own lazy parameters do
        self._aliases.clear()
        return self

    @staticmethod
    def _alias(x: Tensor, aliases: list[BranchOutput]) -> BranchOutput:
        alias = x.as_subclass(BranchOutput)
        alias._aliases = aliases
        aliases.append(alias)
        return alias

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, first = func.__name__, args[0] if args else None
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))
        with torch._C.DisableTorchFunctionSubclass():
            if not isinstance(first, BranchOutput) or (in_place and name != "__iter__") or (kwargs or {}).get("out"):
                raise PatchError(PAIRS)
            result = func(*args, **(kwargs or {}))
            if name in _ABOUT and not isinstance(result, Tensor):
                return result
            if isinstance(result, list | tuple):
                return type(result)([first._view(x) for x in result])
            return first._view(result)

    def _view(self, x: Any) -> BranchOutput:
        """The result of an operation, if it is a view of this tensor: one in memory of its own has read the values."""
        if not isinstance(x, Tensor) or x.untyped_storage().data_ptr() != self.untyped_storage().data_ptr():
            raise PatchError(PAIRS)
        return x if isinstance(x, BranchOutput) else self._alias(x, self._aliases)
