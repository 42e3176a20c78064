"""Attention as ORT's optimizer fuses it into saved transformers, as functions of torch.

A key that is masked gets `mask_filter_value` added to its score, not minus infinity, as in ORT.

Source: the contrib operators' documentation of ONNX Runtime, version 1 of `com.microsoft`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.bridge.ops_norm import layer_normalization
from graphopt.bridge.table import Table
from graphopt.errors import ModelError


def _split(x: Tensor, heads: int) -> Tensor:
    """Return (batch, steps, heads · size) as (batch, heads, steps, size)."""
    return x if x.ndim == 4 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _kept(mask: Tensor, keys: int, batch: int) -> Tensor:
    """Return which keys count, to broadcast over (batch, heads, queries, keys).

    A mask is 1 where a key counts: (batch, keys), (batch, queries, keys) or (batch, 1, queries, keys); or it holds
    where the keys of each row end, (batch,), and, behind those, where they begin, (2 · batch,).
    """
    if mask.ndim > 1:
        shape = {2: (mask.shape[0], 1, 1, -1), 3: (mask.shape[0], 1, *mask.shape[1:])}
        return mask.reshape(shape.get(mask.ndim, mask.shape)) != 0
    places = torch.arange(keys, device=mask.device)
    ends = places < mask[:batch].reshape(-1, 1, 1, 1)
    if mask.shape[0] == batch:
        return ends
    if mask.shape[0] != 2 * batch:
        raise ModelError("the bridge does not know attention masks of packed rows")
    return ends & (places >= mask[batch:].reshape(-1, 1, 1, 1))


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, *, scale: float, fill: float,
    causal: bool,
) -> Tensor:  # fmt: skip
    """Return the result, (batch, queries, heads · size), of queries, keys and values by heads."""
    scores = (q @ k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores = scores + bias
    steps, keys = scores.shape[-2:]
    if mask is not None:
        scores = scores + torch.where(_kept(mask, keys, q.shape[0]), 0.0, fill)
    if causal:
        late = torch.ones(steps, keys, dtype=torch.bool, device=q.device).triu(keys - steps + 1)
        scores = scores + torch.where(late, fill, 0.0)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def attention(
    x: Tensor, w: Tensor, b: Tensor | None = None, mask_index: Tensor | None = None, past: Tensor | None = None,
    attention_bias: Tensor | None = None, *, num_heads: int, unidirectional: int = 0,
    mask_filter_value: float = -10000.0, qkv_hidden_sizes: Sequence[int] = (), scale: float = 0.0, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return the result and, where the node names it, keys and values (2, batch, heads, steps, size)."""
    made = x @ w if b is None else x @ w + b
    parts = made.split(tuple(qkv_hidden_sizes), -1) if qkv_hidden_sizes else made.chunk(3, -1)
    q, k, v = (_split(part, num_heads) for part in parts)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    out = _attended(
        q, k, v, mask_index, attention_bias, scale=scale, fill=mask_filter_value, causal=bool(unidirectional)
    )
    return (out, torch.stack([k, v])) if outputs > 1 else out


def multi_head_attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, b: Tensor | None = None,
    key_padding_mask: Tensor | None = None, attention_bias: Tensor | None = None, past_key: Tensor | None = None,
    past_value: Tensor | None = None, *, num_heads: int, mask_filter_value: float = -10000.0, scale: float = 0.0,
    unidirectional: int = 0, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return the result and, where the node names them, all keys and all values by heads."""
    if k is None or v is None:
        raise ModelError("the bridge does not know attention of packed queries, keys and values")
    if b is not None:
        sizes = (q.shape[-1], q.shape[-1], b.shape[0] - 2 * q.shape[-1])
        q, k, v = (x if x.ndim == 4 else x + part for x, part in zip((q, k, v), b.split(sizes), strict=True))
    q, k, v = (_split(x, num_heads) for x in (q, k, v))
    k = k if past_key is None else torch.cat([past_key, k], 2)
    v = v if past_value is None else torch.cat([past_value, v], 2)
    out = _attended(
        q, k, v, key_padding_mask, attention_bias, scale=scale, fill=mask_filter_value, causal=bool(unidirectional)
    )
    return (out, k, v)[:outputs] if outputs > 1 else out


def embed_layer_normalization(
    words: Tensor, segments: Tensor | None, by_word: Tensor, by_place: Tensor, by_segment: Tensor | None,
    gamma: Tensor, beta: Tensor, mask: Tensor | None = None, places: Tensor | None = None, *, epsilon: float = 1e-12,
    mask_index_type: int = 0, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return the normalized sum of the embeddings, how many words of each row count, and the sum itself."""
    at = torch.arange(words.shape[1], device=words.device)[None] if places is None else places.long()
    total = by_word[words.long()] + by_place[at]
    if segments is not None and by_segment is not None:
        total = total + by_segment[segments.long()]
    made = layer_normalization(total, gamma, beta, epsilon=epsilon)
    rows = words.shape[0]
    counts = words.new_zeros(rows) if mask is None else (mask != 0).sum(1)
    return (made, counts.int(), total)[:outputs] if outputs > 1 else made


TABLE: Table = {
    "Attention": attention, "MultiHeadAttention": multi_head_attention,
    "EmbedLayerNormalization": embed_layer_normalization,
}  # fmt: skip
