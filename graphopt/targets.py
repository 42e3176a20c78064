"""What each kind of target computes on integers, and what it asks for, as data.

The rows for the CPU provider are what ONNX Runtime (ORT) 1.31 does with operators between DequantizeLinear and
QuantizeLinear; tests/test_ort_facts_quantized.py holds them against the installed one.  Its fast kernels take
unsigned activations and signed weights (U8S8), a scalar code per activation, and weights with zero point 0 and a
scale per output channel.  The CUDA provider has no integer kernels for convolutions and products: float16 is what
pays there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class IntegerForm:
    """What an operator asks for to become an integer kernel.

    Attributes:
        inputs: how many of its first inputs must be quantized, 0 for all.
        weight: input that may be a weight with a code per output channel; such operators are layers: they do the work,
            and it is chosen for each whether it is quantized.  None: a follower, which goes along with its neighbours.
        bias: input that is an int32 constant with scale = input scale x weight scale.
        needs_output: whether its output must be quantized too; where not, it may return floats.
        keeps: its values only move (or the largest is taken): input and output must have one code.
    """

    inputs: int = 1
    weight: int | None = None
    bias: int | None = None
    needs_output: bool = True
    keeps: bool = False


_KEEPS = IntegerForm(keeps=True)

CPU_FORMS: Mapping[str, IntegerForm] = {
    "Conv": IntegerForm(2, weight=1, bias=2),
    "MatMul": IntegerForm(2, weight=1, needs_output=False),
    "Gemm": IntegerForm(2, weight=1, bias=2, needs_output=False),
    "Add": IntegerForm(2),
    "Mul": IntegerForm(2),
    "Concat": IntegerForm(0),
    "Sigmoid": IntegerForm(),
    "LeakyRelu": IntegerForm(),
    "Softmax": IntegerForm(),
    "AveragePool": IntegerForm(),
    "GlobalAveragePool": IntegerForm(),
    "MaxPool": _KEEPS,
    "Resize": _KEEPS,
    "Split": _KEEPS,
    "ReduceMax": _KEEPS,
    "ReduceMin": _KEEPS,
    "Reshape": _KEEPS,
    "Transpose": _KEEPS,
    "Flatten": _KEEPS,
    "Squeeze": _KEEPS,
    "Unsqueeze": _KEEPS,
    "DepthToSpace": _KEEPS,
    "Slice": _KEEPS,
    "Gather": _KEEPS,
    "Expand": _KEEPS,
    "Tile": _KEEPS,
}
"""Operators that ORT's CPU provider computes on integers."""

INTEGER_FORMS: Mapping[str, Mapping[str, IntegerForm]] = {"cpu": CPU_FORMS}
"""Provider -> what it computes on integers; a provider that is missing computes nothing so."""

OUTPUT_AXIS: Mapping[str, int] = {"Conv": 0, "MatMul": -1, "Gemm": 1}
"""Layer -> the axis of its weight that is the output channel (Gemm: of the weight that is not transposed)."""

QUANTIZED_UNASKED: Mapping[str, int] = {"Conv": 1, "ConvTranspose": 0, "Gemm": 0}
"""Layers with float weights that ORT quantizes by itself, with one scale for the whole weight, where they stand between
a DequantizeLinear with one scale and a QuantizeLinear -> the weight's axis of input channels.  EfficientNet-Lite0 is
left with 4 dB by it."""

ACTIVATION = np.dtype(np.uint8)
WEIGHT = np.dtype(np.int8)

FOLDED = frozenset({"Relu", "Clip"})
"""Activations that the saturation of the code behind them stands for, where 0 is within their bounds."""

SMALL_OPERAND = 16
"""An operand of a follower that is so many times smaller than its result costs little to quantize by itself."""

CHANNEL_STEPS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "cpu": ((32, 16), (16, 8), (0, 4)),
    "cuda": ((16, 8), (0, 4)),
    "tensorrt": ((16, 8), (0, 4)),
}
"""Provider -> (channels from which, multiple that pruning keeps them at).  ORT's CPU provider computes blocks of 16
channels (8 without AVX-512) and takes its blocked layout only for multiples of 4; tensor cores want multiples of 8."""
