"""Losses that are part of a graph, as functions of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.bridge.table import Table

_NO_CLASS = -100
"""What torch ignores by default: no label is that."""


def negative_log_likelihood_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    ignored = _NO_CLASS if ignore_index is None else ignore_index
    return functional.nll_loss(x, target.long(), weight, ignore_index=ignored, reduction=reduction)


def softmax_cross_entropy_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None,
    reduction: str = "mean", outputs: int = 1,
) -> Any:  # fmt: skip
    chances = torch.log_softmax(x, 1)
    loss = negative_log_likelihood_loss(chances, target, weight, ignore_index=ignore_index, reduction=reduction)
    return (loss, chances) if outputs > 1 else loss


TABLE: Table = {
    "NegativeLogLikelihoodLoss": negative_log_likelihood_loss, "SoftmaxCrossEntropyLoss": softmax_cross_entropy_loss,
}  # fmt: skip
