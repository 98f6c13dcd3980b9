"""What cocodiff must know about a family of models: mostly data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cocodiff.engine import Engine
from cocodiff.patches import Patches


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        pipelines: diffusers pipeline classes that it covers.
        streams: the joint order of a rank's tokens.
        lengths: stream -> the argument of the transformer's forward that has its length in dim -2.
        split: argument of forward -> stream; tensors, or lists of them, cut along dim -2.
        refused: argument of forward, or entry of its attention kwargs -> why it cannot work yet.
        install: puts our processors and block forwards into one transformer; gives the attention modules they serve.
    """

    name: str
    pipelines: tuple[str, ...]
    streams: tuple[str, ...]
    lengths: Mapping[str, str]
    split: Mapping[str, str]
    install: Callable[[Engine, Any, Patches], list[nn.Module]]
    refused: Mapping[str, str] = field(default_factory=dict)
