"""A mask is put into the order of the exchange once in a forward, not once in a layer."""

from types import SimpleNamespace

import torch

from cocodiff.layer import LayerInFlight
from cocodiff.models.qwen.layers import mask
from cocodiff.parallel.layout import Layout
from cocodiff.parallel.tokens import Tokens

VALID = torch.tensor([[True, True, False], [True, False, False]])


def layer_of(tokens, valid, count=2):
    """A layer on a ring of two parts of two ranks, in pieces."""
    made = LayerInFlight.__new__(LayerInFlight)
    made.state = SimpleNamespace(part=0, tokens=tokens)
    made.layer = SimpleNamespace(mask=mask(tokens, {"encoder_hidden_states_mask": valid}))
    made.layouts = [Layout(tokens.joint[start : start + 2], (1, 1)) for start in (0, 2)]
    made.parts, made.pieces = [None, None], [None] * count
    return made


def masks_of(layer):
    return [layer.key_mask(0), *(layer.key_mask(1, slice(piece, piece + 1)) for piece in range(len(layer.pieces)))]


def test_all_layers_of_a_forward_share_the_reordered_masks(monkeypatch):
    asked, exchanged = [], Tokens.exchanged
    monkeypatch.setattr(Tokens, "exchanged", lambda *args: asked.append(1) or exchanged(*args))
    tokens = Tokens.split({"text": 3, "image": 9}, 4)
    first = masks_of(layer_of(tokens, VALID))
    for _ in range(5):
        for again, before in zip(masks_of(layer_of(tokens, VALID)), first, strict=True):
            assert again is before
    assert len(asked) == 3
    for fresh, before in zip(masks_of(layer_of(Tokens.split({"text": 3, "image": 9}, 4), VALID)), first, strict=True):
        assert torch.equal(fresh, before) and fresh is not before  # of another forward
    assert torch.cat(first[1:], dim=-1).shape == (2, 1, 1, 6)


def test_another_mask_or_another_cut_is_not_taken_for_it():
    tokens = Tokens.split({"text": 3, "image": 9}, 4)
    whole, cut = layer_of(tokens, VALID, count=1).key_mask(0), layer_of(tokens, VALID, count=2).key_mask(0)
    other = layer_of(tokens, ~VALID, count=1).key_mask(0)
    assert not torch.equal(whole, other)
    assert whole.sum() == cut.sum() and whole.data_ptr() != cut.data_ptr()
    assert torch.equal(layer_of(tokens, VALID, count=1).key_mask(0), whole)
    assert tokens == Tokens.split({"text": 3, "image": 9}, 4)  # what was made is no part of what they are
