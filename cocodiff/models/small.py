"""Small pipelines of real diffusers classes, made without any download: what a family's `small.py` offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cocodiff.models import family_named

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Small:
    """The small pipelines of one family: `SMALL` in its `small.py`, which loads diffusers when it is imported.

    Attributes:
        tasks: task of `tiny_pipeline` -> diffusers class.
        tiny: of a diffusers class: a pipeline with all its parts, which draws from a prompt to pixels.
        pipelines: name -> makes a pipeline without text encoders, for tests; from the global random state.
        call: `(name, inputs)` -> arguments for a call of that pipeline: prompts are embeddings, with guidance where it
            has it; a latent comes back. `inputs` is a `cocodiff.models.random_parts.Inputs`.
    """

    tasks: Mapping[str, str]
    tiny: Callable[[str], Any]
    pipelines: Mapping[str, Callable[[], Any]]
    call: Callable[[str, Any], dict[str, Any]]


def tiny_pipeline(family: str = "flux", task: str | None = None, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """A tiny pipeline of a real diffusers class, on the CPU; flux is trained, the others have random weights.

    Args:
        family: "flux", "flux2", "sd3", "qwen" or "wan".
        task: "text2image", "inpaint" or "img2img" (only "text2image" for flux2); "text2video" or "image2video" for
            wan. None means the first of them.
        dtype: of all models; None means torch.float32.

    Returns:
        The pipeline. Pictures are 64 x 64 px unless the call says otherwise: 256 image tokens.

    Examples:
        >>> tiny_pipeline("sd3").transformer.config.num_layers
        4
    """
    small: Small = family_named(family).part("small").SMALL
    if task is None:
        task = next(iter(small.tasks))
    if task not in small.tasks:
        raise ValueError(f"unknown task {task!r} of family {family!r}; supported: {', '.join(small.tasks)}")
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = small.tiny(small.tasks[task])
    if hasattr(pipe, "default_sample_size"):  # an attribute, not a config entry, of these pipelines
        pipe.default_sample_size = 64 // pipe.vae_scale_factor
    for part in pipe.components.values():
        if dtype is not None and isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns, naming no module to be warned about
    return pipe
