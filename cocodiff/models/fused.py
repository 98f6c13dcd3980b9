"""One matrix for several projections, and how V can come first all the same."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F


class Fused:
    """Projections that one matrix makes at once, each by its own rows of it: so V can come first all the same.

    Where something was added to the linear layer its weights are not the whole truth: it is called, and all parts come
    at once.

    Args:
        sizes: rows of the weight for each label, in order.
    """

    def __init__(self, linear: nn.Module, sizes: Mapping[str, int]) -> None:
        self.linear, self._sizes = linear, dict(sizes)

    @property
    def at_once(self) -> bool:
        hooks = ("_hf_hook", "_diffusers_hook", "forward")
        return (
            type(self.linear) is not nn.Linear
            or bool(self.linear._forward_hooks or self.linear._forward_pre_hooks)
            or any(name in vars(self.linear) for name in hooks)
        )

    def all(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._sizes, self.linear(x).split(list(self._sizes.values()), dim=-1), strict=True))

    def one(self, label: str, x: Tensor) -> Tensor:
        labels = list(self._sizes)
        start = sum(self._sizes[before] for before in labels[: labels.index(label)])
        rows, linear = slice(start, start + self._sizes[label]), self.linear
        return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])  # type: ignore
