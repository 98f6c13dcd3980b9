"""Degrees, axes and partial attention: numbers alone."""

import itertools

import pytest
import torch

from cocodiff.errors import ConfigError
from cocodiff.kernels import attend_partial, attend_partial_reference, merge_partial
from cocodiff.parallel.layout import axis_sizes, outer_difference
from cocodiff.planner import choose_degrees, outward_bytes
from cocodiff.topology import Cluster, Level


def cluster(*sizes):
    return Cluster("test", tuple(Level(f"level {i}", size, 1.0, 1.0) for i, size in enumerate(sizes)))


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (2, 3, 4), (3, 2), (2, 1, 4)])
def test_an_axis_has_all_its_ranks_and_crosses_the_level_it_says(sizes):
    ranks = torch.Size(sizes).numel()
    for stride, size in itertools.product(range(1, ranks + 1), repeat=2):
        if ranks % (stride * size):
            continue
        found = axis_sizes(sizes, stride, size)
        assert torch.Size(found).numel() == size
        starts = [rank for rank in range(ranks) if rank // stride % size == 0]
        if size > 1:
            crossed = max(outer_difference(start, start + stride * (size - 1), sizes) for start in starts)
            assert max(level for level, one in enumerate(found) if one > 1) == crossed


def test_of_equals_long_sequences_take_the_ring():
    for long, chosen in ((False, (1, 8)), (True, (2, 4))):
        degrees = choose_degrees(cluster(4, 2), 8, long=long)
        assert (degrees.ring, degrees.ulysses) == chosen


@pytest.mark.parametrize(
    ("sizes", "heads", "given", "chosen"),
    [
        ((12,), 24, {}, (1, 1, 12)),  # one node: ulysses alone
        ((12, 4), 24, {}, (1, 2, 24)),  # 48 ranks, 24 heads
        ((12, 8), 24, {}, (1, 4, 24)),
        ((4, 4), 16, {}, (1, 1, 16)),  # four nodes: heads allow it, and it sends half of what a ring would
        ((8,), 4, {}, (1, 2, 4)),  # ranks = 2 x heads
        ((6,), 4, {}, (1, 2, 3)),
        ((7,), 4, {}, (1, 7, 1)),
        ((4, 2), 8, {"cfg_degree": 2}, (2, 1, 4)),
        ((4, 2), 8, {"ring_degree": 4}, (1, 4, 2)),
        ((4, 2), 8, {"ring_degree": 2, "cfg_degree": 2}, (2, 2, 2)),
        ((4, 2), 8, {"ulysses_degree": 8}, (1, 1, 8)),
    ],
)
def test_degrees_left_out_follow_the_rule(sizes, heads, given, chosen):
    arguments = {name.removesuffix("_degree"): degree for name, degree in given.items()}
    degrees = choose_degrees(cluster(*sizes), heads, **arguments)
    assert (degrees.cfg, degrees.ring, degrees.ulysses) == chosen and degrees.reason


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cfg": 3}, "1 or 2"),
        ({"ring": 5}, "ring_degree 5 on 8 ranks"),
        ({"cfg": 2, "ring": 2, "ulysses": 4}, "cfg_degree 2 x ring_degree 2 x ulysses_degree 4 on 8 ranks"),
        ({"ulysses": 8}, "4 attention heads cannot be shared among 8 ranks"),
    ],
)
def test_degrees_that_cannot_be_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        choose_degrees(cluster(4, 2), 4, **given)


def test_bytes_outward_are_those_of_theory():
    """Of a layer, per rank, in units of one tensor's shard: ulysses 4 (1 - 1/G), ring 2 (G - 1) over G nodes."""
    for nodes in (2, 3, 4):
        assert outward_bytes(cluster(4, nodes), 1, 1, 4 * nodes) == pytest.approx(4 * (1 - 1 / nodes))
        assert outward_bytes(cluster(4, nodes), 1, nodes, 4) == pytest.approx(2 * (nodes - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_attention_merge_to_the_whole(dtype, masked):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, length, 3, 12).to(dtype) for length in (7, 20, 20))
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, 20) > 0.4
        mask[0, ..., :6] = False  # one batch entry has no key in the first part
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (query, key, value)), attn_mask=mask
    ).transpose(1, 2)
    for attend in (attend_partial, attend_partial_reference):
        merged = None
        for rows in (slice(0, 6), slice(6, 7), slice(7, 20)):
            part = attend(query, key[:, rows], value[:, rows], None if mask is None else mask[..., rows])
            assert part[0].dtype == part[1].dtype == torch.float32
            merged = part if merged is None else merge_partial(merged, part)
        error = (merged[0].double() - whole).norm() / whole.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2)
