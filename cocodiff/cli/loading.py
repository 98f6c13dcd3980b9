"""Finds the class of the pipeline that `--model` names, checks the request against it, loads it and checks sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cocodiff.cli.files import exists
from cocodiff.cli.request import OPTIONS, Request, check_call
from cocodiff.cli.start import first_line
from cocodiff.errors import CocodiffError, ConfigError

NEEDED = {"WanImageToVideoPipeline": ("ftfy",)}  # packages that diffusers uses there without asking for them
# Names of errors, of whatever HTTP library the hub's client uses, that mean: no answer, and no file in the cache.
UNREACHABLE = {
    "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError", "Timeout", "gaierror",
}  # fmt: skip
# A tiny pipeline of video would draw the released model's 81 frames of 480 x 832.
TINY_CLIP = {"height": 64, "width": 64, "num_frames": 17}


def pipeline_class(request: Request) -> type:
    """Return the diffusers class that will draw, before any weights are loaded.

    Of a released model it is what its model_index.json names, which is fetched if the model is a hub id, or the class
    of diffusers for the same model that starts from a picture.

    Raises:
        ConfigError: there is no such model, it has no such class, or cocodiff does not support it.
    """
    import diffusers

    from cocodiff.models import family_named, family_of

    if request.is_tiny:
        tasks = family_named(_family(request)).part("small").SMALL.tasks
        task = _tiny_task(request, tasks)
        if task not in tasks:
            raise ConfigError(f"--model {request.model}: there is none for {_options(request)}.")
        return getattr(diffusers, tasks[task])
    with _as_config_error(request.model):
        index = diffusers.DiffusionPipeline.load_config(request.model)
    name = index.get("_class_name") if isinstance(index, dict) else None
    found = getattr(diffusers, str(name), None)
    if not isinstance(found, type):
        raise ConfigError(f"--model {request.model}: its model_index.json names no pipeline of diffusers ({name}).")
    if request.image is not None and not {"image", "mask_image"} & _parameters(found).keys():
        found = _class_for_pictures(found, request)
    elif request.mask is not None and "mask_image" not in _parameters(found):
        found = _class_for_pictures(found, request)
    try:
        family_of(found)
    except ConfigError as error:
        raise ConfigError(f"--model {request.model}: {error}") from None
    return found


def _family(request: Request) -> str:
    return request.model.removeprefix("tiny").removeprefix(":") or "flux"


def _tiny_task(request: Request, tasks: Any) -> str:
    if "text2video" in tasks:
        return {"text2image": "text2video", "img2img": "image2video"}.get(request.task, request.task)
    return request.task


def _options(request: Request) -> str:
    return "--image and --mask" if request.mask is not None else "--image"


def _class_for_pictures(found: type, request: Request) -> type:
    """The class of the same model for image to image, or for inpainting."""
    from diffusers.pipelines import auto_pipeline as auto

    wanted = (
        auto.AUTO_INPAINT_PIPELINES_MAPPING if request.mask is not None else auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
    )
    for known in (auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING):
        for model, one in known.items():
            if one is found and model in wanted:
                return wanted[model]
    raise ConfigError(f"--model {request.model}: {found.__name__} takes no {_options(request)}.")


def _parameters(found: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(found.__call__).parameters)


def check_class(request: Request, found: type) -> bool:
    """Raise ConfigError unless the class takes what was given. Return whether it draws clips."""
    given = dict(request.call)
    given |= {name: path for name, path in (("image", request.image), ("mask_image", request.mask)) if path}
    parameters = _parameters(found)
    if request.model == "tiny:qwen" and "" in (request.prompt, request.negative_prompt):
        raise ConfigError("--model tiny:qwen makes no token of an empty text, and cannot attend to none. Write ' '.")
    for package in NEEDED.get(found.__name__, ()):
        if find_spec(package) is None:
            raise ConfigError(f"{found.__name__} needs {package}: pip install 'cocodiff[video]'.")
    check_call(found.__name__, parameters, given)
    return "num_frames" in parameters


def load(request: Request, found: Any) -> Any:
    """Return the pipeline on the CPU. ConfigError with the reason in one line if it cannot be loaded."""
    import torch

    if request.is_tiny:
        from cocodiff.models.small import tiny_pipeline

        family = _family(request)
        tasks = {name: task for task, name in _tasks(family).items()}
        return tiny_pipeline(family, tasks[found.__name__])
    with _as_config_error(request.model):
        return found.from_pretrained(request.model, dtype=getattr(torch, request.dtype_name))


def _tasks(family: str) -> dict[str, str]:
    from cocodiff.models import family_named

    return dict(family_named(family).part("small").SMALL.tasks)


@contextmanager
def _as_config_error(model: str) -> Iterator[None]:
    """While inside, errors of libraries become a ConfigError in one line; the original is its cause."""
    try:
        yield
    except CocodiffError:
        raise
    except Exception as error:
        words = None if exists(Path(model)) else _of_the_hub(error, model)
        words = words or f"cannot be loaded ({type(error).__name__}: {first_line(error).rstrip('.')})"
        raise ConfigError(f"--model {model}: {words}. --verbose says more.") from error


def _of_the_hub(error: BaseException, model: str) -> str | None:
    """Return what is wrong, with the cure, if an error began in the hub's client; diffusers blames a missing file."""
    from huggingface_hub import constants

    names: set[str] = set()
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        names |= {base.__name__ for base in type(one).__mro__}
        one = one.__cause__ or one.__context__
    download = f"hf download {model}"
    if "GatedRepoError" in names:
        return (
            f"the model is gated. Accept its terms at https://huggingface.co/{model}, then: hf auth login && {download}"
        )
    if not names & UNREACHABLE:
        return None
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    return (
        f"{why}, and the model is not, or not wholly, in the cache (HF_HOME={constants.HF_HOME}). Where there is "
        f"internet, download it first: {download}"
    )


def check_sizes(request: Request, pipe: Any, call: dict[str, Any]) -> None:
    """Raise ConfigError for sizes that the model cannot draw, and for guidance that it ignores.

    diffusers would round sizes with a warning on each rank, or fail inside of a forward.
    """
    if "guidance_scale" in call and _ignores_guidance(pipe):
        true = "true_cfg_scale" in _parameters(pipe)
        cure = f"Leave it out{', or give --true-cfg with --negative-prompt' if true else ''}."
        raise ConfigError(f"--guidance: this model was distilled without guidance and would ignore it. {cure}")
    multiple, most = pixel_steps(pipe)
    for name in ("height", "width"):
        if name in call:
            _check_multiple(OPTIONS[name], call[name], multiple, 0, "px", most)
    if "num_frames" in call:
        frames = getattr(pipe, "vae_scale_factor_temporal", 1)
        _check_multiple(OPTIONS["num_frames"], call["num_frames"], frames, 1, "frames", None)


def _ignores_guidance(pipe: Any) -> bool:
    embedded = getattr(pipe.transformer.config, "guidance_embeds", None)
    if "true_cfg_scale" in _parameters(pipe):  # guidance_scale is an input of the transformer there
        return embedded is False
    return bool(getattr(pipe.config, "is_distilled", False))


def pixel_steps(pipe: Any) -> tuple[int, int | None]:
    """Return the number of pixels that sides are multiples of, and the longest side; None where there is no limit."""
    config = pipe.transformer.config
    pixels = getattr(pipe, "vae_scale_factor_spatial", None) or pipe.vae_scale_factor
    patch = getattr(config, "patch_size", None) or 1
    # FLUX.1, FLUX.2 and Qwen-Image put 2 x 2 latents into a token besides.
    multiple = pixels * max(2, patch if isinstance(patch, int) else patch[-1])
    tokens = getattr(config, "pos_embed_max_size", None) or getattr(config, "rope_max_seq_len", None)
    return multiple, None if tokens is None else tokens * multiple


def _check_multiple(option: str, value: int, step: int, rest: int, unit: str, most: int | None) -> None:
    if value % step != rest % step:
        below = (value - rest) // step * step + rest
        near = f"{below} or {below + step}" if below > 0 else f"{below + step}"
        kind = f"a multiple of {step}" if rest == 0 else f"{rest} more than a multiple of {step}"
        raise ConfigError(f"{option} {value}: this model draws {unit} in {kind}. Use {near}.")
    if most is not None and value > most:
        raise ConfigError(f"{option} {value}: this model draws at most {most} {unit}.")
