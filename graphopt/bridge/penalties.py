"""Terms that make weights small or sparse, as gradients: they need no graph, and no second pass for accumulation.

    l1           l1 * sum |w|                            gradient l1 * sign(w)
    group lasso  group_lasso * sum over output channels c of ||w_c||       gradient group_lasso * w_c / ||w_c||, 0 at 0

(Tibshirani 1996; Yuan and Lin 2006, without their factor for the size of groups.)  Of weights alone: never of norms,
biases and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphopt.training import TrainSettings


class Penalties:
    """The penalties of some weights.

    Args:
        weights: parameters by name.
        axes: their axis of output channels.
        settings: `l1` and `group_lasso`.
    """

    def __init__(self, weights: Mapping[str, Any], axes: Mapping[str, int], settings: TrainSettings) -> None:
        self.weights, self.axes = dict(weights), dict(axes)
        self.l1, self.group_lasso = settings.l1, settings.group_lasso

    def add(self) -> dict[str, float]:
        """Add the gradients of the penalties to those of the weights that have any; return the terms of the loss."""
        terms: dict[str, float] = {}
        with torch.no_grad():
            used = {name: weight for name, weight in self.weights.items() if weight.grad is not None}
            if self.l1:
                terms["l1"] = self.l1 * sum(self._absolute(weight) for weight in used.values())
            if self.group_lasso:
                norms = sum(self._grouped(weight, self.axes[name]) for name, weight in used.items())
                terms["group_lasso"] = self.group_lasso * norms
        return terms

    def _absolute(self, weight: Any) -> float:
        weight.grad.add_(weight.sign(), alpha=self.l1)
        return float(weight.abs().sum())

    def _grouped(self, weight: Any, axis: int) -> float:
        others = [a for a in range(weight.dim()) if a != axis % max(1, weight.dim())]
        norms = torch.linalg.vector_norm(weight, dim=others, keepdim=True) if others else weight.abs()
        unit = torch.where(norms > 0, weight / norms, torch.zeros_like(weight))
        weight.grad.add_(unit, alpha=self.group_lasso)
        return float(norms.sum())
