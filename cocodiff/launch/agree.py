"""Compares what all ranks must have in common before anything runs. JSON and digests travel, never pickles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from cocodiff.errors import MismatchError
from cocodiff.launch.words import rank_words

_SHOWN = 5


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the JSON values of all ranks of a gloo group, in rank order. Collective."""
    host = torch.device("cpu")  # whatever torch.set_default_device says
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=host)
    sizes = [torch.zeros(1, dtype=torch.int64, device=host) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([data.numel()], device=host), group=group)
    longest = int(max(sizes))
    buffers = [torch.zeros(longest, dtype=torch.uint8, device=host) for _ in sizes]
    padded = torch.zeros(longest, dtype=torch.uint8, device=host)
    padded[: data.numel()] = data
    dist.all_gather(buffers, padded, group=group)
    return [json.loads(bytes(b[: int(n)].tolist())) for b, n in zip(buffers, sizes, strict=True)]


def agree(fields: Mapping[str, Any], group: dist.ProcessGroup, what: str) -> None:
    """Raise the same MismatchError on every rank unless all ranks give equal `fields`. Collective.

    Values may be numbers, strings, tensors, arrays, pictures, generators (compared by their state) and containers of
    these. Of any other value only the type is compared.

    Args:
        group: a gloo group.
        what: the subject of the error message, such as "the call".
    """
    complaints = _complaints(gather_json({name: _describe(value) for name, value in fields.items()}, group))
    if complaints:  # on all ranks alike, since all have compared the same
        parts = [part for name in complaints if name in fields for part in _parts(name, fields[name])]
        complaints = _complaints(gather_json({name: _describe(value) for name, value in parts}, group)) or complaints
        said = ". ".join(f"{name}: {text}" for name, text in list(complaints.items())[:_SHOWN])
        more = f". {len(complaints) - _SHOWN} more differ" if len(complaints) > _SHOWN else ""
        raise MismatchError(f"{what} differs between ranks. {said}{more}. Give every rank the same.")


def _complaints(everyone: list[dict[str, list[str]]]) -> dict[str, str]:
    """Return the fields that are not equal on all ranks, with the values of all ranks."""
    complaints = {}
    for name in dict.fromkeys(name for given in everyone for name in given):
        ranks_by_value: dict[tuple[str, ...], list[int]] = {}
        for rank, given in enumerate(everyone):
            ranks_by_value.setdefault(tuple(given.get(name, ("", "not given"))), []).append(rank)
        if len(ranks_by_value) > 1:
            found = ranks_by_value.items()
            complaints[name] = "; ".join(f"{text} on {rank_words(ranks)}" for (_, text), ranks in found)
    return complaints


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the innermost parts of a field with their names, such as `cluster.levels[1].bandwidth_gbs`."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _parts(f"{name}.{key}", part)
    elif isinstance(value, list | tuple) and value:
        for index, part in enumerate(value):
            yield from _parts(f"{name}[{index}]", part)
    else:
        yield name, value


def digest(value: Any) -> str:
    """A digest that is equal for equal values, of the kinds that `agree` compares."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _describe(value: Any) -> tuple[str, str]:
    """Return a digest, which decides whether values are equal, and a short description for the error message."""
    key = digest(value)
    if isinstance(value, torch.Generator):
        return key, f"generator with seed {value.initial_seed()} (state {key[:6]})"
    if isinstance(value, torch.Tensor):
        return key, f"tensor {tuple(value.shape)} {str(value.dtype)[6:]} ({key[:6]})"
    if value is None or isinstance(value, str | int | float | bool):
        text = repr(value)
        return key, text if len(text) <= 60 else f"{text[:57]}... ({key[:6]})"
    return key, f"{type(value).__name__} ({key[:6]})"


def _feed(digest: Any, value: Any) -> None:
    """Update the digest with the value, and with its type, so that 1, 1.0 and "1" differ."""
    if isinstance(value, torch.Generator):
        _feed(digest, value.get_state())
    elif isinstance(value, torch.Tensor):
        digest.update(f"tensor{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"map{len(value)}".encode())
        for name in value:
            digest.update(str(name).encode())
            _feed(digest, value[name])
    elif isinstance(value, list | tuple | set | frozenset):
        digest.update(f"list{len(value)}".encode())
        for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            _feed(digest, item)
    elif value is None or isinstance(value, str | bytes | int | float | complex | bool):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    elif hasattr(value, "tobytes"):  # NumPy arrays and PIL pictures
        digest.update(f"{type(value).__name__}{getattr(value, 'shape', getattr(value, 'size', ''))}".encode())
        digest.update(f"{getattr(value, 'dtype', getattr(value, 'mode', ''))}".encode())
        digest.update(value.tobytes())
    else:
        digest.update(type(value).__qualname__.encode())


def share_random_state(device: torch.device, group: dist.ProcessGroup) -> None:
    """Give all ranks rank 0's random state, on the CPU and the accelerator. Collective.

    After that all ranks draw the same noise, even in a call without a generator.
    """
    state = torch.get_rng_state()
    dist.broadcast(state, group=group, group_src=0)
    torch.set_rng_state(state)
    if device.type != "cpu":
        api = torch.get_device_module(device)
        state = api.get_rng_state(device)
        dist.broadcast(state, group=group, group_src=0)
        api.set_rng_state(state, device)
