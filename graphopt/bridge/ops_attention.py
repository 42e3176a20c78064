"""Attention and rotary embeddings of opset 23 on, as functions of torch.

    softmax(softcap(scale Q K') + bias) V        bias: the mask, what causality and the cache's padding forbid

A query that may attend to nothing gets zeros.  Source: ONNX operators Attention, opset 24, and RotaryEmbedding, 23.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.bridge.host import torch_kind
from graphopt.bridge.table import Table

_NEVER = float("-inf")


def _heads(x: Tensor, count: int) -> Tensor:
    """Return (batch, steps, heads · size) as (batch, heads, steps, size); four axes stay as they are."""
    return x if x.ndim == 4 else x.unflatten(-1, (count, -1)).transpose(1, 2)


def _bias(
    q: Tensor, k: Tensor, mask: Tensor | None, lengths: Tensor | None, past: int, reach: tuple[int, int]
) -> Tensor:
    """Return what is added to the scores: minus infinity where a query may not look.

    Args:
        q: queries, (batch, heads, steps, size).
        k: keys, those of the past first.
        mask: booleans, or numbers to add; may be shorter than the keys.
        lengths: keys of each row of the batch that are no padding, (batch,).
        past: keys of the past.
        reach: how many keys before and after its own a query sees; below zero: all.
    """
    steps, total = q.shape[2], k.shape[2]
    zero = q.new_zeros(steps, total)
    if mask is not None:
        short = total - mask.shape[-1]
        if mask.dtype is torch.bool:
            mask = torch.where(mask, zero.new_zeros(()), zero.new_full((), _NEVER))
        zero = zero + (functional.pad(mask, (0, short), value=_NEVER) if short > 0 else mask)
    keys = torch.arange(total, device=q.device)
    first = past if lengths is None else (lengths.reshape(-1, 1, 1, 1) - steps)
    ahead = keys - (torch.arange(steps, device=q.device)[:, None] + first)
    for distance, bound in ((-ahead, reach[0]), (ahead, reach[1])):
        zero = zero.masked_fill(distance > bound, _NEVER) if bound >= 0 else zero
    if lengths is not None:
        zero = zero.masked_fill(keys >= lengths.reshape(-1, 1, 1, 1), _NEVER)
    return zero


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, past_key: Tensor | None = None,
    past_value: Tensor | None = None, nonpad_kv_seqlen: Tensor | None = None, *, is_causal: int = 0,
    kv_num_heads: int = 0, q_num_heads: int = 0, qk_matmul_output_mode: int = 0, scale: float | None = None,
    softcap: float = 0.0, softmax_precision: int | None = None, left_window_size: int = -1,
    right_window_size: int = -1, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return the result and, where the node names them, all keys, all values, and the scores by mode.

    The scores are raw (mode 0), capped (1), with bias (2), or after the softmax (3).
    """
    flat = q.ndim == 3
    q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    past = 0 if past_key is None else past_key.shape[2]
    k = k if past_key is None else torch.cat([past_key, k], 2)
    v = v if past_value is None else torch.cat([past_value, v], 2)
    each = q.shape[1] // k.shape[1]
    wide = [x if each == 1 else x.repeat_interleave(each, 1) for x in (k, v)]
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = (q * root) @ (wide[0] * root).transpose(-1, -2)
    capped = softcap * torch.tanh(scores / softcap) if softcap else scores
    reach = (left_window_size, 0 if is_causal else right_window_size)
    bias = _bias(q, k, attn_mask, nonpad_kv_seqlen, past, reach)
    found = capped + bias
    blind = (bias == _NEVER).all(-1, keepdim=True)
    kind = q.dtype if softmax_precision is None else torch_kind(softmax_precision)
    chances = torch.softmax(found.masked_fill(blind, 0).to(kind), -1).to(q.dtype).masked_fill(blind, 0)
    out = chances @ wide[1]
    out = out.transpose(1, 2).flatten(2) if flat else out
    return (out, k, v, (scores, capped, found, chances)[qk_matmul_output_mode])[:outputs] if outputs > 1 else out


def rotary_embedding(
    x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None = None, *, interleaved: int = 0,
    num_heads: int = 0, rotary_embedding_dim: int = 0,
) -> Tensor:  # fmt: skip
    """Return x with pairs of each head turned by the angles of its place."""
    flat = x.ndim == 3
    x = _heads(x, num_heads)
    if positions is not None:
        cosine, sine = cosine[positions.long()], sine[positions.long()]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    size = rotary_embedding_dim or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pairs = (cosine * a - sine * b, sine * a + cosine * b)
    new = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    out = torch.cat([new, rest], -1)
    return out.transpose(1, 2).flatten(2) if flat else out


TABLE: Table = {"Attention": attention, "RotaryEmbedding": rotary_embedding}
