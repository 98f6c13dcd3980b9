"""Captions of the tiny pipeline, the pictures they describe, and the captions that are kept out of training.

A caption names two objects, their relation and the background:
"a red circle above a blue square on a white background". Pictures have 64 x 64 pixels. An object lies near the middle
of its half of the picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Height and width of a picture in pixels."""

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (160, 30, 180),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(OPPOSITE)

HELD_OUT = 64
"""The number of scenes that are kept out of training."""


@dataclass(frozen=True)
class Thing:
    """One object, for example a red circle."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two different objects, the relation of the first to the second, and the background."""

    first: Thing
    relation: str
    second: Thing
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.first} {self.relation} a {self.second} on a {self.background} background"

    @property
    def mirrored(self) -> Scene:
        """The same picture described from the second object."""
        return Scene(self.second, OPPOSITE[self.relation], self.first, self.background)


def parse(caption: str) -> Scene:
    """Return the scene of a caption of this grammar. ValueError for any other text."""
    scene = _by_caption().get(" ".join(caption.lower().split()))
    if scene is None:
        example = all_scenes()[0].caption
        raise ValueError(f"not a caption of the tiny grammar: {caption!r}; one is {example!r}")
    return scene


@cache
def _by_caption() -> dict[str, Scene]:
    return {scene.caption: scene for scene in all_scenes()}


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Return every scene of the grammar: 15 x 14 pairs of objects x 4 relations x 3 backgrounds = 2,520."""
    things = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
    return tuple(
        Scene(first, relation, second, background)
        for first in things
        for relation in RELATIONS
        for second in things
        if first != second
        for background in BACKGROUNDS
    )


@cache
def held_out_scenes() -> tuple[Scene, ...]:
    """Return the 64 scenes that training never sees, neither as they are nor mirrored; always the same ones."""
    chosen: list[Scene] = []
    taken: set[Scene] = set()
    for scene in random.Random(2024).sample(all_scenes(), len(all_scenes())):
        if scene not in taken:
            chosen.append(scene)
            taken.update((scene, scene.mirrored))
        if len(chosen) == HELD_OUT:
            break
    return tuple(chosen)


@cache
def training_scenes() -> tuple[Scene, ...]:
    """Return all 2,392 scenes but the held-out ones and their mirror images."""
    hidden = {one for scene in held_out_scenes() for one in (scene, scene.mirrored)}
    return tuple(scene for scene in all_scenes() if scene not in hidden)


def half_of(relation: str, which: str) -> tuple[slice, slice]:
    """Return the rows and columns of the half in which the object `which` ("first" or "second") lies."""
    near = (relation in ("above", "left of")) == (which == "first")
    part = slice(0, SIZE // 2) if near else slice(SIZE // 2, SIZE)
    return (part, slice(0, SIZE)) if relation in ("above", "below") else (slice(0, SIZE), part)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        r *= 0.9  # so that it looks as large as the circle
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    else:
        draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=fill)


def draw_scene(scene: Scene, rng: random.Random, only: str | None = None) -> Image.Image:
    """Draw `scene`, 64 x 64 RGB, with radii of 12 to 14 px and offsets of up to 1 px along the relation, 2 px across.

    `only` ("first" or "second") leaves out the other object and changes nothing else.
    """
    scale = 4  # drawn larger and averaged down, so that edges are smooth
    canvas = Image.new("RGB", (SIZE * scale, SIZE * scale), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for which, thing in (("first", scene.first), ("second", scene.second)):
        rows, columns = half_of(scene.relation, which)
        upright = scene.relation in ("above", "below")
        along, across = rng.uniform(-1, 1), rng.uniform(-2, 2)
        x = (columns.start + columns.stop) / 2 + (across if upright else along)
        y = (rows.start + rows.stop) / 2 + (along if upright else across)
        radius = rng.uniform(12, 14)
        if only in (None, which):
            _draw_thing(draw, thing, x * scale, y * scale, radius * scale)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


@dataclass(frozen=True)
class InpaintCase:
    """An inpainting task: repaint the white part of `mask` in `image` so that the whole picture fits `scene`."""

    scene: Scene
    image: Image.Image
    mask: Image.Image
    repainted: str


def inpaint_case(index: int) -> InpaintCase:
    """Return the inpainting task of held-out scene `index`: one object is missing, or another is in its place.

    Indices 0, 1, 4, 5 .. lack the object, 2, 3, 6, 7 .. show another one. It is the first object if `index` is even,
    else the second. The mask covers its half of the picture.
    """
    scene = held_out_scenes()[index]
    rng = random.Random(index)
    which, other = ("first", "second") if index % 2 == 0 else ("second", "first")
    if (index // 2) % 2 == 0:
        image = draw_scene(scene, rng, only=other)
    else:
        asked: Thing = getattr(scene, which)
        wrong = Thing(
            rng.choice([shape for shape in SHAPES if shape != asked.shape]),
            rng.choice([colour for colour in COLOURS if colour != asked.colour]),
        )
        before = replace(scene, first=wrong) if which == "first" else replace(scene, second=wrong)
        image = draw_scene(before, rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[half_of(scene.relation, which)] = 255
    return InpaintCase(scene, image, Image.fromarray(mask), which)
