"""What float16 holds, which operators lose by it, and which kernels exist, as data.

Sources: IEEE 754 binary16 for the limits; ONNX's operator schemas say which operators take float16 at all and are
read from `onnx.defs`, not listed here.  The rows for the CUDA provider are those of ONNX Runtime's table of kernels
(docs/OperatorKernels.md of its repository); they were not run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

HALF = np.dtype(np.float16)
FLOAT = np.dtype(np.float32)

LARGEST = 65504.0
"""Largest finite number of float16."""

SMALLEST_NORMAL = 2.0**-14
"""Below it float16 loses digits; a tensor whose largest element is below it is better left in float32."""

FEW_DIGITS = 2.0**-18
"""Below it float16 rounds by more than 1 %: its numbers are 2^-24 apart there."""

SHRINKS = 2.0**-4
"""A factor that brings what may be too large back: the 1/n of a mean, the 0.04 of a cubic."""

EXACT_INTEGERS = 2048
"""Whole numbers up to which float16 has all of them."""

SHORT_AXIS = 64
"""Elements that may be summed without a question: activations of a thousand do not overflow then."""

LONG_AXIS = 4096
"""Elements of which a mean may be taken without a question."""


@dataclass(frozen=True)
class Risk:
    """Why an operator may fail in float16.

    Attributes:
        why: the reason, for reports.
        measurable: whether ranges found on samples settle it.
        spreads: whether its result may be too large for float16, too, so that what reads it must not be either.
        axis: it is no risk where at most so many elements are reduced.
        divisor: input that must keep away from zero.
    """

    why: str
    measurable: bool = True
    spreads: bool = False
    axis: int = 0
    divisor: int | None = None


_POWERS = Risk("squares pass 65504 from 256 on", spreads=True)
_SUMS = Risk("a sum over a long axis may pass 65504", spreads=True, axis=SHORT_AXIS)
_ANGLES = Risk("an argument of 1000 is only known to 0.5", measurable=False)
_WHOLE = Risk(f"whole numbers above {EXACT_INTEGERS} are not exact", measurable=False)
_PLACES = Risk("places in an image are only known to 1/2048 of its size", measurable=False)
_STEEP = Risk("it grows like e^x, which passes 65504 from x = 11 on", spreads=True)

SQUARE = _POWERS
"""A product of a tensor with itself."""

RISKS: Mapping[str, Risk] = {
    "Exp": _STEEP,
    "Sinh": _STEEP,
    "Cosh": _STEEP,
    "Pow": _POWERS,
    "ReduceSum": _SUMS,
    "ReduceL1": _SUMS,
    "ReduceL2": Risk("it squares and sums", spreads=True, axis=SHORT_AXIS),
    "ReduceSumSquare": Risk("it squares and sums", spreads=True),
    "ReduceLogSum": Risk("it sums before it takes the logarithm", axis=SHORT_AXIS),
    "ReduceLogSumExp": Risk("it sums powers of e"),
    "ReduceProd": Risk("products leave the range of float16", spreads=True),
    "ReduceMean": Risk("a mean over a long axis sums first", axis=LONG_AXIS),
    "LpPool": _POWERS,
    "LpNormalization": Risk("it squares and sums", axis=SHORT_AXIS),
    "MeanVarianceNormalization": Risk("it squares and sums"),
    "LRN": Risk("it squares and sums"),
    "Det": Risk("products leave the range of float16", spreads=True),
    "DFT": Risk("a spectrum spans more than float16 does", spreads=True),
    "STFT": Risk("a spectrum spans more than float16 does", spreads=True),
    "MelWeightMatrix": Risk("a spectrum spans more than float16 does"),
    "Log": Risk("arguments below 6e-8 are zero", divisor=0),
    "Reciprocal": Risk("divisors below 6e-8 are zero", divisor=0),
    "Div": Risk("divisors below 6e-8 are zero", divisor=1),
    "Tan": _ANGLES,
    "Sin": _ANGLES,
    "Cos": _ANGLES,
    "Mod": _WHOLE,
    "CumSum": Risk("a running sum loses what is 2048 times smaller than it", measurable=False),
    "Range": _WHOLE,
    "GridSample": _PLACES,
    "AffineGrid": _PLACES,
    "RoiAlign": _PLACES,
}
"""Operators that have float16 by their schema, and yet may fail in it."""

BITS = frozenset({"BitCast"})
"""Operators that read the bits of their input: the width is the meaning."""

RAW_OUTPUT: Mapping[str, tuple[int, str]] = {
    "Attention": (3, "its raw products hold what masks leave out, as large as the type has it"),
}
"""Operator -> an optional output whose values depend on the type."""

REDUCING: Mapping[str, str] = dict.fromkeys(
    ("ScatterElements", "ScatterND"), "elements with one place are added up, for which there is no float16 kernel"
)
"""Operators that stay float32 where their attribute `reduction` is not `none` (ORT's CPU kernels refuse to run)."""

SETTLES = frozenset(
    {
        "Div", "Reciprocal", "Sqrt", "Log", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softmax", "LogSoftmax",
        "Softsign", "Sign", "Sin", "Cos", "Atan", "LayerNormalization", "RMSNormalization", "InstanceNormalization",
        "GroupNormalization", "BatchNormalization", "LpNormalization", "MeanVarianceNormalization", "ReduceLogSum",
        "ReduceLogSumExp", "Conv", "ConvTranspose", "MatMul", "Gemm",
    }
)  # fmt: skip
"""Operators whose results are of usual size again after numbers that are too large (or normalise, as layers do)."""

PRECISE: Mapping[str, tuple[int, ...]] = {
    "Sin": (0,), "Cos": (0,), "Tan": (0,), "Mod": (0, 1), "Range": (0, 1, 2), "CumSum": (0,), "GridSample": (1,),
    "AffineGrid": (0,), "RoiAlign": (1,), "Resize": (1, 2), "Upsample": (1,),
}  # fmt: skip
"""Operator -> inputs that want whole numbers, angles or places: computed from integers, they stay float32."""

INDIFFERENT = frozenset({"Cast", "Shape", "Size"})
"""Operators that read a float of either width at the same cost."""

MASKING = frozenset({"Add", "Sub", "Where", "Neg", "Min", "Max"})
"""Operators through which `as good as minus infinity` comes to a Softmax; so it does by data movement."""

MASK_FACTORS = frozenset({"Mul"})
"""Operators that do so where the other operand is computed from integers: masks of zeros and ones."""

MASKED = frozenset({"Softmax", "LogSoftmax"})

NARROW_INTEGERS = frozenset({"bool", "uint8", "int8"})
"""Integers that float16 holds, all of them."""

CUDA_HALF: Mapping[str, int] = {
    **dict.fromkeys(
        (
            "Abs", "Add", "ArgMax", "ArgMin", "Attention", "AveragePool", "BatchNormalization", "Cast",
            "Ceil", "Compress", "Concat", "ConstantOfShape", "Conv", "ConvTranspose", "Cos",
            "DepthToSpace", "Div", "Dropout", "Einsum", "Elu", "Erf", "Exp", "Expand", "Flatten",
            "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool",
            "GlobalMaxPool", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
            "InstanceNormalization", "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Less",
            "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Min", "Mod", "Mul", "Neg",
            "NonZero", "OneHot", "PRelu", "Pad", "Pow", "RMSNormalization", "RNN", "Reciprocal",
            "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
            "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize",
            "ReverseSequence", "RotaryEmbedding", "Round", "Scatter", "ScatterElements", "ScatterND",
            "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus",
            "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh",
            "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where",
        ),
        1,
    ),
    "Clip": 12, "CumSum": 14, "Equal": 11, "IsInf": 20,
}  # fmt: skip
"""Operators with a float16 kernel in ONNX Runtime's CUDA provider -> the opset from which."""

KERNELS: Mapping[str, Mapping[str, int]] = {"cuda": CUDA_HALF}
"""Provider -> what it computes in float16.  Of providers that are missing nothing is known: the schema decides; the
CPU provider computes in float32 whatever it has no float16 kernel for, which is nearly everything."""

CASTS_ON_CPU = (
    "ONNX Runtime's CPU provider computes float16 in float32 with Casts: the file is smaller, it is not faster"
)
