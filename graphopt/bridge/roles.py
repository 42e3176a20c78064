"""What each constant is for: which are trained, and which of those decay.

    weight        of a layer: trained, decays
    bias          added per channel: trained
    norm          multiplies per channel (normalization, slopes): trained
    statistics    running mean and variance of BatchNormalization: written by its training, never by a gradient
    scale         of QuantizeLinear and DequantizeLinear: trained where scales are learned
    zero-point    beside a scale
    codes         quantized weights (integers)
    scalar        one number: an epsilon, a bound
    fixed         anything else: no gradient reaches an output, or no one learned it (masks of 0 and -inf, of 0 and 1)
    integer       indices, shapes

By use, not by name.  A constant that is used twice has the first of these roles in the order of `_ORDER`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant
from graphopt.model import Model
from graphopt.ops import is_standard
from graphopt.slots import Array, Slot
from graphopt.tensors import is_float, numpy_dtype

Role: TypeAlias = str

WEIGHT, BIAS, NORM, STATISTICS, SCALE = "weight", "bias", "norm", "statistics", "scale"
ZERO_POINT, CODES, SCALAR, FIXED, INTEGER = "zero-point", "codes", "scalar", "fixed", "integer"

LEARNED = frozenset({WEIGHT, BIAS, NORM})
"""Roles that are trained unless somebody says otherwise."""

DECAYING = frozenset({WEIGHT, CODES})
"""Roles that weight decay, L1 and group lasso are for."""

_ORDER = (STATISTICS, ZERO_POINT, SCALE, CODES, WEIGHT, NORM, BIAS, SCALAR, FIXED, INTEGER)

PORTS: Mapping[tuple[str, int], Role] = {
    **{(op, 1): WEIGHT for op in ("Conv", "ConvTranspose", "DeformConv", "MatMul", "Gemm", "FusedConv", "FusedMatMul")},
    **{(op, 2): BIAS for op in ("Conv", "ConvTranspose", "Gemm", "FusedConv")},
    **{(op, 0): WEIGHT for op in ("MatMul", "Gemm", "FusedMatMul", "Gather")},
    **{(op, port): WEIGHT for op in ("LSTM", "GRU", "RNN") for port in (1, 2)},
    **{(op, 3): BIAS for op in ("LSTM", "GRU", "RNN", "DeformConv")},
    ("LSTM", 7): WEIGHT,
    **{
        (op, port): NORM
        for op in (
            "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
            "RMSNormalization", "SimplifiedLayerNormalization",
        )
        for port in (1, 2)
    },
    ("BatchNormalization", 3): STATISTICS,
    ("BatchNormalization", 4): STATISTICS,
    ("PRelu", 1): NORM,
    **{(op, 1): SCALE for op in ("QuantizeLinear", "DequantizeLinear")},
    **{(op, 2): ZERO_POINT for op in ("QuantizeLinear", "DequantizeLinear")},
    ("DequantizeLinear", 0): CODES,
}  # fmt: skip
"""(operator, input) -> what a constant is there; elsewhere its shape tells."""

THROUGH = frozenset(
    {
        "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "CastLike", "Slice", "Split",
        "Expand", "Tile", "Dropout",
    }
)  # fmt: skip
"""Operators whose input 0 is used as their output is."""

_MULTIPLIES = frozenset({"Mul", "Div", "Pow"})
_ADDS = frozenset({"Add", "Sub", "Sum"})
_LINEAR = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_LARGEST = 1e4
"""No weight is larger: what is, is a mask."""

_EVERY = frozenset(range(64))

NO_GRADIENT: Mapping[str, frozenset[int]] = {
    **dict.fromkeys(
        (
            "Shape", "Size", "Floor", "Ceil", "Round", "Sign", "Equal", "Less", "LessOrEqual", "Greater",
            "GreaterOrEqual", "IsInf", "IsNaN", "ArgMax", "ArgMin", "NonZero", "NonMaxSuppression", "Hardmax", "Not",
            "And", "Or", "Xor", "Range", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomNormalLike",
            "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "DynamicQuantizeLinear", "BitShift",
            "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix", "Unique",
        ),
        _EVERY,
    ),
    **{op: frozenset({1}) for op in (
        "Reshape", "Expand", "Tile", "Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements", "Scatter",
        "Upsample", "TopK", "Unsqueeze", "Squeeze", "Split", "CumSum", "Trilu", "Compress", "ReverseSequence",
        "MaxUnpool", "CastLike", "CenterCropPad", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd",
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare",
    )},
    "Slice": frozenset({1, 2, 3, 4}), "Pad": frozenset({1, 3}), "Resize": frozenset({1, 2, 3}),
    "Where": frozenset({0}), "OneHot": frozenset({0, 1}), "Dropout": frozenset({1, 2}), "If": frozenset({0}),
    "BatchNormalization": frozenset({3, 4}), "RoiAlign": frozenset({1, 2}), "MaxRoiPool": frozenset({1}),
    "QuantizeLinear": frozenset({2}), "DequantizeLinear": frozenset({2}), "AffineGrid": frozenset({1}),
    **{op: frozenset({4}) for op in ("LSTM", "GRU", "RNN")},
}  # fmt: skip
"""Operator -> the inputs that no gradient goes to (their values are integers, or they are used in steps)."""


def reached(model: Model) -> set[int]:
    """Return the tensors (by `id`) that a gradient of some output reaches, those for masks left out."""
    return _behind_outputs(model) - _compared(model)


def _compared(model: Model) -> set[int]:
    """Return what constants alone make and Equal compares, and what that is made of: numbers of places, for masks."""
    found: set[int] = set()
    for graph in model.graphs():
        fixed: set[int] = set()
        compared: list[gs.Tensor] = []
        for node in graph.nodes:
            if node.inputs and all(id(t) in fixed or is_constant(t) or not t.name for t in node.inputs):
                fixed.update(id(t) for t in node.outputs)
            if is_standard(node, "Equal"):
                compared.extend(node.inputs)
        while compared:
            tensor = compared.pop()
            if id(tensor) not in found and (id(tensor) in fixed or is_constant(tensor)):
                found.add(id(tensor))
                compared.extend(t for node in tensor.inputs for t in node.inputs)
    return found


def _behind_outputs(model: Model) -> set[int]:
    functions = {(f.domain, f.name): f for f in model.functions}
    callers: dict[int, list[gs.Tensor]] = {}
    for node in model.nodes():
        called = functions.get((node.domain or "", node.op))
        for given, tensor in zip(called.inputs if called is not None else (), node.inputs, strict=False):
            callers.setdefault(id(given), []).append(tensor)
    found: set[int] = set()
    stack = list(model.graph.outputs)
    while stack:
        tensor = stack.pop()
        if id(tensor) in found or not tensor.name:
            continue
        found.add(id(tensor))
        stack.extend(callers.get(id(tensor), ()))
        for node in tensor.inputs:
            stack.extend(_behind(node, functions.get((node.domain or "", node.op))))
    return found


def _behind(node: gs.Node, called: gs.Function | None) -> Iterator[gs.Tensor]:
    """Yield what the gradient of a node's outputs goes to."""
    if called is not None:
        yield from called.outputs
        return
    if is_standard(node, "Cast") and not _to_float(node):
        return
    blocked = NO_GRADIENT.get(node.op, frozenset()) if is_standard(node) else frozenset()
    yield from (tensor for port, tensor in enumerate(node.inputs) if port not in blocked)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield from value.outputs


def _to_float(node: gs.Node) -> bool:
    kind = node.attrs.get("to")
    return not isinstance(kind, int) or is_float(numpy_dtype(kind))


def role_of(slot: Slot, live: set[int]) -> Role:
    """Return the role of a constant; `live` is what `reached` says of its model."""
    used = list(uses(slot.tensor))
    roles = {_role_at(slot, node, port) for node, port in used}
    if not is_float(slot.dtype):
        held = roles & {CODES, ZERO_POINT}
        return next((role for role in _ORDER if role in held), INTEGER)
    if not roles:
        return FIXED
    role = next(role for role in _ORDER if role in roles)
    if role not in LEARNED:
        return role
    if id(slot.tensor) not in live or not _ordinary(slot.read()):
        return FIXED
    of_layer = any((node.op, port) in PORTS for node, port in used)
    return role if of_layer or not _of_mask(slot.read()) else FIXED


def uses(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Yield (node, input) of what a constant is used by, looking through what only moves it."""
    stack, seen = [tensor], set()
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node in unique(current.outputs):
            for port, read in enumerate(node.inputs):
                if read is not current:
                    continue
                if port == 0 and is_standard(node) and node.op in THROUGH:
                    stack.extend(node.outputs)
                yield node, port


def unique(nodes: Iterable[gs.Node]) -> list[gs.Node]:
    """Return nodes without repetition (a node that reads a tensor twice is listed twice)."""
    return list({id(node): node for node in nodes}.values())


def _role_at(slot: Slot, node: gs.Node, port: int) -> Role:
    known = PORTS.get((node.op, port))
    if known is not None:
        return known
    if port in NO_GRADIENT.get(node.op, ()) or (is_standard(node) and node.op in THROUGH and port == 0):
        return FIXED
    wide = sum(size > 1 for size in slot.shape)
    if wide == 0:
        return BIAS if len(slot.shape) > 0 and node.op in _ADDS and _after_layer(node, port) else SCALAR
    if wide == 1 and node.op in _MULTIPLIES:
        return NORM
    return WEIGHT if wide > 1 else BIAS


def _after_layer(node: gs.Node, port: int) -> bool:
    """Tell whether an addition's other operand comes from a linear layer."""
    others = [t for i, t in enumerate(node.inputs) if i != port]
    return any(is_standard(made) and made.op in _LINEAR for t in others for made in t.inputs)


def _ordinary(values: Array) -> bool:
    """Tell whether these may be learned values."""
    return bool(values.size) and bool(np.all(np.abs(values.astype(np.float32)) < _LARGEST))  # False for NaN


def _of_mask(values: Array) -> bool:
    """Tell whether values are zeros and one other number: which places count, not what was learned."""
    marked = values[values != 0]
    return 1 < marked.size < values.size and bool((marked == marked[0]).all())


def channel_axis(slot: Slot) -> int:
    """Return the axis of a weight that its output channels lie along (0 where nothing tells)."""
    for tensor, axes in _spellings(slot):
        for node in unique(tensor.outputs):
            axis = _channel_axis_at(node, tensor, len(axes))
            if axis is not None:
                return axes[axis]
    return 0


def _spellings(slot: Slot) -> Iterator[tuple[gs.Tensor, tuple[int, ...]]]:
    """Yield the constant and what it is transposed to, with the axis of the constant that each axis is."""
    stack = [(slot.tensor, tuple(range(len(slot.shape))))]
    while stack:
        tensor, axes = stack.pop()
        yield tensor, axes
        for node in unique(tensor.outputs):
            if node.inputs[0] is not tensor:
                continue
            if is_standard(node, "Transpose"):
                order = node.attrs.get("perm") or range(len(axes))[::-1]
                stack.append((node.outputs[0], tuple(axes[i] for i in order)))
            elif is_standard(node, "Identity", "Cast", "DequantizeLinear", "QuantizeLinear"):
                stack.append((node.outputs[0], axes))


def _channel_axis_at(node: gs.Node, tensor: gs.Tensor, rank: int) -> int | None:
    second = len(node.inputs) > 1 and node.inputs[1] is tensor
    if rank < 2:
        return None
    match node.op:
        case "Conv" if second:
            return 0
        case "ConvTranspose" if second:
            return 1
        case "Gemm" if second:
            return 0 if node.attrs.get("transB") else 1
        case "Gemm":
            return 1 if node.attrs.get("transA") else 0
        case "MatMul":
            return rank - 1 if second else rank - 2
        case "LSTM" | "GRU" | "RNN":
            return 1
        case "Gather" if not second:
            return rank - 1
    return None
