"""What is known of a pipeline's weights on this rank, so that ranks can compare it without sending them.

Every plain tensor that is in memory is hashed whole, on its own device, once: again only where it is another tensor or
was written to. Of others (quantised, on disk, moved in by hooks) shapes and types are compared, and `left_out` says so.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cocodiff.compat import is_on_disk

_WORDS = 1 << 17  # int64 words that are multiplied at once: 1 MB, to stay in a cache
_TURN = 0x5851F42D4C957F2D  # odd: no carry is lost between chunks


class Fingerprints:
    """Of the modules of one pipeline.

    Attributes:
        left_out: module -> how many of its tensors were compared by shape and type alone, when last asked.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, int] = {}
        self._known = WeakTensorKeyDictionary()  # tensor -> its version, and its fingerprint

    def of(self, name: str, module: nn.Module) -> dict[str, Any]:
        """Fields for `agree`: the structure of a module with all its adapters, and a sum of the bits of its weights."""
        structure, plain, left_out = hashlib.sha256(), [], 0
        on_disk = is_on_disk(module)
        for label, x in itertools.chain(module.named_parameters(), module.named_buffers()):
            structure.update(f"{label} {type(x).__name__} {tuple(x.shape)} {x.dtype}\n".encode())
            if on_disk or type(x.data) is not Tensor or x.is_meta or x.layout != torch.strided:
                left_out += 1
            else:
                plain.append(x)
        self.left_out[name] = left_out
        self._hash([x for x in plain if self._known.get(x, (None,))[0] != _version(x)])
        total = 0
        for x in plain:
            total = (total * 31 + self._known[x][1]) % 2**64
        return {
            f"parameters of {name}": structure.hexdigest()[:12],
            f"adapters of {name}": _adapters(module),
            f"weights of {name}": f"{total:016x}",
        }

    def _hash(self, tensors: list[Tensor]) -> None:
        """Every tensor of a device first, then one copy to the host."""
        for _, several in itertools.groupby(sorted(tensors, key=lambda x: str(x.device)), lambda x: x.device):
            group = list(several)
            factors = _factors(group[0].device)
            sums = torch.stack([_sum_of_bits(x.detach(), factors) for x in group]).tolist()
            for x, found in zip(group, sums, strict=True):
                self._known[x] = _version(x), found


def _version(x: Tensor) -> int:
    """Counts what is written in place; -1 for tensors of inference mode, which do not count."""
    return -1 if x.is_inference() else x._version


def _factors(device: torch.device) -> Tensor:
    """Odd and random, the same everywhere: whichever bits change, so does their sum."""
    generator = torch.Generator("cpu").manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator, device="cpu") * 2 + 1).to(device)


@torch.no_grad()
def _sum_of_bits(x: Tensor, factors: Tensor) -> Tensor:
    """A sum of all bits, each by its place; int64 that wraps, on the tensor's device."""
    data = x.contiguous().flatten().view(torch.uint8)
    if data.data_ptr() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    rest = data[whole:].to(torch.int64)
    total = (rest * factors[: rest.numel()]).sum() + data.numel()
    for words in data[:whole].view(torch.int64).split(_WORDS) if whole else ():
        total = total * _TURN + (words * factors[: words.numel()]).sum()
    return total


def _adapters(module: nn.Module) -> list[str]:
    """Which adapters are active where, and how strongly; their weights are parameters."""
    tuned = [(name, part) for name, part in module.named_modules() if hasattr(part, "active_adapters")]
    return [f"{name} {part.active_adapters} {getattr(part, 'scaling', '')}" for name, part in tuned if name]
