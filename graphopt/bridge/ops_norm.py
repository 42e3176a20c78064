"""Normalizations, as functions of torch; BatchNormalization, which has modes, is a module (modules.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from graphopt.bridge.operands import positive
from graphopt.bridge.table import Op, Table


def layer_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5,
    stash_type: int = 1, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return the normalized tensor and, where the node names them, mean and inverse deviation."""
    over = tuple(x.shape[axis:])
    if outputs == 1 and tuple(scale.shape) == over and (bias is None or tuple(bias.shape) == over):
        return functional.layer_norm(x, over, scale, bias, epsilon)
    axes = tuple(range(positive(axis, x.ndim), x.ndim))
    mean = x.mean(axes, keepdim=True)
    inverse = torch.rsqrt(((x - mean) ** 2).mean(axes, keepdim=True) + epsilon)
    out = (x - mean) * inverse * scale
    out = out if bias is None else out + bias
    return (out, mean, inverse)[:outputs] if outputs > 1 else out


def rms_normalization(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1,
) -> torch.Tensor:  # fmt: skip
    axes = tuple(range(positive(axis, x.ndim), x.ndim))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + epsilon) * scale


def instance_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, epsilon: float = 1e-5
) -> torch.Tensor:
    return functional.group_norm(x, x.shape[1], scale, bias, epsilon)


def group_normalization_18(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> torch.Tensor:
    """Return x normalized by groups of channels; one scale and one bias per group."""
    each = x.shape[1] // num_groups
    return functional.group_norm(x, num_groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)


def group_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, num_groups: int, epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:  # fmt: skip
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


def lrn(x: torch.Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> torch.Tensor:
    """Return x / (bias + alpha / size · the sum of squares over `size` channels around each) ** beta."""
    squares = (x * x).transpose(1, -1)
    squares = functional.pad(squares, ((size - 1) // 2, size // 2)).unfold(-1, size, 1).sum(-1).transpose(1, -1)
    return x / (bias + alpha / size * squares) ** beta


def lp_normalization(x: torch.Tensor, axis: int = -1, p: int = 2) -> torch.Tensor:
    """Return x by its norm along an axis, zero where that is zero."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def mean_variance_normalization(x: torch.Tensor, axes: Any = (0, 2, 3)) -> torch.Tensor:
    centered = x - x.mean(tuple(axes), keepdim=True)
    return centered / ((centered * centered).mean(tuple(axes), keepdim=True).sqrt() + 1e-9)


TABLE: Table = {
    "LayerNormalization": layer_normalization, "RMSNormalization": rms_normalization,
    "InstanceNormalization": instance_normalization,
    "GroupNormalization": (Op(18, group_normalization_18), Op(21, group_normalization)),
    "LRN": lrn, "LpNormalization": lp_normalization, "MeanVarianceNormalization": mean_variance_normalization,
}  # fmt: skip
