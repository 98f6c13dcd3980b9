"""Attention over some of the keys, with the log-sum-exp that merges it with attention over the others.

softmax(q [k1 k2]) [v1 v2] is the mean of both partial attentions, weighted by the exp of their log-sum-exps
(FlashAttention, arXiv 2205.14135; Ring Attention, arXiv 2310.01889). Weights and sums are in float32.

Legend: B batch, S sequence, H heads, D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

QUERIES_AT_ONCE = 256
PROBE_TOLERANCE = 0.02  # of norms, log-sum-exps absolute: above any rounding, below any other convention
NO_KEYS = -1e30  # log-sum-exp of no keys: finite, so that two such parts merge; below that of masked keys
Partial = tuple[Tensor, Tensor]  # float32: attended (B, S_query, H, D) and log-sum-exp (B, S_query, H, 1)
# `(B, H, S, D)` query, key and value, and a bias that broadcasts to (B, H, S_query, S_key) or None -> the attended,
# `(B, H, S_query, D)`, and log-sum-exps `(B, H, S_query)`.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

_log = logging.getLogger(__name__)


def attend_partial(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Partial:
    """Attention of `(B, S_query, H, D)` over `(B, S_key, H, D)`, scaled by D ** -0.5, on the device's own kernel.

    `mask` is bool `(B, 1, 1, S_key)`: the keys that may be attended to; a batch entry may have none here. Under
    autocast the inputs, whose dtypes may differ, are rounded to its dtype, as by `scaled_dot_product_attention`.
    """
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not (query.numel() and key.numel()):  # kernels divide by these numbers
        return query.new_zeros(query.shape, dtype=torch.float32), _no_keys(query)
    for kernel in _kernels(query, mask is not None):
        if kind == "meta" or _agrees(kernel, query.device, query.dtype, query.shape[-1], mask is not None):
            return _attended_by(kernel, query, key, value, mask)
    # No kernel gives log-sum-exps: scores of a few queries at a time.
    parts = [attend_partial_reference(some, key, value, mask) for some in query.split(QUERIES_AT_ONCE, dim=1)]
    attended, sums = zip(*parts, strict=True)
    return torch.cat(attended, dim=1), torch.cat(sums, dim=1)


def attend_partial_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Partial:
    """The same in plain torch and float32, with all scores in memory."""
    with torch.autocast(query.device.type, enabled=False):  # it would round what a matrix product gets
        scores = torch.einsum("bqhd,bkhd->bqhk", query.float(), key.float()) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + torch.zeros_like(scores).masked_fill(~mask, -1e9)
        attended = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value.float())
        return attended, scores.logsumexp(-1, keepdim=True) if scores.shape[-1] else _no_keys(query)


def _no_keys(query: Tensor) -> Tensor:
    return query.new_full((*query.shape[:-1], 1), NO_KEYS, dtype=torch.float32)


def _attended_by(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Partial:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    bias = None
    if mask is not None:  # finite: where all are masked, the log-sum-exp is so small that the merge drops the rest
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~mask, max(-1e9, torch.finfo(q.dtype).min / 2))
    out, lse = kernel(q, k, v, bias)
    return out.transpose(1, 2).float(), lse.float().transpose(1, 2).unsqueeze(-1)


def _kernels(query: Tensor, masked: bool) -> tuple[Kernel, ...]:
    """The kernels that may serve such queries, best first."""
    kind, dtype, head_dim = query.device.type, query.dtype, query.shape[-1]
    if kind == "cpu":
        return (_flash_on_cpu,)
    if kind == "meta":
        return (_without_values,)
    if kind == "xpu":  # which of them has log-sum-exps, and which ones, depends on the version of torch
        return (_overrideable,) if masked else (_flash, _overrideable)
    if kind != "cuda" or head_dim % 8:
        return ()
    modern = torch.cuda.get_device_capability(query.device) >= (8, 0)
    flash = not masked and modern and dtype != torch.float32 and head_dim <= 256
    return (_flash, _efficient) if flash else (_efficient,)


@lru_cache(maxsize=128)
def _agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> bool:
    """Whether a kernel gives what the reference gives: asked once, of a few numbers, before it is believed.

    Some have given base-2 log-sum-exps (sycl-tla#848) or none, with which parts would be merged by other weights.
    """
    numbers = torch.arange(3 * 37 * 2 * head_dim, dtype=torch.float32, device=device)
    query, key, value = (2 * torch.sin(numbers * numbers % 1013)).view(3, 1, 37, 2, head_dim).to(dtype)
    mask = (torch.arange(37, device=device) % 3 > 0).view(1, 1, 1, 37) if masked else None
    wanted = attend_partial_reference(query[:, :20], key, value, mask)
    try:
        out, lse = _attended_by(kernel, query[:, :20], key, value, mask)
        agrees = out.shape == wanted[0].shape and lse.shape == wanted[1].shape
        agrees = agrees and bool((out - wanted[0]).norm() < PROBE_TOLERANCE * wanted[0].norm())
        agrees = agrees and bool((lse - wanted[1]).abs().max() < PROBE_TOLERANCE)
        reason = "gives another result than the reference"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        agrees, reason = False, f"fails: {str(error)[:200]}"
    if not agrees:
        _log.warning(
            "attention%s of parts in %s with head_dim %d is not left to the kernel %s of this %s device: it %s.",
            " with a mask" if masked else "", dtype, head_dim, kernel.__name__, device.type, reason,
        )  # fmt: skip
    return agrees


def _flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def _without_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shapes alone, for whoever traces a forward: one attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias), q.new_empty(q.shape[:3], dtype=torch.float32)


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    assert bias is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if bias is not None:  # its rows must begin at multiples of 16 bytes
        bias = F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]
    return out, lse[..., : q.shape[2]]


def _overrideable(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_fused_attention_overrideable(q, k, v, bias)[:2]


def merge_partial(one: Partial, other: Partial) -> Partial:
    """Attention over both sets of keys."""
    (out, lse), (out_other, lse_other) = one, other
    joint = torch.logaddexp(lse, lse_other)
    return torch.lerp(out, out_other, (lse_other - joint).exp()), joint
