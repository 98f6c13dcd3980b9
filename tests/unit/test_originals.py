"""Functions of diffusers and what it stands on are told from those of others, through all that wraps them."""

import functools

import diffusers
import torch
from torch import nn

from cocodiff.compat import Originals
from tests.pipelines import flux_pipeline


def _mine(self, x):
    return x


class _Callable:
    def __call__(self, x):
        return x


def test_all_of_a_plain_model_is_original():
    originals = Originals()
    for module in flux_pipeline().transformer.modules():
        assert originals.foreign(type(module).forward) is None, type(module)
    assert originals.foreign(functools.partial(nn.Linear(1, 1).forward)) is None
    assert originals.foreign(torch.no_grad()(nn.Linear.forward)) is None


def test_what_others_wrote_is_named_through_wrappers():
    originals, forward = Originals(), diffusers.FluxTransformer2DModel.forward
    disguised = functools.wraps(forward)(lambda self, x: forward(self, x))
    below = functools.update_wrapper(functools.partial(forward), _mine)  # a partial of theirs that stands for ours
    for function in (
        _mine,
        disguised,
        functools.partial(_mine),
        _mine.__get__(1),
        _Callable(),
        below,
        torch.no_grad()(_mine),
    ):
        assert __file__ in originals.foreign(function), function
