"""Draws, as functions of torch: of its generator, so that a seeded run draws the same again.

The seed of a node is left aside: a model that is trained has to see new draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.bridge.host import torch_kind
from graphopt.bridge.table import Table


def random_normal(
    *, shape: Sequence[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float = 0.0
) -> Tensor:
    return (torch.randn(tuple(shape)) * scale + mean).to(torch_kind(dtype))


def random_uniform(
    *, shape: Sequence[int], dtype: int = 1, low: float = 0.0, high: float = 1.0, seed: float = 0.0
) -> Tensor:
    return (torch.rand(tuple(shape)) * (high - low) + low).to(torch_kind(dtype))


def random_normal_like(
    x: Tensor, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float = 0.0
) -> Tensor:
    drawn = torch.randn(x.shape, device=x.device) * scale + mean
    return drawn.to(x.dtype if dtype is None else torch_kind(dtype))


def random_uniform_like(
    x: Tensor, dtype: int | None = None, low: float = 0.0, high: float = 1.0, seed: float = 0.0
) -> Tensor:
    drawn = torch.rand(x.shape, device=x.device) * (high - low) + low
    return drawn.to(x.dtype if dtype is None else torch_kind(dtype))


def bernoulli(x: Tensor, dtype: int | None = None, seed: float = 0.0) -> Tensor:
    return torch.bernoulli(x).to(x.dtype if dtype is None else torch_kind(dtype))


def multinomial(x: Tensor, dtype: int = 6, sample_size: int = 1, seed: float = 0.0) -> Tensor:
    """Return classes (batch, samples) drawn by unnormalized log-probabilities (batch, classes)."""
    return torch.multinomial(torch.softmax(x, -1), sample_size, replacement=True).to(torch_kind(dtype))


TABLE: Table = {
    "RandomNormal": random_normal, "RandomUniform": random_uniform, "RandomNormalLike": random_normal_like,
    "RandomUniformLike": random_uniform_like, "Bernoulli": bernoulli, "Multinomial": multinomial,
}  # fmt: skip
