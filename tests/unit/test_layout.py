"""Layouts and staged plans, without communication: every round trip is exact for any ranks, levels, heads, tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cocodiff.errors import ConfigError
from cocodiff.kernels import pack_heads, pack_rows, unpack_heads, unpack_rows
from cocodiff.parallel.layout import (
    Layout,
    digits,
    level_groups,
    split_sizes,
    staged_order,
    staged_plan,
    to_heads_traffic,
    to_sequence_traffic,
)
from cocodiff.parallel.tokens import Tokens

LEVELS = st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda sizes: math.prod(sizes) <= 24)


@st.composite
def cases(draw):
    sizes = tuple(draw(LEVELS))
    ranks = math.prod(sizes)
    heads = draw(st.integers(ranks, ranks + 9))
    seq_lens = tuple(draw(st.lists(st.integers(1, 5), min_size=ranks, max_size=ranks)))
    return sizes, Layout(seq_lens, split_sizes(heads, ranks)), draw(st.integers(1, 3)), draw(st.integers(1, 4))


def all_to_all(sends, splits):
    """What `all_to_all_single` does, for all ranks at once: sends[i] cut by splits[i] goes to rank j = 0, 1, ..."""
    parts = [send.split(list(split)) for send, split in zip(sends, splits, strict=True)]
    return [torch.cat([parts[i][j] for i in range(len(sends))]) for j in range(len(sends))]


def exchange(sends, traffic, sizes, staged, reorder=True):
    """Deliver every rank's packed buffer, flat or by the staged plan of every rank."""
    ranks = range(len(sends))
    if not staged:
        return all_to_all(sends, [[traffic.block(src, dst) for dst in ranks] for src in ranks])
    plans, buffers = [staged_plan(traffic, sizes, rank) for rank in ranks], list(sends)
    for index in range(len(plans[0])):
        stages = [plan[index] for plan in plans]
        for rank, stage in enumerate(stages):
            if stage.gather is not None and reorder:
                buffers[rank] = torch.cat([buffers[rank][a : a + n] for a, n in stage.gather])
        for group in level_groups(sizes, stages[0].level):
            received = all_to_all([buffers[r] for r in group], [stages[r].send_splits for r in group])
            for rank, buffer in zip(group, received, strict=True):
                assert buffer.numel() == sum(stages[rank].recv_splits)
                buffers[rank] = buffer
    return buffers


@settings(max_examples=300, deadline=None)
@given(cases(), st.booleans())
def test_round_trip_is_exact(case, staged):
    sizes, layout, batch, head_dim = case
    ranks, heads = len(layout.seq_lens), sum(layout.num_heads)
    whole = torch.randn(batch, sum(layout.seq_lens), heads, head_dim)
    order = staged_order(sizes) if staged else tuple(range(ranks))
    shards = whole.split(list(layout.seq_lens), dim=1)

    sends = [pack_heads(shard, layout.num_heads, order) for shard in shards]
    received = exchange(sends, to_heads_traffic(layout, batch, head_dim), sizes, staged)
    wanted = whole.split(list(layout.num_heads), dim=2)
    by_heads = [unpack_heads(r, batch, n, head_dim) for r, n in zip(received, layout.num_heads, strict=True)]
    for rank in range(ranks):
        assert torch.equal(by_heads[rank], wanted[rank])

    sends = [pack_rows(x, layout.seq_lens, order) for x in by_heads]
    received = exchange(sends, to_sequence_traffic(layout, batch, head_dim), sizes, staged)
    for rank in range(ranks):
        assert torch.equal(unpack_rows(received[rank], batch, layout.num_heads, head_dim), shards[rank].flatten(2))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_without_the_reordering_between_stages_blocks_go_astray(case):
    sizes, layout, batch, head_dim = case
    if sum(size > 1 for size in sizes) < 2:
        return
    shards = torch.randn(batch, sum(layout.seq_lens), sum(layout.num_heads), head_dim).split(list(layout.seq_lens), 1)
    sends = [pack_heads(shard, layout.num_heads, staged_order(sizes)) for shard in shards]
    traffic = to_heads_traffic(layout, batch, head_dim)
    right = exchange(sends, traffic, sizes, staged=True)
    wrong = exchange(sends, traffic, sizes, staged=True, reorder=False)
    assert any(not torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


@given(cases(), st.integers(1, 5))
def test_pieces_cover_every_row_once_and_agree_between_ranks(case, count):
    _, layout, _, _ = case
    for rank, seq_len in enumerate(layout.seq_lens):
        pieces = layout.pieces(rank, count)
        rows = [row for piece, _ in pieces for row in range(seq_len)[piece]]
        assert rows == list(range(seq_len))
        assert all(part.seq_lens[rank] == piece.stop - piece.start for piece, part in pieces)
        assert [part for _, part in pieces] == [part for _, part in layout.pieces(0, count)]


@given(st.integers(0, 200), st.integers(1, 24), st.booleans())
def test_split_sizes(total, parts, larger_last):
    sizes = split_sizes(total, parts, larger_last=larger_last)
    assert sum(sizes) == total and len(sizes) == parts and max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=not larger_last)


@given(st.integers(0, 50), st.integers(0, 300), st.integers(1, 24))
def test_tokens_are_balanced_and_complete(text, image, ranks):
    if text + image < ranks:
        with pytest.raises(ConfigError, match=f"{text} text .* {image} image"):
            Tokens.split({"text": text, "image": image}, ranks)
        return
    tokens = Tokens.split({"text": text, "image": image}, ranks)
    assert max(tokens.joint) - min(tokens.joint) <= 1
    for stream, length in (("text", text), ("image", image)):
        rows = [row for rank in range(ranks) for row in range(length)[tokens.rows(stream, rank)]]
        assert rows == list(range(length))


@given(LEVELS)
def test_level_groups_partition_the_ranks(sizes):
    ranks = set(range(math.prod(sizes)))
    for level in range(len(sizes)):
        groups = level_groups(sizes, level)
        assert sorted(rank for group in groups for rank in group) == sorted(ranks)
        for group in groups:
            assert [digits(rank, sizes)[level] for rank in group] == list(range(sizes[level]))
