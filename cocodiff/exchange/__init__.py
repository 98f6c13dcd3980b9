"""Sequence shards <-> head shards over a group of ranks: exact, with uneven tokens and heads."""

from cocodiff.exchange.flat import FlatExchange
from cocodiff.exchange.layout import Layout, split_sizes
from cocodiff.exchange.ring import Ring
from cocodiff.exchange.selective import SelectiveExchange
from cocodiff.exchange.selective_ring import SelectiveRing
from cocodiff.exchange.staged import StagedExchange
from cocodiff.exchange.ulysses import Exchange, Pending, gather_equal, gather_rows, to_heads, to_sequence

__all__ = [
    "Exchange",
    "FlatExchange",
    "Layout",
    "Pending",
    "Ring",
    "SelectiveExchange",
    "SelectiveRing",
    "StagedExchange",
    "gather_equal",
    "gather_rows",
    "split_sizes",
    "to_heads",
    "to_sequence",
]
