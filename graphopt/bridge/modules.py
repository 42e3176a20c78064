"""Operators whose result depends on the mode of the module, or that hold graphs: BatchNormalization, Dropout, If."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphopt.bridge.host import as_tensor


class BatchNormalization(nn.Module):
    """Normalizes channels (axis 1) by running statistics, or by those of the batch while it learns them.

    Learning follows torch: the running variance takes the unbiased one of the batch.  Where the node itself is in
    training mode (opset 14), the batch's statistics are used always and the new running ones come out, as ONNX has it.

    Args:
        epsilon: added to the variance.
        momentum: part of the running statistics that stays (torch's momentum is one minus it).
        learn: whether statistics are trained while the module is in training mode.
        training_mode: of the node.
        outputs: how many outputs the node names.
    """

    def __init__(self, *, epsilon: float, momentum: float, learn: bool, training_mode: bool, outputs: int) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.momentum = momentum
        self.learn = learn
        self.training_mode = training_mode
        self.outputs = outputs

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Any:
        """Return x normalized; with further outputs a tuple of it and the running mean and variance."""
        if self.training_mode:
            return self._by_batch(x, scale, bias, mean, variance)
        one = x.numel() == x.shape[1]  # one value per channel has no variance
        learns = self.learn and self.training and not one
        y = nn.functional.batch_norm(
            x, mean, variance, scale, bias, training=learns, momentum=1.0 - self.momentum, eps=self.epsilon
        )
        return y if self.outputs == 1 else (y, mean, variance, mean, variance)[: self.outputs]

    def _by_batch(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Any:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        batch_mean, batch_variance = x.mean(axes), x.var(axes, correction=0)
        y = nn.functional.batch_norm(x, None, None, scale, bias, training=True, eps=self.epsilon)
        keep = self.momentum
        new = mean * keep + batch_mean * (1 - keep), variance * keep + batch_variance * (1 - keep)
        if self.learn and self.training:
            count = x.numel() // x.shape[1]
            unbiased = batch_variance * (count / max(count - 1, 1))
            with torch.no_grad():
                mean.copy_(new[0])
                variance.mul_(keep).add_(unbiased, alpha=1 - keep)
        return y if self.outputs == 1 else (y, *new)[: self.outputs]


class Dropout(nn.Module):
    """Drops elements in training mode, and never else.

    Args:
        ratio: part that is dropped.
        outputs: how many outputs the node names; the second is the mask.
    """

    def __init__(self, *, ratio: float, outputs: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        """Return x with elements dropped, the others scaled up; with two outputs also which stay."""
        if self.outputs == 1:
            return nn.functional.dropout(x, self.ratio, self.training)
        if not self.training or not self.ratio:
            return x, torch.ones_like(x, dtype=torch.bool)
        kept = torch.rand_like(x) >= self.ratio
        return x * kept / max(1.0 - self.ratio, 1e-12), kept


class If(nn.Module):
    """One of two graphs; what they read from outside is handed to them.

    Args:
        then_branch: a module of what it captures.
        else_branch: likewise.
        outputs: how many outputs the node names.
    """

    def __init__(self, then_branch: nn.Module, else_branch: nn.Module, *, outputs: int) -> None:
        super().__init__()
        self.then_branch = then_branch
        self.else_branch = else_branch
        self.outputs = outputs

    def forward(self, condition: Any, then_captured: tuple[Any, ...], else_captured: tuple[Any, ...]) -> Any:
        """Return the outputs of the branch that the condition (one boolean) takes."""
        taken = condition[0] if isinstance(condition, tuple) else condition
        made = self.then_branch(*then_captured) if bool(taken) else self.else_branch(*else_captured)
        return made[0] if self.outputs == 1 else made


def first(value: Any) -> Any:
    """Return the first of several outputs, or the only one."""
    return value[0] if isinstance(value, tuple) else value


def typed(value: Any, kind: Any) -> Tensor:
    """Return an output of the graph as a tensor of its type."""
    tensor = as_tensor(value)
    return tensor if kind is None or tensor.dtype == kind else tensor.to(kind)
