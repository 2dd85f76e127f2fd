"""``nn.MultiheadAttention`` written out as projections, heads and scaled-dot-product attention.

Recorded as one opaque call nothing inside it could ever be removed. This computes the same function out of ordinary
operations (Vaswani et al. 2017, arXiv 1706.03762, section 3.2), in the same order as torch does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multihead_attention(
    mha: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``mha(query, key, value, ...)`` returns; shapes as in ``nn.MultiheadAttention.forward``."""
    batched = query.dim() == 3
    same_qk, same_kv = query is key, key is value
    if not batched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not mha.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    q, k, v = _project(mha, query, key, value, same_qk and same_kv)
    mask = _merge_masks(mha, attn_mask, key_padding_mask, query)
    k, v, mask = _extend(mha, k, v, mask)
    heads = (mha.num_heads, mha.head_dim)
    q, k, v = (t.view(t.size(0), t.size(1), *heads).transpose(1, 2) for t in (q, k, v))
    weights = None
    dropout = mha.training * mha.dropout if mha.dropout else 0.0  # in this order: the flag is traced
    if need_weights:
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(mha.head_dim))
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, mha.dropout, mha.training) if mha.dropout else weights
        attended = weights @ v
        if average_attn_weights:
            weights = weights.mean(dim=1)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # Steps first, as torch lays it out: the same seed then drops the same elements of what is made of the result.
    out = mha.out_proj(attended.permute(2, 0, 1, 3).flatten(2))
    if not batched:
        return out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out.transpose(0, 1) if mha.batch_first else out, weights


def _project(
    mha: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = mha.in_proj_bias
    if mha.in_proj_weight is None:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    elif packed:
        q, k, v = F.linear(query, mha.in_proj_weight, bias).chunk(3, dim=-1)
        return q, k, v
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        weights = mha.in_proj_weight.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _merge_masks(
    mha: nn.MultiheadAttention, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
) -> Tensor | None:
    """One additive mask, broadcastable to (batch, heads, queries, keys)."""
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, query.dtype)
        if merged.dim() == 3:  # (batch * heads, queries, keys)
            merged = merged.view(query.size(0), mha.num_heads, merged.size(1), merged.size(2))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, query.dtype).unsqueeze(1).unsqueeze(1)
        merged = padding if merged is None else merged + padding
    return merged


def _extend(
    mha: nn.MultiheadAttention, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append the learned and the zero position that ``add_bias_kv`` and ``add_zero_attn`` ask for."""
    extra = 0
    if mha.bias_k is not None and mha.bias_v is not None:
        k = torch.cat((k, mha.bias_k.expand(k.size(0), 1, mha.embed_dim)), dim=1)
        v = torch.cat((v, mha.bias_v.expand(v.size(0), 1, mha.embed_dim)), dim=1)
        extra += 1
    if mha.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        extra += 1
    return k, v, F.pad(mask, (0, extra)) if extra and mask is not None else mask
