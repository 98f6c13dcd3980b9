"""What `cocodiff generate` was asked for, and the checks of it that need no model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocodiff.cli import files
from cocodiff.cli.start import counted, dtype_named
from cocodiff.config import DEGREES, Config
from cocodiff.errors import ConfigError
from cocodiff.topology import load_cluster

# Argument of a pipeline's call -> the option that gives it. `prompt` and the number of steps are always given.
OPTIONS: Mapping[str, str] = {
    "prompt": "--prompt",
    "num_inference_steps": "--steps",
    "negative_prompt": "--negative-prompt",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
    "height": "--height",
    "width": "--width",
    "num_frames": "--frames",
    "strength": "--strength",
    "image": "--image",
    "mask_image": "--mask",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of one `cocodiff generate`; None for what was left out."""

    prompt: str
    negative_prompt: str | None = None
    model: str = "tiny"
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int = 28
    seed: int = 0
    guidance: float | None = None
    true_cfg: float | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    out: Path = Path("out.png")
    ranks: int | None = None
    dtype: str = "bfloat16"
    device: str | None = None
    exchange: str = "auto"
    schedule: str = "v_first"
    cluster: str = "auto"
    transmission: str = "exact"
    cfg_degree: int | None = None
    ring_degree: int | None = None
    ulysses_degree: int | None = None
    trace: Path | None = None
    report: Path | None = None
    compare: bool = False
    verbose: bool = False

    @property
    def is_tiny(self) -> bool:
        return self.model.split(":")[0] == "tiny"

    @property
    def dtype_name(self) -> str:
        """The type of the weights, by torch's name. Tiny pipelines have float32 alone."""
        return "float32" if self.is_tiny else dtype_named(self.dtype or "bfloat16")

    @property
    def task(self) -> str:
        return "inpaint" if self.mask else "img2img" if self.image else "text2image"

    @property
    def config(self) -> Config:
        """How to run it. ConfigError for a setting that cannot be."""
        names = ("exchange", "schedule", "cluster", "transmission", *DEGREES)
        return Config(**{name: getattr(self, name) for name in names})

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that were given, but for the pictures."""
        given = {
            "prompt": self.prompt,
            "num_inference_steps": self.steps,
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance,
            "true_cfg_scale": self.true_cfg,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            # Inpainting draws what the prompt says; the pipelines' own 0.6 keeps much of what was there.
            "strength": 1.0 if self.strength is None and self.mask is not None else self.strength,
        }
        return {name: value for name, value in given.items() if value is not None}

    def check(self) -> None:
        """Raise ConfigError for what cannot work with any model: numbers, names, files and combinations of them.

        Files are looked at on this host.
        """
        config = self.config
        if self.dtype is not None:
            dtype_named(self.dtype)
        for option, number in (("--guidance", self.guidance), ("--true-cfg", self.true_cfg)):
            if number is not None and not (math.isfinite(number) and number >= 0):
                raise ConfigError(f"{option} {number} is not a number of at least 0.")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(f"--strength {self.strength} is not above 0 and at most 1.")
        if self.mask is not None and self.image is None:
            raise ConfigError("--mask: there is nothing to paint over. Give the picture with --image.")
        if self.strength is not None and self.image is None:
            raise ConfigError("--strength: there is no picture to change. Give one with --image.")
        _check_model_name(self.model)
        if self.ranks is not None:
            self.check_ranks(self.ranks)
        files.check_out(self.out)
        if self.report is not None:
            files.check_folder(self.report.parent, "--report")
            files.check_file(self.report, "--report")
        for option, path in (("--image", self.image), ("--mask", self.mask)):
            if path is not None:
                files.open_image(path, option)
        if config.cluster != "auto" and self.ranks is not None:
            load_cluster(config.cluster, ["host"] * self.ranks, "cpu")

    def check_ranks(self, ranks: int) -> None:
        """Raise ConfigError for what cannot work on this number of ranks."""
        if ranks == 1 and self.trace is not None:
            raise ConfigError("--trace: on one rank there are no lanes to record. Start more, such as --ranks 2.")
        degrees = {name: getattr(self, name) for name in DEGREES if getattr(self, name) is not None}
        product = math.prod(degrees.values())
        if product > ranks or ranks % product or (len(degrees) == len(DEGREES) and product != ranks):
            words = " x ".join(f"--{name.replace('_', '-')} {degree}" for name, degree in degrees.items())
            does, it = ("does", "it") if len(degrees) == 1 else ("do", "their product")
            must = "be" if len(degrees) == len(DEGREES) else "divide"
            raise ConfigError(f"{words} {does} not fit {counted(ranks)}: {it} must {must} that number.")


def _check_model_name(model: str) -> None:
    if not model or "\0" in model:
        raise ConfigError(f"--model {model!r} names no model: write tiny, a folder or a hub id (owner/name).")
    if model.split(":")[0] == "tiny":
        from cocodiff.models import FAMILIES

        names = [family.name for family in FAMILIES]
        if model != "tiny" and model.removeprefix("tiny:") not in names:
            known = ", ".join(f"tiny:{name}" for name in names)
            raise ConfigError(f"--model {model}: there is no such tiny model, only {known}.")
    elif not files.exists(Path(model)) and (model.count("/") != 1 or model[0] in "./~" or model[-1] == "/"):
        raise ConfigError(f"--model {model}: there is no such folder, and it is not a hub id (owner/name) either.")


def check_call(name: str, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a pipeline's call takes what was given, needs nothing else, and heeds it.

    Args:
        name: of the pipeline's class.
        parameters: of its call.
        given: arguments by the call's names.
    """
    unknown = [OPTIONS[one] for one in given if one not in parameters]
    if unknown:
        known = [option for one, option in OPTIONS.items() if one in parameters]
        raise ConfigError(f"{name} does not take {', '.join(unknown)}. It takes {', '.join(known)}.")
    missing = [
        OPTIONS.get(one, one)
        for one, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and one not in given
        and one != "self"
    ]
    if missing:
        raise ConfigError(f"{name} needs {', '.join(missing)}.")

    def used(argument: str) -> float:
        return given.get(argument, parameters[argument].default if argument in parameters else None) or 0.0

    scale = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    if "negative_prompt" in given and used(scale) <= 1:
        raise ConfigError(
            f"--negative-prompt: {name} heeds it only with {OPTIONS[scale]} above 1, which is {used(scale):g} here. "
            f"Give {OPTIONS[scale]} 4."
        )
    if "true_cfg_scale" in given and used("true_cfg_scale") > 1 and "negative_prompt" not in given:
        raise ConfigError(
            f"--true-cfg: {name} heeds it only with a negative prompt. Give --negative-prompt, such as ''."
        )
