"""Model families: a folder each, found by the pipeline's class name."""

from __future__ import annotations

from cocodiff.errors import ConfigError
from cocodiff.models.family import Family
from cocodiff.models.flux.family import FLUX
from cocodiff.models.flux2.family import FLUX2
from cocodiff.models.qwen.family import QWEN
from cocodiff.models.sd3.family import SD3
from cocodiff.models.wan.family import WAN

__all__ = ["FAMILIES", "Family", "family_named", "family_of"]

FAMILIES = (FLUX, FLUX2, SD3, QWEN, WAN)


def family_of(pipeline_class: type) -> Family:
    """The family that serves a pipeline class or a subclass of one; ConfigError names what is supported."""
    for family in FAMILIES:
        for base in pipeline_class.__mro__:
            if base.__name__ in family.pipelines and base.__module__.startswith("diffusers."):
                return family
    supported = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise ConfigError(f"cocodiff cannot wrap {pipeline_class.__name__}. Supported pipelines: {supported}.")


def family_named(name: str) -> Family:
    """ValueError for a name that no family has."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"unknown family {name!r}; supported: {', '.join(family.name for family in FAMILIES)}")
