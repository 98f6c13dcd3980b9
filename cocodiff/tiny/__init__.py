"""A tiny FLUX whose trained weights come with the package: real diffusers pipelines, without any download.

    from cocodiff.tiny import tiny_pipeline

    image = tiny_pipeline()("a red circle above a blue square on a white background").images[0]

It draws 64 x 64 pictures of two coloured shapes, fast enough for a CPU. `cocodiff.tiny.pictures` has the
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
    "flux": {
        "text2image": "FluxPipeline",
        "inpaint": "FluxInpaintPipeline",
        "img2img": "FluxImg2ImgPipeline",
    },
}


def tiny_pipeline(
    family: str = "flux", task: str = "text2image", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """A trained tiny pipeline of a real diffusers class, on the CPU.

    Args:
        family: "flux".
        task: "text2image" (FluxPipeline), "inpaint" (FluxInpaintPipeline) or "img2img" (FluxImg2ImgPipeline);
            all share the same weights.
        dtype: of all models; None means torch.float32. The weights are stored in float16.

    Returns:
        The pipeline. Its default height and width are 64 px: 256 image tokens beside 16 text tokens.
    """
    if family not in _PIPELINES:
        raise ValueError(f"unknown family {family!r}; supported: {', '.join(_PIPELINES)}")
    tasks = _PIPELINES[family]
    if task not in tasks:
        raise ValueError(f"unknown task {task!r} of family {family!r}; supported: {', '.join(tasks)}")

    import diffusers
    import torch

    from cocodiff.tiny import models

    pipe = getattr(diffusers, tasks[task])(**models.load_components(dtype=dtype or torch.float32))
    pipe.default_sample_size = models.LATENT_SIZE  # an attribute, not a config entry, of these pipelines
    return pipe
