"""What is run: model shapes with the proportions of released models, built with random weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from cocodiff.errors import ConfigError

LATENT_CHANNELS, PROMPT_WIDTH, POOLED_WIDTH = 64, 256, 64


@dataclass(frozen=True)
class Shape:
    """One transformer and its input.

    Attributes:
        double, single: blocks with two streams, and blocks with one stream and a parallel MLP.
        text, image: tokens; `(1, text + image)` are attended jointly.
        note: how it differs from the model whose proportions it has.
    """

    name: str
    double: int
    single: int
    heads: int
    head_dim: int
    text: int
    image: int
    dtype: str = "float32"
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
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"width": self.width}


# Layers, heads and head_dim from the released configurations; 1024 x 1024 pixels.
SHAPES = {
    "flux-dev": Shape("flux-dev", 19, 38, 24, 128, 512, 4096),
    "flux2-dev": Shape(
        "flux2-dev", 8, 48, 48, 128, 512, 4096, note="FLUX.1 blocks in FLUX.2's proportion; random weights"
    ),
}


def named_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(f"--shape {name} is not one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def build_transformer(shape: Shape) -> nn.Module:
    """A transformer of this shape; the same weights on every rank."""
    import diffusers

    pair = shape.head_dim // 2
    side = 2 * (pair * 7 // 16)  # FLUX gives 1/8 of a head to the first axis, 7/16 to either of the others
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        joint_attention_dim=PROMPT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=(shape.head_dim - 2 * side, side, side),
    )
    torch.set_rng_state(state)
    return model.to(getattr(torch, shape.dtype)).eval()


def build_inputs(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """One step's input; the same on every rank."""
    generator, dtype = torch.Generator().manual_seed(1), getattr(torch, shape.dtype)
    side = math.ceil(math.sqrt(shape.image))
    places = torch.arange(shape.image)
    inputs = {
        "hidden_states": torch.randn(1, shape.image, LATENT_CHANNELS, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, shape.text, PROMPT_WIDTH, generator=generator).to(dtype),
        "pooled_projections": torch.randn(1, POOLED_WIDTH, generator=generator).to(dtype),
        "timestep": torch.tensor([0.5]).to(dtype),
        "img_ids": torch.stack([0 * places, places // side, places % side], dim=1).to(dtype),
        "txt_ids": torch.zeros(shape.text, 3).to(dtype),
    }
    return {name: value.to(device) for name, value in inputs.items()}
