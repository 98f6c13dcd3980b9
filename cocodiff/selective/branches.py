"""Tensors that are recognised by their values, so that all ranks find the same, whatever objects each of them has."""

from __future__ import annotations

import torch
from torch import Tensor


class Remembered:
    """A tensor as it was. The same object that nobody wrote to is recognised without a look at its values.

    >>> prompt = torch.ones(2)
    >>> before = Remembered(prompt)
    >>> before.recognises(prompt), before.recognises(prompt.clone()), before.recognises(prompt.mul_(2))
    (True, True, False)
    """

    def __init__(self, x: Tensor) -> None:
        self._object, self._version, self._values = x, _version(x), x.clone()

    def recognises(self, x: Tensor) -> bool:
        """Whether this has the values of then. On an accelerator waits for them, if it is another object."""
        version = _version(x)
        if x is self._object and version is not None and version == self._version:
            return True
        same = (
            x.shape == self._values.shape
            and x.dtype == self._values.dtype
            and torch.equal(_bits(x), _bits(self._values))
        )
        if same:
            self._object, self._version = x, version
        return same


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)  # a NaN is itself


def _version(x: Tensor) -> int | None:
    """Counts what is written to it; None where nobody counts."""
    return None if x.is_inference() else x._version
