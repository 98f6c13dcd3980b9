"""Kernels in every dtype against float64, attention over nothing, and which kernels are believed."""

import logging

import pytest
import torch
from diffusers.models.normalization import RMSNorm

from cocodiff.kernels import (
    attend_partial,
    attend_partial_reference,
    merge_partial,
    pack_heads,
    pack_rows,
    partial,
    rotate_pairs,
    unpack_heads,
    unpack_rows,
)
from cocodiff.models.stages import norm_heads

# Relative to the norm: half a unit of a dtype's last place for what is rounded once, a few for more.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def unasked():
    """No kernel was asked before, nor is what this test's kernels said kept."""
    partial._agrees.cache_clear()
    yield
    partial._agrees.cache_clear()


@DTYPES
def test_rotation_rounds_once(dtype):
    x, angles = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(5, 4).repeat_interleave(2, dim=1)
    wide, cos, sin = x.double(), angles.cos().double()[None, :, None], angles.sin().double()[None, :, None]
    turned = torch.stack([-wide[..., 1::2], wide[..., 0::2]], dim=-1).flatten(-2)
    got = rotate_pairs(x, angles.cos(), angles.sin())
    assert got.dtype == dtype and error(got, wide * cos + turned * sin) < 2 * ROUNDING[dtype]


@DTYPES
def test_norm_of_heads(dtype):
    attn = torch.nn.Module()
    attn.norm_q = RMSNorm(8, eps=1e-6)
    attn.norm_q.weight.data.normal_()
    attn.to(dtype)
    x = (300 * torch.randn(2, 5, 3, 8)).to(dtype)  # squares are beyond what float16 holds
    wide = x.double()
    wanted = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * attn.norm_q.weight.double()
    got = norm_heads(attn, "q", x)
    assert got.dtype == dtype and error(got, wanted) < 4 * ROUNDING[dtype]


@DTYPES
def test_packing_moves_elements_as_they_are(dtype):
    heads, lengths = [2, 1, 3], [4, 0, 3]
    x = torch.randn(2, 4, 6, 5).to(dtype)
    parts = pack_heads(x, heads, [2, 0, 1]).split([2 * 4 * heads[rank] * 5 for rank in (2, 0, 1)])
    for rank, part in zip((2, 0, 1), parts, strict=True):
        start = sum(heads[:rank])
        assert torch.equal(unpack_heads(part, 2, heads[rank], 5), x[:, :, start : start + heads[rank]])
    whole = torch.randn(2, 7, 6, 5).to(dtype)
    sent = [pack_rows(one, lengths, [0, 1, 2]) for one in whole.split(heads, dim=2)]
    sizes = [[2 * length * count * 5 for length in lengths] for count in heads]
    arrived = torch.cat([one.split(several)[0] for one, several in zip(sent, sizes, strict=True)])
    assert torch.equal(unpack_rows(arrived, 2, heads, 5), whole[:, :4].flatten(2))


@DTYPES
@pytest.mark.parametrize("head_dim", [8, 20, 64])
def test_attention_in_parts(dtype, head_dim):
    query, key, value = (torch.randn(2, length, 3, head_dim).to(dtype) for length in (7, 20, 20))
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * head_dim**-0.5
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double())
    here, there = (attend_partial(query, key[:, rows], value[:, rows]) for rows in (slice(0, 6), slice(6, 20)))
    merged, sums = merge_partial(here, there)
    assert error(merged, wanted) < 8 * ROUNDING[dtype]
    assert (sums[..., 0] - scores.logsumexp(-1).transpose(1, 2)).abs().max() < 8 * ROUNDING[dtype]


@pytest.mark.parametrize("attend", [attend_partial, attend_partial_reference])
def test_parts_without_keys_or_queries(attend):
    """A part of the sequence may have no token of the image, which some attention is over alone."""
    query, key, value = (torch.randn(1, length, 2, 8) for length in (3, 5, 5))
    none = slice(0, 0)
    empty, whole = attend(query, key[:, none], value[:, none]), attend(query, key, value)
    for merged in (
        merge_partial(empty, whole),
        merge_partial(whole, empty),
        merge_partial(merge_partial(empty, empty), whole),
    ):
        assert torch.equal(merged[0], whole[0]) and torch.equal(merged[1], whole[1])
    out, sums = attend(query[:, none], key, value)
    assert out.shape == (1, 0, 2, 8) and sums.shape == (1, 0, 2, 1)


def test_control_no_keys_must_not_weigh():
    query, key, value = (torch.randn(1, length, 2, 8) for length in (3, 5, 5))
    whole = attend_partial(query, key, value)
    out, sums = merge_partial((torch.zeros_like(whole[0]), torch.zeros_like(whole[1])), whole)
    assert not torch.allclose(out, whole[0])


def test_autocast_attends_in_its_own_dtype():
    """As scaled_dot_product_attention does; what arrives may be float32 keys and bfloat16 values."""
    query, key, value = torch.randn(1, 6, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8).bfloat16()
    rounded = [x.bfloat16() for x in (query, key, value)]
    wanted = attend_partial(*rounded)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend_partial(query, key, value)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        reference = attend_partial_reference(*rounded)  # in float32, whatever autocast does to matrix products
    exact = attend_partial_reference(*rounded)
    assert torch.equal(reference[0], exact[0]) and torch.equal(reference[1], exact[1])


def base_2(q, k, v, bias):
    out, sums = partial._flash_on_cpu(q, k, v, bias)
    return out, sums / torch.log(torch.tensor(2.0))


def without_sums(q, k, v, bias):
    out, sums = partial._flash_on_cpu(q, k, v, bias)
    return out, sums.new_empty(0)


def unscaled(q, k, v, bias):
    return partial._flash_on_cpu(q * q.shape[-1] ** 0.5, k, v, bias)


def blind_to_masks(q, k, v, bias):
    return partial._flash_on_cpu(q, k, v, None)


def missing(q, k, v, bias):
    raise NotImplementedError("no such kernel")


@DTYPES
@pytest.mark.parametrize("masked", [False, True])
def test_the_device_s_own_kernel_is_believed(dtype, masked, unasked):
    assert partial._agrees(partial._flash_on_cpu, torch.device("cpu"), dtype, 64, masked)


@pytest.mark.parametrize(
    "kernel", [base_2, without_sums, unscaled, blind_to_masks, missing], ids=lambda one: one.__name__
)
def test_a_kernel_that_gives_something_else_is_not_believed(kernel, monkeypatch, caplog, unasked):
    asked = []

    def recorded(*args):
        asked.append(args[0].shape)
        return kernel(*args)

    recorded.__name__ = kernel.__name__
    monkeypatch.setattr(partial, "_kernels", lambda query, masked: (recorded,))
    query, key, value = (torch.randn(1, length, 2, 8) for length in (300, 5, 5))
    mask = torch.tensor([True, False, True, True, False]).view(1, 1, 1, 5)
    wanted = attend_partial_reference(query, key, value, mask)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            got = attend_partial(query, key, value, mask)
            assert torch.allclose(got[0], wanted[0]) and torch.allclose(got[1], wanted[1])
    assert len(asked) == 1, "asked once, and never for the real tensors"
    assert len(caplog.records) == 1 and kernel.__name__ in caplog.text


def test_the_next_kernel_is_asked(monkeypatch, unasked):
    monkeypatch.setattr(partial, "_kernels", lambda query, masked: (missing, partial._flash_on_cpu))
    query, key, value = (torch.randn(1, length, 2, 8) for length in (3, 5, 5))
    monkeypatch.setattr(partial, "attend_partial_reference", partial.attend_partial_reference)
    got = attend_partial(query, key, value)
    assert torch.allclose(got[0], attend_partial_reference(query, key, value)[0], atol=1e-5)


def test_running_out_of_memory_says_nothing_of_a_kernel(unasked):
    tries = []

    def scarce(q, k, v, bias):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("on purpose")
        return partial._flash_on_cpu(q, k, v, bias)

    asked = (scarce, torch.device("cpu"), torch.float32, 8, False)
    with pytest.raises(torch.OutOfMemoryError):
        partial._agrees(*asked)
    assert partial._agrees(*asked)
