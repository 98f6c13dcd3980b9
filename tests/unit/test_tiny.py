"""The tiny pipelines: captions, pictures, the automatic check, and what the shipped weights draw."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline

from cocodiff import tiny_pipeline
from cocodiff.tiny import models, pictures
from cocodiff.tiny.check import check_picture
from cocodiff.tiny.pictures import BACKGROUNDS, COLOURS, OPPOSITE, RELATIONS, SHAPES, Scene


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _other(rng: random.Random, names: tuple[str, ...] | dict[str, object], name: str) -> str:
    return rng.choice([other for other in names if other != name])


def _wrong_scenes(scene: Scene, rng: random.Random) -> list[Scene]:
    """Captions that differ from `scene` in one thing, and in two that are exchanged."""
    first, second = scene.first, scene.second
    return [
        replace(scene, first=replace(first, shape=_other(rng, SHAPES, first.shape))),
        replace(scene, second=replace(second, colour=_other(rng, COLOURS, second.colour))),
        replace(scene, relation=_other(rng, RELATIONS, scene.relation)),
        replace(scene, relation=OPPOSITE[scene.relation]),
        replace(scene, background=_other(rng, BACKGROUNDS, scene.background)),
        replace(scene, first=second, second=first),
    ]


def test_held_out_captions_are_never_trained_on() -> None:
    held_out, training = pictures.held_out_scenes(), pictures.training_scenes()
    assert len(held_out) == 64
    assert len(pictures.all_scenes()) == 15 * 14 * 4 * 3
    told_both_ways = {told.caption for scene in held_out for told in (scene, scene.mirrored)}
    assert len(told_both_ways) == 128
    assert told_both_ways.isdisjoint(scene.caption for scene in training)
    assert len(told_both_ways) + len(training) == len(pictures.all_scenes())
    assert held_out[0].caption == "a green triangle below a blue triangle on a gray background"


def test_every_caption_is_parsed_back() -> None:
    assert all(pictures.parse(scene.caption.upper()) == scene for scene in pictures.all_scenes())
    with pytest.raises(ValueError, match="a pink horse"):
        pictures.parse("a pink horse above a blue square on a white background")


def test_check_accepts_drawn_pictures_and_rejects_wrong_captions() -> None:
    rng = random.Random(3)
    scenes = rng.sample(pictures.all_scenes(), 100)
    accepted = 0
    for scene in scenes:
        picture = pictures.draw_scene(scene, rng)
        accepted += bool(check_picture(picture, scene.caption))
        for wrong in _wrong_scenes(scene, rng):
            assert not check_picture(picture, wrong), (scene.caption, wrong.caption)
        assert not check_picture(pictures.draw_scene(scene, rng, only="first"), scene)
        assert not check_picture(pictures.draw_scene(scene, rng, only="second"), scene)
    assert accepted > 0.99 * len(scenes)


def test_check_rejects_noise_and_names_the_mistake() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    scene = pictures.held_out_scenes()[0]
    assert not check_picture(noise, scene)
    picture = pictures.draw_scene(scene, random.Random(0))
    wrong = replace(scene, background=_other(random.Random(0), BACKGROUNDS, scene.background))
    assert f"background is {scene.background}" in check_picture(picture, wrong).mistakes[0]
    with pytest.raises(ValueError, match="32, 32, 3"):
        check_picture(picture.resize((32, 32)), scene)


def test_inpainting_starts_from_wrong_pictures() -> None:
    for i in range(pictures.HELD_OUT):
        case = pictures.inpaint_case(i)
        assert not check_picture(case.image, case.scene)
        assert np.asarray(case.mask).mean() == 127.5  # half of it, white


@pytest.mark.parametrize(
    ("task", "kind"),
    [("text2image", FluxPipeline), ("inpaint", FluxInpaintPipeline), ("img2img", FluxImg2ImgPipeline)],
)
def test_tasks_are_stock_pipelines(task: str, kind: type) -> None:
    assert type(tiny_pipeline(task=task)) is kind


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'sd9'.*supported: flux"):
        tiny_pipeline("sd9")
    with pytest.raises(ValueError, match="'video'.*supported: text2image, inpaint, img2img"):
        tiny_pipeline(task="video")


def test_importing_is_free() -> None:
    code = "import sys, cocodiff.tiny; sys.exit('diffusers' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sizes(pipe: FluxPipeline) -> None:
    assert sum(file.stat().st_size for file in models.WEIGHTS.iterdir()) <= 12_000_000
    assert pipe.transformer.config.num_attention_heads >= 8
    shapes = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(
            (kwargs["hidden_states"].shape[1], kwargs["encoder_hidden_states"].shape[1])
        ),
        with_kwargs=True,
    )
    caption = pictures.held_out_scenes()[0].caption
    assert pipe(caption, num_inference_steps=1).images[0].size == (64, 64)
    assert pipe(caption, num_inference_steps=1, height=96, width=32).images[0].size == (32, 96)
    pipe(caption, num_inference_steps=1, max_sequence_length=13)
    hook.remove()
    assert shapes == [(256, 16), (24 * 8, 16), (256, 13)]


def test_bfloat16() -> None:
    pipe = tiny_pipeline(dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe("a red circle", num_inference_steps=1, output_type="latent").images
    assert pipe.transformer.dtype == latents.dtype == torch.bfloat16
    assert latents.isfinite().all()


def test_held_out_captions_come_out_right(pipe: FluxPipeline) -> None:
    scenes = pictures.held_out_scenes()[:4]
    generators = [torch.Generator().manual_seed(i) for i in range(len(scenes))]
    images = pipe([s.caption for s in scenes], num_inference_steps=20, generator=generators).images
    verdicts = [check_picture(image, scene) for image, scene in zip(images, scenes, strict=True)]
    assert all(verdicts), [verdict.mistakes for verdict in verdicts]


def test_inpainting_comes_out_right(pipe: FluxPipeline) -> None:
    inpaint = FluxInpaintPipeline(**pipe.components)
    inpaint.default_sample_size = models.LATENT_SIZE
    inpaint.set_progress_bar_config(disable=True)
    case = pictures.inpaint_case(0)
    image = inpaint(
        case.scene.caption,
        image=case.image,
        mask_image=case.mask,
        strength=1.0,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    verdict = check_picture(image, case.scene)
    assert verdict, verdict.mistakes
