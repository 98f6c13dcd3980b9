"""Checks whether a 64 x 64 picture shows what its caption says, by rules on pixels; nothing is learned.

In each half of the picture it looks for the colour of the background, the colour of the object, and the shape whose
ideal outline, drawn into the bounding box of the object, agrees best with the object's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cocodiff.tiny import pictures
from cocodiff.tiny.pictures import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, Thing

Array = NDArray[np.float64]

# All limits allow for the blur of an autoencoder; drawn pictures meet them easily.
_MAX_COLOUR_DISTANCE = 70.0  # of the median pixel from its named colour, in 8-bit RGB; two names are >= 115 apart
_MAX_FOREIGN_SHARE = 0.03  # share of a half's pixels that are neither background nor object nor a blend of both
_MIN_OVERLAP = 0.85  # intersection over union with the ideal outline
_SIDE_PX = (17, 31)  # least and largest height and width of an object; drawn ones have 21 to 29
_MAX_ASPECT = 1.35


@dataclass(frozen=True)
class Verdict:
    """The mistakes of a picture, in words; none if it fits its caption."""

    mistakes: tuple[str, ...]

    @property
    def right(self) -> bool:
        return not self.mistakes

    def __bool__(self) -> bool:
        return self.right


def check_picture(picture: Image.Image | NDArray[np.uint8], caption: str | Scene) -> Verdict:
    """Check a picture, PIL or (64, 64, 3) uint8, against a caption of the tiny grammar. ValueError for another size."""
    scene = pictures.parse(caption) if isinstance(caption, str) else caption
    rgb = picture.convert("RGB") if isinstance(picture, Image.Image) else picture
    pixels = np.asarray(rgb, dtype=np.float64)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the picture must be {SIZE} x {SIZE} RGB, not {pixels.shape}")
    mistakes: list[str] = []
    for which, thing in (("first", scene.first), ("second", scene.second)):
        half = pixels[pictures.half_of(scene.relation, which)]
        mistakes += [f"{which} object: {mistake}" for mistake in _mistakes(half, thing, scene.background)]
    return Verdict(tuple(mistakes))


def _mistakes(half: Array, thing: Thing, background: str) -> list[str]:
    """Return the mistakes in one half, (32, 64, 3) or (64, 32, 3), that should hold `thing` and nothing else."""
    behind = np.array(BACKGROUNDS[background], dtype=np.float64)
    named = {**BACKGROUNDS, **COLOURS}
    distances = {name: np.linalg.norm(half - np.array(rgb), axis=-1) for name, rgb in named.items()}
    names = list(distances)
    nearest = np.argmin([distances[name] for name in names], axis=0)
    counts = np.bincount(nearest.ravel(), minlength=len(names))
    seen = max(BACKGROUNDS, key=lambda name: counts[names.index(name)])
    if seen != background:
        return [f"background is {seen}"]
    if counts[names.index(background)] < 0.4 * nearest.size:
        return ["hardly any background"]
    colour = max(COLOURS, key=lambda name: counts[names.index(name)])
    if colour != thing.colour:
        return [f"colour is {colour}"]
    is_object, is_behind = nearest == names.index(colour), nearest == names.index(background)
    if is_object.sum() < 100:
        return ["no object"]
    mistakes = []
    if np.median(distances[colour][is_object]) > _MAX_COLOUR_DISTANCE:
        mistakes.append(f"colour is hardly {colour}")
    if np.median(distances[background][is_behind]) > _MAX_COLOUR_DISTANCE:
        mistakes.append(f"background is hardly {background}")

    # Smooth edges are blends, so express each pixel as background + opacity x (colour - background) + a rest.
    towards = np.array(COLOURS[colour], dtype=np.float64) - behind
    opacity = (half - behind) @ towards / (towards @ towards)
    rest = np.linalg.norm(half - behind - opacity[..., None] * towards, axis=-1)
    if (rest > _MAX_COLOUR_DISTANCE).mean() > _MAX_FOREIGN_SHARE:
        mistakes.append("other colours in the picture")
    return mistakes + _shape_mistakes(opacity > 0.5, thing.shape)


def _shape_mistakes(mask: NDArray[np.bool_], shape: str) -> list[str]:
    """Return the mistakes of the object whose pixels are `mask`, bool (32, 64) or (64, 32)."""
    # A row or column needs two pixels to count, so that single stray ones do not stretch the box.
    rows, columns = np.flatnonzero(mask.sum(1) >= 2), np.flatnonzero(mask.sum(0) >= 2)
    if not len(rows) or not len(columns):
        return ["no object"]
    height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
    if not (_SIDE_PX[0] <= min(height, width) and max(height, width) <= _SIDE_PX[1]):
        return [f"object is {height} x {width} px"]
    if max(height, width) > _MAX_ASPECT * min(height, width):
        return [f"object is stretched: {height} x {width} px"]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    outside = int(mask.sum() - box.sum())
    overlaps = {}
    for name in SHAPES:
        ideals = _outlines(name, height, width)
        overlaps[name] = max(float((box & one).sum() / ((box | one).sum() + outside)) for one in ideals)
    best = max(overlaps, key=lambda name: overlaps[name])
    if best != shape:
        return [f"shape is {best}"]
    if overlaps[best] < _MIN_OVERLAP:
        return [f"shape is hardly a {shape}: {overlaps[best]:.2f}"]
    return []


@cache
def _outlines(shape: str, height: int, width: int) -> list[NDArray[np.bool_]]:
    """Return the ideal pixels, bool (height, width), of a shape that fills the box; several for a triangle.

    A triangle stands on its base. Blurring removes its three sharp corners first, so the box may be too small: by up to
    3.5 px at the tip and by up to 2 px at either end of the base.
    """
    y = np.arange(height)[:, None] + 0.5
    x = np.arange(width)[None, :] + 0.5 - width / 2
    if shape == "circle":
        return [(2 * x / width) ** 2 + (2 * y / height - 1) ** 2 <= 1]
    if shape == "triangle":
        cuts = [(tip, end) for tip in (1.5, 2.5, 3.5) for end in (0.0, 1.0, 2.0)]
        return [np.abs(x) <= (width / 2 + end) * (y + tip) / (height + tip) for tip, end in cuts]
    return [np.ones((height, width), dtype=bool)]
