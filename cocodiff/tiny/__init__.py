"""Tiny pipelines of real diffusers classes, without any download: a trained FLUX, and the other families untrained.

    from cocodiff.tiny import tiny_pipeline

    image = tiny_pipeline()("a red circle above a blue square on a white background").images[0]

FLUX draws 64 x 64 pictures of two coloured shapes, fast enough for a CPU. `cocodiff.tiny.pictures` has the
captions' grammar, `cocodiff.tiny.check` judges a picture against its caption, `scripts/train_tiny.py` trains
everything from nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = ["tiny_pipeline"]

_PIPELINES = {
    "flux": {"text2image": "FluxPipeline", "inpaint": "FluxInpaintPipeline", "img2img": "FluxImg2ImgPipeline"},
    "flux2": {"text2image": "Flux2KleinPipeline"},
    "sd3": {
        "text2image": "StableDiffusion3Pipeline",
        "img2img": "StableDiffusion3Img2ImgPipeline",
        "inpaint": "StableDiffusion3InpaintPipeline",
    },
    "qwen": {
        "text2image": "QwenImagePipeline",
        "img2img": "QwenImageImg2ImgPipeline",
        "inpaint": "QwenImageInpaintPipeline",
    },
    "wan": {"text2video": "WanPipeline", "image2video": "WanImageToVideoPipeline"},
}


def tiny_pipeline(family: str = "flux", task: str | None = None, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """A tiny pipeline of a real diffusers class, on the CPU; flux is trained, the others have random weights.

    Args:
        family: "flux", "flux2", "sd3", "qwen" or "wan".
        task: "text2image", "inpaint" or "img2img" ("text2image" alone for flux2); "text2video" or "image2video" for
            wan. None means the first of them.
        dtype: of all models; None means torch.float32.

    Returns:
        The pipeline. Pictures are 64 x 64 px unless the call says otherwise: 256 image tokens.

    >>> tiny_pipeline("sd3").transformer.config.num_layers
    4
    """
    if family not in _PIPELINES:
        raise ValueError(f"unknown family {family!r}; supported: {', '.join(_PIPELINES)}")
    tasks = _PIPELINES[family]
    if task is None:
        task = next(iter(tasks))
    if task not in tasks:
        raise ValueError(f"unknown task {task!r} of family {family!r}; supported: {', '.join(tasks)}")

    import diffusers
    import torch

    dtype = dtype or torch.float32
    if family != "flux":
        from cocodiff.tiny import untrained

        pipe = untrained.load_pipeline(family, tasks[task])
        return pipe if dtype == torch.float32 else pipe.to(dtype)
    from cocodiff.tiny import models

    pipe = getattr(diffusers, tasks[task])(**models.load_components(dtype=dtype))
    pipe.default_sample_size = models.LATENT_SIZE  # an attribute, not a config entry, of these pipelines
    return pipe
