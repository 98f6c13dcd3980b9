"""Attention over some of the keys, with the log-sum-exp that merges it with attention over the others.

softmax(q [k1 k2]) [v1 v2] is the mean of both partial attentions, weighted by the exp of their log-sum-exps
(FlashAttention, arXiv 2205.14135; Ring Attention, arXiv 2310.01889). Weights and sums are in float32.

Legend: B batch, S sequence, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

QUERIES_AT_ONCE = 256
Partial = tuple[Tensor, Tensor]  # float32: attended (B, S_query, H, D) and log-sum-exp (B, S_query, H, 1)


def attend_partial(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Partial:
    """Attention of `(B, S_query, H, D)` over `(B, S_key, H, D)`, scaled by D ** -0.5, on the device's own kernel.

    `mask` is bool `(B, 1, 1, S_key)`: the keys that may be attended to; a batch entry may have none here.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    bias = None
    if mask is not None:  # finite: where all are masked, the log-sum-exp is so small that the merge drops the rest
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~mask, max(-1e9, torch.finfo(q.dtype).min / 2))
    ops, aligned = torch.ops.aten, q.shape[-1] % 8 == 0
    if q.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    elif q.device.type == "cuda" and bias is None and _has_flash(q):
        out, lse = ops._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif q.device.type == "cuda" and aligned:
        if bias is not None:  # its rows must begin at multiples of 16 bytes
            bias = F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]
            bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        out, lse = ops._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]
        lse = lse[..., : q.shape[2]]
    else:  # XPU, whose fused kernel gives no log-sum-exp: scores of a few queries at a time
        parts = [attend_partial_reference(some, key, value, mask) for some in query.split(QUERIES_AT_ONCE, dim=1)]
        attended, sums = zip(*parts, strict=True)
        return torch.cat(attended, dim=1), torch.cat(sums, dim=1)
    return out.transpose(1, 2).float(), lse.float().transpose(1, 2).unsqueeze(-1)


def _has_flash(query: Tensor) -> bool:
    """What FlashAttention asks of CUDA tensors."""
    modern = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return modern and query.dtype != torch.float32 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def attend_partial_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Partial:
    """The same in plain torch and float32, with all scores in memory."""
    scores = torch.einsum("bqhd,bkhd->bqhk", query.float(), key.float()) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~mask, -1e9)
    return torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value.float()), scores.logsumexp(-1, keepdim=True)


def merge_partial(one: Partial, other: Partial) -> Partial:
    """Attention over both sets of keys."""
    (out, lse), (out_other, lse_other) = one, other
    joint = torch.logaddexp(lse, lse_other)
    return torch.lerp(out, out_other, (lse_other - joint).exp()), joint
