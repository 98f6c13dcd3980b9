"""Sequence shards <-> head shards over a group of ranks: exact, with uneven tokens and heads."""

from cocodiff.exchange.flat import FlatExchange
from cocodiff.exchange.ring import Ring
from cocodiff.exchange.staged import StagedExchange
from cocodiff.exchange.ulysses import Exchange, Pending, gather_equal, gather_rows, to_heads, to_sequence
from cocodiff.parallel.layout import Layout, split_sizes

__all__ = [
    "Exchange",
    "FlatExchange",
    "Layout",
    "Pending",
    "Ring",
    "StagedExchange",
    "gather_equal",
    "gather_rows",
    "split_sizes",
    "to_heads",
    "to_sequence",
]
