"""Model shapes with the proportions of released models, and how a family makes a transformer of a shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from cocodiff.errors import ConfigError

CHANNELS, PROMPT_WIDTH, POOLED_WIDTH = 64, 256, 64


@dataclass(frozen=True)
class Shape:
    """One transformer and its input.

    Attributes:
        family: whose blocks: the name of one of `cocodiff.models.FAMILIES`.
        double, single: blocks, and FLUX's blocks of one stream with a parallel MLP.
        text, image: tokens; attended jointly, but for Wan, which attends to its `image` (video) tokens only.
        dual: so many of the first blocks attend to the image a second time (SD3.5 medium).
        note: how it differs from the model whose proportions it has.
    """

    name: str
    family: str
    double: int
    single: int
    heads: int
    head_dim: int
    text: int
    image: int
    dtype: str = "float32"
    dual: int = 0
    note: str = "random weights, narrow prompt embeddings"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        return self.double + self.single

    def scaled(self, scale: Fraction | float) -> Shape:
        """As much smaller as `scale` says in tokens x width, both by its root, and in blocks.

        So attention keeps its share of the compute, and the heads their number. Blocks keep their proportion, and
        tokens come in multiples of 32, for methods whose shards must be equal.

        >>> small = Shape("flux-dev", "flux", 19, 38, 24, 128, 512, 4096).scaled(1 / 16)
        >>> small.width, small.text, small.image, small.double, small.single
        (768, 128, 1024, 2, 4)
        """
        if not 0 < scale <= 1:
            raise ConfigError(f"--scale {scale} is not above 0 and at most 1.")
        root = math.sqrt(scale)
        every = math.gcd(self.double, self.single) or 1
        times = max(2, round(every * scale))  # what happens between blocks counts, too
        return replace(
            self,
            head_dim=max(8, round(self.head_dim * root / 8) * 8),
            text=max(32, round(self.text * root / 32) * 32),
            image=max(32, round(self.image * root / 32) * 32),
            double=self.double // every * times,
            single=self.single // every * times,
            dual=round(self.dual * times / every),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"width": self.width}


@dataclass(frozen=True)
class Recipe:
    """How a family makes a transformer of a shape, and one step's input for it.

    Attributes:
        transformer: diffusers' class.
        config: of a shape: the arguments of that class.
        inputs: of a shape and a function that draws a random tensor of given sizes: arguments of a forward.
    """

    transformer: str
    config: Callable[[Shape], dict[str, Any]]
    inputs: Callable[[Shape, Callable[..., Tensor]], dict[str, Any]]


def sides(tokens: int) -> tuple[int, int]:
    """Height and width, in tokens, of a picture of just so many: as square as can be.

    >>> sides(1024), sides(1440)
    ((32, 32), (36, 40))
    """
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def attention_config(shape: Shape) -> dict[str, int]:
    return {"attention_head_dim": shape.head_dim, "num_attention_heads": shape.heads}


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head for time, height and width, each even: two of 16 for time, as FLUX.1 has them."""
    side = 2 * (head_dim // 2 * 7 // 16)
    return head_dim - 2 * side, side, side


def positions(shape: Shape, axes: int) -> Tensor:
    """`(image tokens, axes)`: row and column of each in axes 1 and 2."""
    height, width = sides(shape.image)
    ids = torch.zeros(shape.image, axes)
    ids[:, 1:3] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return ids
