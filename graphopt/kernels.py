"""Facts about the operators that ONNX Runtime (ORT) runs, as data: its layouts, what it adds, what is integer.

Measured on ORT 1.31 for CPU; tests/test_ort_facts.py holds them against the installed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from graphopt.ops import ARITHMETIC

BLOCKED_DOMAIN = "com.microsoft.nchwc"
"""Kernels in ORT's blocked layout (NCHWc: channels in blocks of the vector width)."""

REORDERS = frozenset({"ReorderInput", "ReorderOutput"})
"""Into the blocked layout, and out of it."""

COPIES = frozenset({"MemcpyFromHost", "MemcpyToHost"})
"""Between the memory of two providers."""

MOVERS = REORDERS | COPIES | {"Transpose", "Cast", "Reshape"}
"""What ORT puts between kernels that do not take each other's data as it is."""

HEAVY = frozenset(
    {
        "Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN", "Einsum", "ConvInteger",
        "MatMulInteger", "QLinearConv", "QLinearMatMul",
    }
)  # fmt: skip
"""Operators that do the work of a kernel made of several."""

NOTHING = frozenset({"Identity", "Dropout"})
"""Operators that do nothing at inference."""

NEUTRAL: Mapping[str, float] = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
"""Operators with a second operand that leaves the first as it is."""

AFFINE = frozenset({"Mul", "Add", "Sub", "Div", "BatchNormalization"})
"""Operators that a scale and a shift can stand for, where their other operands are constant."""

PERMUTES = frozenset({"DepthToSpace", "SpaceToDepth", "Gather", "GatherElements", "GatherND", "Where"})
"""Data movement that may do something even where the shape stays."""

TRANSPOSING = ("MatMul", "Gemm", "Attention", "Einsum")
"""Parts of the names of kernels that read their inputs transposed."""

BLOCKED_ALWAYS = frozenset(
    {
        "Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "BatchNormalization",
        "Relu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "QuickGelu",
    }
)  # fmt: skip
"""Take a blocked tensor and leave it blocked."""

BLOCKED_ACTIVATIONS = frozenset({"LeakyRelu", "Clip"})
"""Stay in the blocked layout only as part of the convolution before them."""

BLOCKED_SUMS = frozenset({"Add", "Sum", "Mul", "Concat"})
"""Take blocked tensors where all operands are blocked (and, but for Concat, of one shape)."""

BLOCKED_RESIZES = frozenset({"Resize", "Upsample"})
"""Take a blocked tensor for whole factors, in some modes."""

ELEMENTWISE = ARITHMETIC | {
    "HardSigmoid", "HardSwish", "Gelu", "QuickGelu", "FastGelu", "BiasGelu", "Erf", "Softplus", "Softsign", "Elu",
    "Selu", "Celu", "PRelu", "Mish", "Swish", "Where", "Sin", "Cos", "Sign", "Round", "Floor", "Ceil",
}  # fmt: skip
"""Kernels that read and write each element once: what they cost is memory."""

FLOAT_KERNELS: Mapping[str, frozenset[str]] = {
    "Conv": frozenset({"Conv", "FusedConv"}),
    "MatMul": frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}),
    "Gemm": frozenset({"Gemm", "FusedGemm", "MatMul", "FusedMatMul"}),
}
"""Layer -> what ORT may call the float kernel that it becomes part of."""

_INTEGER = re.compile(
    r"QLinear\w+|QGemm|QAttention|QOrdered\w+|\w+Integer(ToFloat)?|DynamicQuantize(MatMul|LSTM)|MatMul\w*Bits"
)


def is_integer(op: str) -> bool:
    """Tell whether a kernel computes on integers (MatMulNBits and its like take their weights as such)."""
    return _INTEGER.fullmatch(op) is not None
