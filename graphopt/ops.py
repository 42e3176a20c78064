"""Facts about operators, as data.  Nothing here decides anything: passes and analyses look things up."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

STANDARD_DOMAINS = frozenset({None, "", "ai.onnx"})

NONDETERMINISTIC = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Each run may give another result."""

QUANTIZE = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
DEQUANTIZE = frozenset({"DequantizeLinear"})

KEEP_UNFOLDED = DEQUANTIZE
"""Deterministic operators whose constant inputs are worth more than their result: quantized weights."""

DECODES = "graphopt.decodes"
"""Metadata of nodes that decode stored weights, as the pass that put them in: folding them here would undo it."""

SPARSE = "graphopt.sparse"
"""Metadata of nodes whose weights were made sparse (format: `sparse_marks.py`)."""

COMMUTATIVE = frozenset(
    {
        "Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
        "Max", "Min", "Sum", "Mean",
    }
)  # fmt: skip
"""The order of inputs does not matter."""

UNARY = frozenset(
    {
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos",
        "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf",
        "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
        "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
"""Each element of the output is made of the one at its place in input 0; further inputs are parameters."""

BROADCASTING = frozenset(
    {
        "Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
        "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip
"""Elementwise over all inputs, which broadcast (the slope of PRelu to its first one)."""

REDUCTIONS = frozenset(
    {
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
        "ReduceProd", "ReduceSum", "ReduceSumSquare",
    }
)  # fmt: skip
"""One element of each run along the axes; `axes` and `keepdims`."""

MOVEMENT = frozenset(
    {
        "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather",
        "GatherElements", "GatherND", "Expand", "Tile", "Pad", "DepthToSpace", "SpaceToDepth", "Where",
    }
)  # fmt: skip
"""Elements come out as they went in, only elsewhere."""

ARITHMETIC = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Max", "Min", "Sum", "Mean", "Clip", "Relu", "LeakyRelu", "Sqrt",
        "Pow", "Reciprocal", "Exp", "Log", "Sigmoid", "Tanh",
    }
)  # fmt: skip
"""Elementwise and continuous."""

STEPS = frozenset(
    {
        "Floor", "Ceil", "Round", "Sign", "Mod", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
        "QuantizeLinear", "DynamicQuantizeLinear", "IsInf", "IsNaN", "ArgMax", "ArgMin", "TopK", "NonZero",
        "NonMaxSuppression", "Unique", "Hardmax", "ThresholdedRelu",
    }
)  # fmt: skip
"""A last-digit difference of the input may become a whole step of the output (so may a Cast to integers)."""

MOVED_TO_INPUT: Mapping[tuple[str, str], tuple[int, int]] = {
    ("Squeeze", "axes"): (13, 1),
    ("Unsqueeze", "axes"): (13, 1),
    ("Split", "split"): (13, 1),
    ("Slice", "starts"): (10, 1),
    ("Slice", "ends"): (10, 2),
    ("Slice", "axes"): (10, 3),
    ("Slice", "steps"): (10, 4),
    ("Pad", "pads"): (11, 1),
    ("Pad", "value"): (11, 2),
    ("Pad", "axes"): (18, 3),
    ("Clip", "min"): (11, 1),
    ("Clip", "max"): (11, 2),
    ("Dropout", "ratio"): (12, 1),
    ("Dropout", "training_mode"): (12, 2),
    ("Reshape", "shape"): (5, 1),
    ("Expand", "shape"): (8, 1),
    ("Tile", "repeats"): (6, 1),
    ("Upsample", "scales"): (9, 1),
    ("TopK", "k"): (10, 1),
    ("ReduceSum", "axes"): (13, 1),
    **{
        (op, "axes"): (18, 1)
        for op in (
            "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
            "ReduceLogSumExp", "ReduceSumSquare",
        )
    },
}  # fmt: skip
"""(operator, parameter) -> (opset from which it is an input, index of that input); before, it is an attribute."""

WEIGHTED: Mapping[str, int] = {"Conv": 0, "ConvTranspose": 1}
"""Operators whose input 1 is a weight of the rank of their input: its axis for output channels (of one group)."""

BLOCKED = frozenset({"Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})
"""What ORT's CPU provider computes in its blocked layout (NCHWc): rank 4, constant weights."""

BLOCKED_THROUGH = frozenset(
    {
        "Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Clip", "Add", "Sum", "Mul", "Concat",
        "BatchNormalization", "Resize", "Upsample",
    }
)  # fmt: skip
"""What ORT computes in the blocked layout where its inputs have it already."""

HOMOGENEOUS = frozenset({"Abs", "Dropout", "Identity", "LeakyRelu", "Neg", "PRelu", "Relu"})
"""Elementwise with f(c x) = c f(x) for every c > 0."""

CHANNEL_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"})
"""Make each channel (axis 1) of its own elements alone, and f(c x) = c f(x) for every c > 0."""

NEVER_FAILS = UNARY - {"Cast", "Dropout", "Clip"} | {"Shape", "Size", "Softmax", "LogSoftmax"}
"""Operators that run for every input of a type that they take."""

OUTPUTS_SET_MODE = frozenset({"BatchNormalization"})
"""Naming an optional output may change what the operator computes (before opset 14)."""

NOT_LARGER = frozenset({"NonZero", "Compress", "Unique", "Slice", "GatherND", "Gather", "StringNormalizer"})
"""Outputs of unknown size that their inputs bound (NonZero: rank indices for each element)."""


def is_standard(node: gs.Node, *ops: str) -> bool:
    """Tell whether a node is of the standard domain and, when `ops` are given, one of them."""
    return node.domain in STANDARD_DOMAINS and (not ops or node.op in ops)
