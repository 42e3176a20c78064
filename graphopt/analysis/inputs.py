"""What each model input is used for: which values are indices into what, which control the graph, which sizes fit.

An input is followed through operators that keep its values (casts, reshapes, slices …) into subgraphs and local
functions; what consumes it there says what it may hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.shapes import Shapes
from graphopt.model import Model

KEEPS_VALUES = frozenset({
    "Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Gather",
    "Concat",
    "Expand", "Tile", "Split", "Pad", "Where", "Max", "Min", "Clip", "GatherElements", "GatherND", "Compress",
    "SequenceInsert", "SequenceConstruct", "SequenceAt", "ConcatFromSequence", "SplitToSequence", "Optional",
    "OptionalGetElement", "ReduceMax", "ReduceMin",
})  # fmt: skip
"""Their output holds values of their first input (or of any, for those in `JOINS`)."""

JOINS = frozenset({"Concat", "Where", "Max", "Min", "SequenceConstruct"})

SAME_SHAPE = frozenset({
    "Cast", "CastLike", "Identity", "Clip", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Neg", "Abs", "Exp", "Sqrt",
    "Softplus", "HardSwish", "HardSigmoid", "Gelu", "Dropout", "QuantizeLinear", "DequantizeLinear", "Softmax", "Erf",
    "Not",
    "Add", "Sub", "Mul", "Div",
})  # fmt: skip
"""Their output has the shape of their first input, when the others are scalars or constants that broadcast to it."""

INDICES = {
    ("Gather", 1): 0, ("GatherElements", 1): 0, ("GatherND", 1): 0, ("Scatter", 1): 0, ("ScatterElements", 1): 0,
    ("ScatterND", 1): 0, ("EmbedLayerNormalization", 0): 2, ("EmbedLayerNormalization", 1): 4,
    ("SkipLayerNormalization", -1): 0, ("TensorScatter", 2): 0,
}  # fmt: skip
"""(operator, input that holds indices) -> the input that they point into."""

COMPARES = frozenset({"Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"})

CONTROLS = {
    ("If", 0): "condition", ("Loop", 0): "trip-count", ("Loop", 1): "true", ("Reshape", 1): "reshape",
    ("Expand", 1): "expand", ("Tile", 1): "tile", ("ConstantOfShape", 0): "shape", ("Slice", 1): "starts",
    ("Slice", 2): "ends", ("Slice", 3): "axes", ("Slice", 4): "ones", ("TopK", 1): "k", ("Resize", 1): "roi",
    ("Resize", 2): "scales", ("Upsample", 1): "scales", ("Resize", 3): "sizes", ("Range", 0): "zeros",
    ("Range", 1): "limit", ("Range", 2): "ones", ("Pad", 1): "pads", ("Pad", 3): "axes", ("Unsqueeze", 1): "new-axes",
    ("Squeeze", 1): "one-axes", ("Split", 1): "split", ("SplitToSequence", 1): "split", ("CumSum", 1): "zeros",
    ("CumProd", 1): "zeros",
    ("OneHot", 1): "depth", ("Trilu", 1): "zeros", ("Dropout", 1): "zeros", ("Dropout", 2): "false", ("Clip", 1): "low",
    ("Clip", 2): "high", ("RNN", 4): "lengths", ("LSTM", 4): "lengths", ("GRU", 4): "lengths",
    ("ReverseSequence", 1): "lengths", ("SequenceAt", 1): "zeros", ("SequenceInsert", 2): "zeros",
    ("SequenceErase", 1): "zeros", ("NonMaxSuppression", 2): "k", ("NonMaxSuppression", 3): "half",
    ("NonMaxSuppression", 4): "zeros", ("BitShift", 1): "small", ("DFT", 1): "length", ("DFT", 2): "ones",
    ("HannWindow", 0): "length", ("HammingWindow", 0): "length", ("BlackmanWindow", 0): "length",
    ("MelWeightMatrix", 0): "length", ("MelWeightMatrix", 1): "length-2", ("MelWeightMatrix", 2): "rate",
    ("MelWeightMatrix", 3): "zeros", ("MelWeightMatrix", 4): "quarter-rate", ("CenterCropPad", 1): "output-shape",
    ("AffineGrid", 1): "output-shape", ("Col2Im", 1): "output-tail", ("RoiAlign", 2): "zeros", ("STFT", 1): "stride",
    ("STFT", 3): "length", ("BatchNormalization", 4): "positive", ("QuantizeLinear", 1): "positive",
    ("DequantizeLinear", 1): "positive", ("QLinearMatMul", 1): "positive", ("QLinearMatMul", 4): "positive",
    ("QLinearMatMul", 6): "positive", ("QLinearConv", 1): "positive", ("QLinearConv", 4): "positive",
    ("QLinearConv", 6): "positive", ("Mod", 1): "positive", ("Bernoulli", 0): "fractions", ("GridSample", 1): "unit",
    ("Log", 0): "positive", ("Sqrt", 0): "positive", ("Acosh", 0): "above-one", ("Asin", 0): "unit",
    ("Acos", 0): "unit",
    ("Atanh", 0): "unit", ("Attention", 6): "lengths", ("MaxUnpool", 1): "distinct", ("MaxUnpool", 2): "output-shape",
    **{(f"Reduce{kind}", 1): "reduced-axes" for kind in (
        "Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")},
}  # fmt: skip
"""(operator, input) -> what its values control; `random_values` knows what to put there."""


@dataclass(frozen=True)
class Control:
    """One place where an input controls the graph."""

    kind: str
    node: gs.Node
    slot: int


@dataclass
class InputUse:
    """What an input is used for.

    Attributes:
        bounds: exclusive upper bounds of indices.
        open_bounds: tensors and axes that indices point into, where the size is not known from the graph.
        controls: places where it controls the graph.
        constants: numbers that it is compared with.
        pins: axis -> the size that a weight asks for.
    """

    bounds: list[int] = field(default_factory=list)
    open_bounds: list[tuple[gs.Tensor, int]] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    pins: dict[int, int] = field(default_factory=dict)

    @property
    def is_index(self) -> bool:
        """Whether it holds indices."""
        return bool(self.bounds or self.open_bounds)


@dataclass(frozen=True)
class _At:
    """A tensor on the way: does it still hold the input's values, has it still its shape?"""

    tensor: gs.Tensor
    values: bool
    shaped: bool
    shift: float = 0.0


class InputUses:
    """Uses of all inputs of a model, by input name."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shapes = Shapes(model)
        self._functions = {(f.domain or "", f.name): f for f in model.functions}
        self.by_name = {tensor.name: self._follow(tensor) for tensor in model.graph.inputs}

    def _follow(self, tensor: gs.Tensor) -> InputUse:
        use = InputUse()
        stack, seen = [_At(tensor, True, True)], set()
        while stack:
            at = stack.pop()
            key = (id(at.tensor), at.values, at.shaped)
            if key in seen:
                continue
            seen.add(key)
            for node in {id(n): n for n in at.tensor.outputs}.values():
                for slot, used in enumerate(node.inputs):
                    if used is at.tensor:
                        stack += self._consume(use, node, slot, at)
        return use

    def _consume(self, use: InputUse, node: gs.Node, slot: int, at: _At) -> Iterator[_At]:
        """Note what a consumer says of the input; yield the tensors where it goes on."""
        inner = self._inner_input(node, slot)
        if inner is not None:
            yield _At(inner, at.values, at.shaped and node.op != "Scan", at.shift)
        if at.values:
            self._note_values(use, node, slot, at.shift)
        if at.shaped:
            use.pins.update({a: n for a, n in self._pins(node, slot, at.tensor) if a not in use.pins})
        if inner is None and node.outputs:
            yield from self._through(node, slot, at)

    def _through(self, node: gs.Node, slot: int, at: _At) -> Iterator[_At]:
        values = at.values and node.op in KEEPS_VALUES and (slot == 0 or node.op in JOINS)
        shift = at.shift
        if at.values and node.op in ("Add", "Sub") and len(node.inputs) == 2:
            other = scalar(node.inputs[1 - slot])
            if other is not None and (node.op == "Add" or slot == 0):
                values, shift = True, shift + (other if node.op == "Add" else -other)
        others = [t for i, t in enumerate(node.inputs) if i != slot]
        shaped = at.shaped and node.op in SAME_SHAPE and all(isinstance(t, gs.Constant) for t in others)
        if values or shaped:
            for output in node.outputs:
                yield _At(output, values, shaped and output is node.outputs[0], shift)

    def _inner_input(self, node: gs.Node, slot: int) -> gs.Tensor | None:
        """Return the formal input that receives this one, in a loop's body or a local function."""
        function = self._functions.get((node.domain or "", node.op))
        if function is not None:
            return function.inputs[slot] if slot < len(function.inputs) else None
        body = node.attrs.get("body")
        if node.op == "Loop" and slot >= 2 and isinstance(body, gs.Graph) and slot < len(body.inputs):
            return body.inputs[slot]
        if node.op in ("Scan", "SequenceMap") and isinstance(body, gs.Graph):
            slot -= len(node.inputs) - len(body.inputs)  # Scan-8 has sequence lengths first
            return body.inputs[slot] if 0 <= slot < len(body.inputs) else None
        return None

    def _note_values(self, use: InputUse, node: gs.Node, slot: int, shift: float) -> None:
        if (node.op, slot) in INDICES:
            self._note_index(use, node, slot, shift)
        elif node.op == "OneHot" and slot == 0:
            depth = scalar(node.inputs[1])
            if depth is not None:
                use.bounds.append(max(1, int(depth - shift)))
        elif (node.op, slot) in CONTROLS:
            use.controls.append(Control(CONTROLS[node.op, slot], node, slot))
        elif node.op in COMPARES:
            other = scalar(node.inputs[1 - slot])
            table = table_behind(node.inputs[1 - slot])
            if other is not None:
                use.constants.append(other - shift)
            elif node.op == "Equal" and table is not None and table.min() >= 0:
                use.bounds.append(max(1, int(table.max() + 1 - shift)))  # one-hot, written as a comparison

    def _note_index(self, use: InputUse, node: gs.Node, slot: int, shift: float) -> None:
        target = INDICES[node.op, slot]
        if target >= len(node.inputs):
            return
        data = node.inputs[target]
        shape = self.shapes.of(data).shape
        if node.op in ("GatherND", "ScatterND"):
            first = int(node.attrs.get("batch_dims", 0))
            last = self.shapes.of(node.inputs[slot]).shape
            depth = last[-1] if last and isinstance(last[-1], int) else 1
            axes = list(range(first, first + depth))
        else:
            axes = [int(node.attrs.get("axis", 0))]
        for axis in axes:
            size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
            if isinstance(size, int):
                use.bounds.append(max(1, int(size - shift)))
            else:
                use.open_bounds.append((data, axis))

    def _pins(self, node: gs.Node, slot: int, tensor: gs.Tensor) -> Iterator[tuple[int, int]]:
        """Yield (axis, size) that a weight beside the tensor asks for."""
        shape = self.shapes.of(tensor).shape
        rank = None if shape is None else len(shape)
        others = [tuple(t.shape) if isinstance(t, gs.Constant) else None for t in node.inputs]
        weight = others[1] if slot == 0 and len(others) > 1 else None
        if weight is not None and rank is not None:
            yield from weight_pins(node, weight, rank)
        if node.op in ("Add", "Sub", "Mul", "Div", "Pow", "PRelu") and len(others) == 2 and rank is not None:
            constant = others[1 - slot]
            for back in range(1, min(rank, len(constant)) + 1 if constant else 0):
                if constant is not None and constant[-back] > 1:
                    yield rank - back, constant[-back]
        if node.op in ("LSTM", "GRU", "RNN") and slot in (5, 6) and len(others) > 2 and others[2] is not None:
            yield 0, others[2][0]
            yield 2, others[2][2]


def weight_pins(node: gs.Node, weight: tuple[int, ...], rank: int) -> Iterator[tuple[int, int]]:
    """Yield (axis, size) of a node's first input of this rank, from the shape of its second, a constant."""
    if node.op in ("Conv", "ConvInteger", "QLinearConv") and rank > 1 and len(weight) == rank:
        yield 1, weight[1] * int(node.attrs.get("group", 1))
    elif node.op == "ConvTranspose" and rank > 1:
        yield 1, weight[0]
    elif node.op in ("MatMul", "MatMulInteger") and rank > 0 and len(weight) > 1:
        yield rank - 1, weight[-2]
    elif node.op == "Gemm" and rank == 2 and len(weight) == 2:
        axis = 0 if node.attrs.get("transA", 0) else 1
        yield axis, weight[1] if node.attrs.get("transB", 0) else weight[0]
    elif node.op in ("LSTM", "GRU", "RNN") and rank == 3 and len(weight) == 3:
        yield 2, weight[2]
    elif node.op in ("BatchNormalization", "InstanceNormalization") and rank > 1 and len(weight) == 1:
        yield 1, weight[0]
    elif node.op in ("LayerNormalization", "RMSNormalization") and rank > 0 and weight:
        yield rank - 1, weight[-1]


def table_behind(tensor: gs.Tensor) -> np.ndarray[Any, Any] | None:
    """Return the integer constant of several elements whose values a tensor repeats; None if there is none."""
    while isinstance(tensor, gs.Variable) and tensor.inputs and tensor.inputs[0].op in KEEPS_VALUES - JOINS:
        tensor = tensor.inputs[0].inputs[0]
    if not isinstance(tensor, gs.Constant) or tensor.dtype is None or np.dtype(tensor.dtype).kind not in "iu":
        return None
    values = np.asarray(tensor.values)
    return values if values.size > 1 else None


def scalar(tensor: Any) -> float | None:
    """Return the number that a one-element constant holds, a Constant node's included; None otherwise."""
    if isinstance(tensor, gs.Variable) and tensor.inputs and tensor.inputs[0].op == "Constant":
        attrs = tensor.inputs[0].attrs
        found = next((attrs[key] for key in ("value", "value_int", "value_float") if key in attrs), None)
        if isinstance(found, int | float):
            return float(found)
        tensor = found
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) != 1:
        return None
    values = np.asarray(tensor.values)
    return float(values.reshape(-1)[0]) if values.dtype.kind in "iufb" else None
