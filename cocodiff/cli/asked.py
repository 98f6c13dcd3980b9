"""What `cocodiff bench` was asked to measure: the texts of its options as a shape, methods and meshes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from cocodiff.bench.methods import check_methods
from cocodiff.bench.shapes import named_shape
from cocodiff.cli.start import dtype_named
from cocodiff.config import DEGREES
from cocodiff.errors import ConfigError
from cocodiff.models.shapes import Shape

MOST_BLOCKS = 1000
MOST_DIGITS = 12  # of a number in a text; what is longer is a mistake, and slow to compute with


@dataclass(frozen=True)
class Asked:
    """The options that say what to measure; None for what was left out, `meshes` in the order of DEGREES."""

    shape: str
    scale: str = "1/16"
    methods: str = "single,diffusers,ulysses,exact"
    tokens: int | None = None
    text: int | None = None
    width: int | None = None
    heads: int | None = None
    layers: str | None = None
    dtype: str | None = None
    meshes: tuple[str | None, ...] = (None, None, None)

    @property
    def names(self) -> list[str]:
        """The methods. ConfigError for one that there is not."""
        names = list(dict.fromkeys(name.strip() for name in self.methods.split(",")))
        check_methods(names)
        return names

    @property
    def degrees(self) -> list[dict[str, int]]:
        """All combinations of the degrees that were given."""
        choices = []
        for name, text in zip(DEGREES, self.meshes, strict=True):
            numbers = [] if text is None else whole_numbers(f"--{name.replace('_', '-')}", text)
            choices.append([{name: number} for number in numbers] or [{}])
        return [cfg | ring | ulysses for cfg, ring, ulysses in itertools.product(*choices)]

    def model(self) -> Shape:
        """The shape, scaled and changed. ConfigError with the option for what cannot be."""
        shape = named_shape(self.shape).scaled(fraction(self.scale))
        changes: dict[str, Any] = {"image": self.tokens, "text": self.text, "heads": self.heads}
        if self.dtype is not None:
            changes["dtype"] = dtype_named(self.dtype)
        if self.layers is not None:
            changes["double"], changes["single"] = _layers(self.layers)
        chosen = replace(shape, **{name: value for name, value in changes.items() if value is not None})
        if self.width is not None or self.heads is not None:
            wanted = self.width or shape.width
            if wanted % (8 * chosen.heads):
                raise ConfigError(f"width {wanted} does not make {chosen.heads} heads of a multiple of 8 channels.")
            chosen = replace(chosen, head_dim=wanted // chosen.heads)
        return chosen

    def check(self) -> None:
        """Raise ConfigError for whatever cannot be, without building anything."""
        assert self.names and self.degrees and self.model()

    def check_ranks(self, ranks: int) -> None:
        """Raise ConfigError if there is one rank, and methods that exchange."""
        several = [name for name in self.names if name != "single"]
        if ranks == 1 and several:
            raise ConfigError(
                f"--methods {','.join(several)}: one rank has nothing to exchange. Start the bench under a launcher "
                "(torchrun --nproc-per-node 8 -m cocodiff bench), or with --ranks 2, or measure --methods single."
            )


def whole_numbers(option: str, text: str, most: int = 2**20) -> list[int]:
    """Parse numbers of at least 1, separated by commas. ConfigError with the option's name.

    >>> whole_numbers("--ranks", "24,96")
    [24, 96]
    """
    parts = [part.strip() for part in text.split(",")]
    good = all(part.isascii() and part.isdecimal() and len(part) <= MOST_DIGITS for part in parts)
    if not good or not all(0 < int(part) <= most for part in parts):
        raise ConfigError(f"{option} {text}: write whole numbers of 1 to {most}, with commas.")
    return [int(part) for part in parts]


def fraction(text: str) -> Fraction:
    """The number that --scale names. ConfigError for what is none."""
    try:
        if len(text) > 2 * MOST_DIGITS:
            raise ValueError
        # By way of a float, an exponent of a billion costs nothing.
        return Fraction(text) if "/" in text else Fraction(float(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(f"--scale {text[:40]} is no number: write 1/16 or 0.0625.") from None


def _layers(text: str) -> tuple[int, int]:
    """Return the numbers of double and single blocks."""
    parts = text.split(",") if "," in text else [text, "0"]
    good = len(parts) == 2 and all(part.isascii() and part.isdecimal() and len(part) < MOST_DIGITS for part in parts)
    if not good or not 0 < sum(map(int, parts)) <= MOST_BLOCKS:
        raise ConfigError(
            f"--layers {text}: write the numbers of double and single blocks, such as 2,4, or one number; 1 to "
            f"{MOST_BLOCKS} in all."
        )
    return int(parts[0]), int(parts[1])
