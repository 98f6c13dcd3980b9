"""What is run: model shapes with the proportions of released models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from cocodiff.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """One transformer and its input.

    Attributes:
        family: whose blocks: flux, flux2, sd3, qwen, wan.
        double, single: blocks, and FLUX's blocks of one stream with a parallel MLP.
        text, image: tokens; attended jointly, but for Wan, which attends to its `image` (video) tokens alone.
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

        >>> small = SHAPES["flux-dev"].scaled(1 / 16)
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


# Layers, heads and head_dim from the released configurations; 1024 x 1024 pixels, video 81 frames of 480 x 832.
SHAPES = {
    "flux-dev": Shape("flux-dev", "flux", 19, 38, 24, 128, 512, 4096),
    "flux2-dev": Shape("flux2-dev", "flux2", 8, 48, 48, 128, 512, 4096),
    "qwen-image": Shape("qwen-image", "qwen", 60, 0, 24, 128, 256, 4096),
    "sd35-large": Shape("sd35-large", "sd3", 38, 0, 38, 64, 333, 4096),
    "sd35-medium": Shape("sd35-medium", "sd3", 24, 0, 24, 64, 333, 4096, dual=13),
    "wan-14b": Shape("wan-14b", "wan", 40, 0, 40, 128, 512, 32760),
    "wan-1.3b": Shape("wan-1.3b", "wan", 30, 0, 12, 128, 512, 32760),
}


def named_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(f"--shape {name} is not one of {', '.join(SHAPES)}.")
    return SHAPES[name]
