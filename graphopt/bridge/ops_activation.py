"""Activations and Softmax, as functions of torch; parameters as in the ONNX specification of each."""

from __future__ import annotations

import torch
from torch.nn import functional

from graphopt.bridge.table import Op, Table


def leaky_relu(x: torch.Tensor, alpha: float = 0.01) -> torch.Tensor:
    return torch.where(x < 0, alpha * x, x)


def prelu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, slope * x, x)


def elu(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    return functional.elu(x, alpha)


def celu(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    return functional.celu(x, alpha)


def selu(x: torch.Tensor, alpha: float = 1.6732632, gamma: float = 1.050701) -> torch.Tensor:
    return gamma * functional.elu(x, alpha)


def hard_sigmoid(x: torch.Tensor, alpha: float = 0.2, beta: float = 0.5) -> torch.Tensor:
    return (alpha * x + beta).clamp(0, 1)


def hard_swish(x: torch.Tensor) -> torch.Tensor:
    return functional.hardswish(x)  # a tenth of the time of the product, backwards too


def thresholded_relu(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(x: torch.Tensor, bias: float = 0.0, lambd: float = 0.5) -> torch.Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    return functional.gelu(x, approximate=approximate)


def swish(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    return x * torch.sigmoid(alpha * x)


def swiglu(a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    return swish(a, alpha) * b


def _flat(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Return x with all axes from `axis` on as one: what Softmax normalised over before opset 13."""
    return x.unsqueeze(-1) if axis == x.ndim else x.flatten(axis)


def softmax_1(x: torch.Tensor, axis: int = 1) -> torch.Tensor:
    return torch.softmax(_flat(x, axis), -1).reshape(x.shape)


def log_softmax_1(x: torch.Tensor, axis: int = 1) -> torch.Tensor:
    return torch.log_softmax(_flat(x, axis), -1).reshape(x.shape)


def hardmax_1(x: torch.Tensor, axis: int = 1) -> torch.Tensor:
    return hardmax(_flat(x, axis), -1).reshape(x.shape)


def softmax(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    return torch.softmax(x, axis)


def log_softmax(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    return torch.log_softmax(x, axis)


def hardmax(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    best = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, best, 1)


TABLE: Table = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "LeakyRelu": leaky_relu, "PRelu": prelu,
    "Elu": elu, "Celu": celu, "Selu": selu, "HardSigmoid": hard_sigmoid, "HardSwish": hard_swish,
    "ThresholdedRelu": thresholded_relu, "Shrink": shrink, "Softplus": functional.softplus,
    "Softsign": functional.softsign, "Mish": functional.mish, "Gelu": gelu, "Swish": swish, "SwiGLU": swiglu,
    "Softmax": (Op(1, softmax_1), Op(13, softmax)),
    "LogSoftmax": (Op(1, log_softmax_1), Op(13, log_softmax)),
    "Hardmax": (Op(1, hardmax_1), Op(13, hardmax)),
}  # fmt: skip
