"""Codes of rows: sizes, errors, packing, and what must be exact so that two ends agree."""

import pytest
import torch

from cocodiff.kernels.codes import BITS, decode, encode, pack_mask, payload_bytes, unpack_mask

# Distortion of even quantisers of Gaussian numbers (Max 1960), and of one bit, with 3 % for scales and finite rows.
DISTORTION = {1: 0.3634 * 1.03, 2: 0.1188 * 1.03, 4: 0.01154 * 1.03, 8: 3e-4}


def _round_trip(x, bits):
    payload = encode(x, bits)
    assert payload.shape == (len(x), payload_bytes(x.shape[1], bits)) and payload.dtype == torch.uint8
    levels, steps = decode(payload, x.shape[1], bits)
    return levels * steps


@pytest.mark.parametrize("bits", BITS)
def test_gaussian_rows_lose_what_theory_says(bits):
    x = torch.randn(400, 128) * torch.logspace(-4, 3, 400)[:, None]  # every row has a scale of its own
    lost = ((_round_trip(x, bits) - x).norm(dim=1) / x.norm(dim=1)).square().mean()
    assert lost < DISTORTION[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 3, 37, 48])
def test_packing_is_what_one_code_at_a_time_would_give(bits, width):
    x = torch.randn(7, width)
    payload = encode(x, bits)
    levels, steps = decode(payload, width, bits)
    for row in range(7):
        for column in range(width):
            place = column * bits
            byte = int(payload[row, 1 + place // 8])
            code = byte >> place % 8 & 2**bits - 1
            assert levels[row, column] == code - (2 ** (bits - 1) - 0.5)
            nearest = (x[row, column] / steps[row, 0] - levels[row, column]).abs()
            assert nearest <= 0.51 or abs(levels[row, column]) == 2 ** (bits - 1) - 0.5


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zero_and_broken_rows_stay_broken(bits):
    x = torch.randn(4, 24)
    x[0], x[1, 3], x[2, 5] = 0.0, torch.nan, torch.inf
    y = _round_trip(x, bits)
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isnan().all() and y[3].isfinite().all()
    assert encode(x[:0], bits).shape == (0, payload_bytes(24, bits))


@pytest.mark.parametrize("bits", BITS)
def test_products_are_exact_in_float32_so_that_no_fusing_changes_a_bit(bits):
    payload = torch.randint(0, 255, (500, payload_bytes(16, bits)), dtype=torch.uint8)
    levels, steps = decode(payload, 16, bits)
    assert ((levels * steps).double() == levels.double() * steps.double()).all()


@pytest.mark.parametrize("rows", [1, 8, 13, 100])
def test_masks(rows):
    mask = torch.rand(rows) < 0.3
    packed = pack_mask(mask)
    assert len(packed) == -(-rows // 8) and (unpack_mask(packed, rows) == mask).all()
