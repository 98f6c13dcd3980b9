"""Sequence shards <-> head shards over a group of ranks: exact, with uneven tokens and heads."""

from cocodiff.exchange.flat import FlatExchange
from cocodiff.exchange.ring import Ring
from cocodiff.exchange.staged import StagedExchange
from cocodiff.exchange.ulysses import Exchange, Pending, to_heads, to_sequence

__all__ = ["Exchange", "FlatExchange", "Pending", "Ring", "StagedExchange", "to_heads", "to_sequence"]
