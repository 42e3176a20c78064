"""Operators of ORT's own domain that its optimizer writes into saved models, as functions of torch.

Source: the contrib operators' documentation of ONNX Runtime, version 1 of `com.microsoft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.bridge import ops_activation as activation
from graphopt.bridge.ops_conv import conv
from graphopt.bridge.ops_math import gemm
from graphopt.bridge.ops_norm import layer_normalization, rms_normalization
from graphopt.bridge.table import Table
from graphopt.errors import ModelError

_ACTIVATIONS = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "LeakyRelu": activation.leaky_relu,
    "HardSigmoid": activation.hard_sigmoid, "Clip": torch.clamp, "HardSwish": activation.hard_swish,
}  # fmt: skip
"""What is fused behind a product -> its function, to which its parameters are given in order."""


def _activated(x: Tensor, name: str, parameters: Sequence[float]) -> Tensor:
    if not name:
        return x
    if name not in _ACTIVATIONS:
        raise ModelError(f"the bridge does not know the fused activation '{name}'")
    return _ACTIVATIONS[name](x, *parameters)


def gelu(x: Tensor) -> Tensor:
    return activation.gelu(x)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return activation.gelu(x + bias)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return activation.gelu(x if bias is None else x + bias, "tanh")


def quick_gelu(x: Tensor, alpha: float = 1.702) -> Tensor:
    return activation.swish(x, alpha)


def fused_conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None, *, activation: str = "",
    activation_params: Sequence[float] = (), auto_pad: str = "NOTSET", dilations: Sequence[int] | None = None,
    group: int = 1, kernel_shape: Sequence[int] | None = None, pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Return activation(Conv(x, w, b) + z)."""
    out = conv(
        x, w, b, auto_pad=auto_pad, dilations=dilations, group=group, kernel_shape=kernel_shape, pads=pads,
        strides=strides,
    )  # fmt: skip
    return _activated(out if z is None else out + z, activation, activation_params)


def fused_gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, activation: str = "", activation_alpha: float | None = None,
    activation_beta: float | None = None, activation_gamma: float | None = None, alpha: float = 1.0,
    beta: float = 1.0, transA: int = 0, transB: int = 0,
) -> Tensor:  # fmt: skip
    given = [v for v in (activation_alpha, activation_beta, activation_gamma) if v is not None]
    return _activated(gemm(a, b, c, alpha, beta, transA, transB), activation, given)


def fused_matmul(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, transA: int = 0, transB: int = 0, transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:  # fmt: skip
    """Return alpha · A B, the last axes exchanged (`trans`), the first one moved before the last one (`transBatch`)."""
    a = a.movedim(0, -2) if transBatchA else a
    b = b.movedim(0, -2) if transBatchB else b
    a = a.transpose(-1, -2) if transA and a.ndim > 1 else a
    b = b.transpose(-1, -2) if transB and b.ndim > 1 else b
    return (a @ b) * alpha


def skip_layer_normalization(
    x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None, *,
    epsilon: float = 1e-12, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return LayerNormalization(x + skip + bias), and as fourth output the sum."""
    total = x + skip if bias is None else x + skip + bias
    made = layer_normalization(total, gamma, beta, epsilon=epsilon, outputs=min(outputs, 3))
    return (*made[:3], total)[:outputs] if outputs > 1 else made


def skip_simplified_layer_normalization(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-12, outputs: int = 1
) -> Any:
    """Return RMSNormalization(x + skip + bias), and as fourth output the sum."""
    total = x + skip if bias is None else x + skip + bias
    made = rms_normalization(total, gamma, epsilon=epsilon)
    inverse = torch.rsqrt((total * total).mean(-1, keepdim=True) + epsilon)
    return (made, total.mean(-1, keepdim=True), inverse, total)[:outputs] if outputs > 1 else made


STANDARD: Table = {"SimplifiedLayerNormalization": rms_normalization}
"""What ORT put into the standard domain though the standard lacks it."""

TABLE: Table = {
    "Gelu": gelu, "BiasGelu": bias_gelu, "FastGelu": fast_gelu, "QuickGelu": quick_gelu, "FusedConv": fused_conv,
    "FusedGemm": fused_gemm, "FusedMatMul": fused_matmul, "TransposeMatMul": fused_matmul,
    "SkipLayerNormalization": skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": skip_simplified_layer_normalization,
}  # fmt: skip
