"""Score the tiny pipelines on held-out captions and draw the pictures people look at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from cocodiff.tiny import models, pictures
from cocodiff.tiny.check import Verdict, check_picture
from cocodiff.tiny.pictures import InpaintCase, Scene

BATCH = 16
_RIGHT, _WRONG = (30, 140, 60), (210, 40, 40)
_TILE = 128  # px, a picture on a sheet
_TEXT_HEIGHT = 42  # px, three lines of caption


def _generators(indices: Iterable[int]) -> list[torch.Generator]:
    """One per picture, so that a picture does not depend on its batch."""
    return [torch.Generator().manual_seed(index) for index in indices]


def _pipeline(name: str, components: dict[str, Any]) -> Any:
    import diffusers

    pipe = getattr(diffusers, name)(**components)
    pipe.default_sample_size = models.LATENT_SIZE
    pipe.set_progress_bar_config(disable=True)
    return pipe


def score_text2image(
    components: dict[str, Any], count: int = pictures.HELD_OUT, steps: int = 28, true_cfg_scale: float = 1.0
) -> list[tuple[Scene, Image.Image, Verdict]]:
    """A picture for each of the first `count` held-out captions, judged; its seed is the caption's index."""
    pipe = _pipeline("FluxPipeline", components)
    negative = {"negative_prompt": "", "true_cfg_scale": true_cfg_scale} if true_cfg_scale > 1 else {}
    results = []
    for start in range(0, count, BATCH):
        part = range(start, min(start + BATCH, count))
        scenes = [pictures.held_out_scenes()[i] for i in part]
        captions = [scene.caption for scene in scenes]
        images = pipe(captions, num_inference_steps=steps, generator=_generators(part), **negative).images
        results += [(s, image, check_picture(image, s)) for s, image in zip(scenes, images, strict=True)]
    return results


def score_inpaint(
    components: dict[str, Any], count: int = pictures.HELD_OUT, steps: int = 28
) -> list[tuple[InpaintCase, Image.Image, Verdict]]:
    """The first `count` inpainting cases at strength 1 (repainted from pure noise), whole caption judged."""
    pipe = _pipeline("FluxInpaintPipeline", components)
    results = []
    for start in range(0, count, BATCH):
        part = range(start, min(start + BATCH, count))
        cases = [pictures.inpaint_case(i) for i in part]
        images = pipe(
            [case.scene.caption for case in cases],
            image=[case.image for case in cases],
            mask_image=[case.mask for case in cases],
            strength=1.0,
            num_inference_steps=steps,
            generator=_generators(part),
        ).images
        results += [(c, image, check_picture(image, c.scene)) for c, image in zip(cases, images, strict=True)]
    return results


def _caption(draw: ImageDraw.ImageDraw, x: int, y: int, scene: Scene, verdict: Verdict) -> None:
    lines = [f"a {scene.first} {scene.relation}", f"a {scene.second}", f"on a {scene.background} background"]
    colour = (60, 60, 60) if verdict else _WRONG
    for i, line in enumerate(lines):
        draw.text((x, y + 13 * i), line, fill=colour, font=ImageFont.load_default(size=11))


def _tile(sheet: Image.Image, image: Image.Image, x: int, y: int, frame: tuple[int, int, int]) -> None:
    ImageDraw.Draw(sheet).rectangle((x - 3, y - 3, x + _TILE + 2, y + _TILE + 2), fill=frame)
    sheet.paste(image.resize((_TILE, _TILE), Image.Resampling.NEAREST), (x, y))


def draw_contact_sheet(results: list[tuple[Scene, Image.Image, Verdict]], path: Path, columns: int = 8) -> None:
    """All pictures with their captions; a green frame for right, a red one for wrong."""
    width, height = _TILE + 20, _TILE + _TEXT_HEIGHT + 14
    sheet = Image.new("RGB", (width * columns, height * -(-len(results) // columns)), "white")
    for i, (scene, image, verdict) in enumerate(results):
        x, y = i % columns * width + 10, i // columns * height + 6
        _tile(sheet, image, x, y, _RIGHT if verdict else _WRONG)
        _caption(ImageDraw.Draw(sheet), x, y + _TILE + 4, scene, verdict)
    _save(sheet, path)


def draw_inpaint_sheet(results: list[tuple[InpaintCase, Image.Image, Verdict]], path: Path, columns: int = 4) -> None:
    """Pairs of pictures: before, with the mask drawn over it in stripes, and after."""
    width, height = 2 * _TILE + 32, _TILE + _TEXT_HEIGHT + 14
    sheet = Image.new("RGB", (width * columns, height * -(-len(results) // columns)), "white")
    for i, (case, image, verdict) in enumerate(results):
        x, y = i % columns * width + 10, i // columns * height + 6
        _tile(sheet, _striped(case), x, y, (200, 200, 200))
        _tile(sheet, image, x + _TILE + 10, y, _RIGHT if verdict else _WRONG)
        _caption(ImageDraw.Draw(sheet), x, y + _TILE + 4, case.scene, verdict)
    _save(sheet, path)


def _striped(case: InpaintCase) -> Image.Image:
    """The picture before inpainting with orange diagonals where the mask is, (128, 128)."""
    stripes = Image.new("L", (_TILE, _TILE))
    for offset in range(-_TILE, _TILE, 12):
        ImageDraw.Draw(stripes).line((offset, 0, offset + _TILE, _TILE), fill=255, width=2)
    before = case.image.resize((_TILE, _TILE), Image.Resampling.NEAREST)
    masked = Image.composite(Image.new("RGB", before.size, (255, 140, 0)), before, stripes)
    return Image.composite(masked, before, case.mask.resize(before.size, Image.Resampling.NEAREST))


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(path, optimize=True)  # a palette makes the file a third as large
