"""Selective transmission in one process that plays both sides: every rank's attention, on one device.

Only what attention sees is changed: elements that would cross hosts come out of a codec, once as the sender's and once
as the receiver's. Codes, copies and schedule are those of a real run whose scheduler's times are evenly spaced.

Legend: B batch, S sequence, H heads, D head_dim, N ranks, W elements of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks.quality.methods import Method, comparison
from cocodiff.config import Selective
from cocodiff.parallel.tokens import Tokens
from cocodiff.selective.copies import ENDS, Copies, CopyKey, Route
from cocodiff.selective.parcel import Parcel
from cocodiff.selective.run import make_codec
from cocodiff.selective.schedule import codings, share

Crossing = Callable[[int, str, Tensor, tuple[int, ...], tuple[Route, ...]], Tensor]


@dataclass(frozen=True)
class Hosts:
    """Ranks on hosts that a slow link joins.

    Attributes:
        ring: only keys and values cross, each host being a part; else all four tensors do (ulysses over all ranks).
    """

    hosts: int = 2
    ranks: int = 2  # of each
    ring: bool = False

    def __str__(self) -> str:
        return f"{self.hosts} x {self.ranks} {'ring' if self.ring else 'ulysses'}"


class BothSides(TorchFunctionMode):
    """While it is entered, scaled dot product attention is that of all ranks of `hosts` together.

    Args:
        lengths: text and image tokens of the transformer's calls.
        cross: (layer, label, rows `(R, W)`, rows of each block, their routes) -> what the other side gets.
    """

    def __init__(self, hosts: Hosts, lengths: dict[str, int], cross: Crossing) -> None:
        super().__init__()
        self._hosts, self._cross, self.layer = hosts, cross, -1
        count = hosts.hosts * hosts.ranks
        tokens, owners = Tokens.split(lengths, count), []
        for sizes in tokens.streams.values():
            owners += [rank for rank, size in enumerate(sizes) for _ in range(size)]
        owner = torch.tensor(owners)
        self._mine = [(owner == rank).nonzero().flatten() for rank in range(count)]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.layer += 1
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        query, key, value = (given[name].transpose(1, 2) for name in ("query", "key", "value"))  # (B, S, H, D)
        attend = self._ring if self._hosts.ring else self._ulysses
        return attend(query, key, value).transpose(1, 2)

    def _ulysses(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        value, key, query = (self._exchanged(label, x) for label, x in (("v", value), ("k", key), ("q", query)))
        return self._exchanged("o", _attend(query, key, value))

    def _exchanged(self, label: str, x: Tensor) -> Tensor:
        """Elements whose tokens and heads belong to ranks of different hosts cross: towards the heads, or back."""
        batch, _, heads, head_dim = x.shape
        ranks, inside = len(self._mine), self._hosts.ranks
        assert heads % ranks == 0, (heads, ranks)
        by_rank = x.unflatten(2, (ranks, -1)).flatten(3)  # (B, S, N, W)
        pairs = [(t, h) for t in range(ranks) for h in range(ranks) if t // inside != h // inside]
        token = torch.cat([self._mine[t] for t, _ in pairs])
        head = torch.cat([torch.full((len(self._mine[t]),), h) for t, h in pairs])
        blocks = tuple(len(self._mine[t]) for _ in range(batch) for t, _ in pairs)
        places = [(item * ranks + t, item * ranks + h) for item in range(batch) for t, h in pairs]
        routes = tuple((h, t) if label == "o" else (t, h) for t, h in places)
        rows = by_rank[:, token, head]
        got = self._cross(self.layer, label, rows.flatten(0, 1), blocks, routes).view_as(rows)
        whole = by_rank.clone()
        whole[:, token, head] = got
        return whole.view(batch, -1, heads, head_dim)

    def _ring(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each host attends from its own tokens to all: its own keys and values as they are, the others' decoded."""
        batch, _, heads, head_dim = query.shape
        hosts, inside = self._hosts.hosts, self._hosts.ranks
        assert heads % inside == 0, (heads, inside)
        parts = [torch.cat(self._mine[host * inside : (host + 1) * inside]) for host in range(hosts)]

        def decoded(label: str, x: Tensor) -> Tensor:
            rows = x.unflatten(2, (inside, -1)).flatten(3)  # (B, S, ranks of a host, W)
            pieces = [rows[:, part, u].flatten(0, 1) for part in parts for u in range(inside)]
            blocks = tuple(len(part) for part in parts for _ in range(inside * batch))
            routes = tuple((index, index) for index in range(len(blocks)))
            got = self._cross(self.layer, label, torch.cat(pieces), blocks, routes)
            whole = torch.empty_like(rows)
            for index, piece in enumerate(got.split([len(piece) for piece in pieces])):
                part = parts[index // inside]
                whole[:, part, index % inside] = piece.view(batch, len(part), -1)
            return whole.view(batch, -1, heads, head_dim)

        their_value, their_key = decoded("v", value), decoded("k", key)
        output = torch.empty_like(query)
        for part in parts:
            here = torch.zeros(key.shape[1], 1, 1, dtype=torch.bool)
            here[part] = True
            both = torch.where(here, key, their_key), torch.where(here, value, their_value)
            output[:, part] = _attend(query[:, part], *both)
        return output


class Played(ABC):
    """One run of a pipeline, all its ranks in this process.

    Args:
        wire: bytes of an element of an exact exchange, against which shares are counted (compute may be wider).

    Attributes:
        sent, exact: bytes that crossed, and would have.
    """

    def __init__(self, hosts: Hosts, lengths: dict[str, int], wire: int = 2) -> None:
        self._hosts, self._lengths, self._wire, self._step = hosts, lengths, wire, -1
        self.sent = self.exact = 0

    def _cross(
        self, layer: int, label: str, rows: Tensor, blocks: tuple[int, ...], routes: tuple[Route, ...]
    ) -> Tensor:
        received, sent = self._received(layer, label, rows, blocks, routes)
        self.sent, self.exact = self.sent + sent, self.exact + rows.numel() * self._wire
        return received

    @abstractmethod
    def _received(
        self, layer: int, label: str, rows: Tensor, blocks: tuple[int, ...], routes: tuple[Route, ...]
    ) -> tuple[Tensor, int]:
        """What the other side has of the rows `(R, W)`, and the bytes that crossed for that."""

    @contextmanager
    def around(self, transformer: Any) -> Iterator[None]:
        """While inside, the transformer's calls are the steps of this run."""
        forward = transformer.forward

        def simulated(*args: Any, **kwargs: Any) -> Any:
            self._step += 1
            with BothSides(self._hosts, self._lengths, self._cross):
                return forward(*args, **kwargs)

        transformer.forward = simulated
        try:
            yield
        finally:
            transformer.forward = forward


class Rounding(Played):
    """Everything that crosses is rounded to bfloat16: the floor of any method on such a wire."""

    def _received(
        self, layer: int, label: str, rows: Tensor, blocks: tuple[int, ...], routes: tuple[Route, ...]
    ) -> tuple[Tensor, int]:
        return rows.bfloat16().to(rows.dtype), 2 * rows.numel()


class Simulation(Played):
    """Selective transmission with the codecs of a real run."""

    def __init__(self, selective: Selective, hosts: Hosts, lengths: dict[str, int], steps: int, wire: int = 2) -> None:
        super().__init__(hosts, lengths, wire)
        self._selective, self._steps, self._codec = selective, steps, make_codec(selective, Copies())

    def _received(
        self, layer: int, label: str, rows: Tensor, blocks: tuple[int, ...], routes: tuple[Route, ...]
    ) -> tuple[Tensor, int]:
        if share(self._selective, self._steps, self._hosts.ring) == 1:
            return rows, rows.numel() * self._wire
        width = rows.shape[1]
        coding = codings(self._selective, self._steps, width, self._wire, self._hosts.ring)[self._step]
        sending, receiving = (
            Parcel(CopyKey(0, layer, label, end, "0"), blocks, routes, width, rows.itemsize, coding, self._step)
            for end in ENDS
        )
        payload, _ = self._codec.encode(sending, rows)
        assert len(payload) == sum(sending.block_bytes), (len(payload), sending)
        sent = sum(replace(sending, itemsize=self._wire).block_bytes)
        return self._codec.decode(receiving, payload, rows.dtype), sent


class Comparison(Played):
    """A method of `benchmarks.quality.methods`."""

    def __init__(self, name: str, budget: float, hosts: Hosts, lengths: dict[str, int], steps: int, wire: int = 2):
        super().__init__(hosts, lengths, wire)
        self._make = lambda width: comparison(name, budget, steps, width, wire, hosts.ring)
        self._methods: dict[tuple[int, str], Method] = {}

    def _received(
        self, layer: int, label: str, rows: Tensor, blocks: tuple[int, ...], routes: tuple[Route, ...]
    ) -> tuple[Tensor, int]:
        if (layer, label) not in self._methods:
            self._methods[layer, label] = self._make(rows.shape[1])
        return self._methods[layer, label](self._step, rows, blocks)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`(B, S, H, D)` of queries over keys."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
