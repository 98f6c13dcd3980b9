"""What is run: the shapes of all families."""

from __future__ import annotations

from cocodiff.errors import ConfigError
from cocodiff.models import FAMILIES
from cocodiff.models.shapes import Shape

# Layers, heads and head_dim from the released configurations; 1024 x 1024 pixels, video 81 frames of 480 x 832.
SHAPES: dict[str, Shape] = {shape.name: shape for family in FAMILIES for shape in family.part("shapes").SHAPES}


def named_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(f"--shape {name} is not one of {', '.join(SHAPES)}.")
    return SHAPES[name]
