"""Fingerprints of weights: any bit counts, nothing is hashed twice, and what is no plain tensor is said."""

import pytest
import torch
from torch import nn

from cocodiff.pipeline import weights
from cocodiff.pipeline.weights import Fingerprints


def _module(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(37, 11), nn.LayerNorm(11), nn.Linear(11, 3, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_weights_are_equal_and_any_bit_counts(dtype):
    module = _module(dtype)
    first = Fingerprints().of("m", module)
    assert first == Fingerprints().of("m", _module(dtype)) and first != Fingerprints().of("m", _module(dtype, seed=1))
    for parameter in module.parameters():
        for index in (0, parameter.numel() // 2, parameter.numel() - 1):
            bits = parameter.data.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
            bits[index] ^= 1
            assert Fingerprints().of("m", module)["weights of m"] != first["weights of m"]
            bits[index] ^= 1
    assert Fingerprints().of("m", module) == first


def test_the_order_of_elements_counts_and_that_of_chunks(monkeypatch):
    monkeypatch.setattr(weights, "_WORDS", 16)
    module = nn.Linear(64, 8, bias=False)
    seen = {Fingerprints().of("m", module)["weights of m"]}
    data = module.weight.data
    for one, other in ((0, 1), (0, 32), (3, 511)):
        swapped = data.clone().view(-1)
        swapped[[one, other]] = swapped[[other, one]]
        module.weight.data = swapped.view_as(data)
        seen.add(Fingerprints().of("m", module)["weights of m"])
    assert len(seen) == 4


def test_views_that_are_not_aligned_and_odd_sizes():
    flat = torch.randn(101)
    for start in range(5):
        own, view = nn.Linear(7, 3, bias=False), nn.Linear(7, 3, bias=False)
        own.weight.data = flat[start : start + 21].clone().view(3, 7)
        view.weight.data = flat[start : start + 21].view(3, 7)
        assert Fingerprints().of("m", own) == Fingerprints().of("m", view)


def test_what_is_known_is_not_hashed_again_until_it_is_written_to(monkeypatch):
    hashed, right = [], weights._sum_of_bits
    monkeypatch.setattr(weights, "_sum_of_bits", lambda x, factors: hashed.append(x.shape) or right(x, factors))
    module, fingerprints = _module(), Fingerprints()
    first = fingerprints.of("m", module)
    assert len(hashed) == 5 and fingerprints.of("m", module) == first and len(hashed) == 5
    with torch.no_grad():
        module[0].weight.add_(1)
    assert fingerprints.of("m", module) != first and len(hashed) == 6
    module[2] = nn.Linear(11, 3, bias=False)
    fingerprints.of("m", module)
    assert len(hashed) == 7


class _Quantised(torch.Tensor):
    """Like torchao's: it cannot be viewed as bytes."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("view", "flatten", "contiguous"):
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_what_is_no_plain_tensor_is_left_out_and_counted():
    module, fingerprints = _module(), Fingerprints()
    module[0].weight = nn.Parameter(torch.randn(11, 37).as_subclass(_Quantised), requires_grad=False)
    module[2].weight = nn.Parameter(torch.empty(3, 11, device="meta"))
    found = fingerprints.of("m", module)
    assert fingerprints.left_out == {"m": 2}
    module[0].weight = nn.Parameter(torch.randn(12, 37).as_subclass(_Quantised), requires_grad=False)
    assert fingerprints.of("m", module)["parameters of m"] != found["parameters of m"]
