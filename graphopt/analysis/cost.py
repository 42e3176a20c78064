"""What each node costs by its shapes: multiply-accumulates (MACs), bytes moved, parameters.

MACs are those of matrix products, in whatever form: convolutions, recurrences, attention.  Elementwise operators,
reductions and normalisations have none: what they cost is bytes.  A size that shapes do not tell is None, and
counts as unknown in every sum; it is never taken as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import constant_node, node_values, scalar_of
from graphopt.analysis.shapes import Shapes
from graphopt.errors import ModelError
from graphopt.model import Model
from graphopt.ops import STANDARD_DOMAINS
from graphopt.tensors import byte_size, onnx_dtype

Shape: TypeAlias = tuple[int, ...]

ORT_DOMAINS = frozenset({"com.microsoft", "com.microsoft.nchwc"})


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node; a node with subgraphs costs what they cost.

    Attributes:
        macs: multiply-accumulates, None where unknown.
        bytes: read and written, weights included; None where unknown.
        parameters: elements of its constant inputs (a constant that others read too counts at each).
        parameter_bytes: their bytes.
    """

    macs: int | None
    bytes: int | None
    parameters: int = 0
    parameter_bytes: int = 0


@dataclass(frozen=True)
class Observation:
    """What one run of the model showed, by the id of the model's own objects.

    Attributes:
        shapes: tensor -> its shape (inside a loop: in the last turn).
        calls: node -> how often it ran; one that is not here did not run.
    """

    shapes: Mapping[int, Shape]
    calls: Mapping[int, int]


class Costs:
    """Cost of every node of the main graph and its subgraphs (function bodies have no shapes: not in it)."""

    def __init__(self, main: Sequence[gs.Node], found: Mapping[int, NodeCost]) -> None:
        self._main = main
        self._found = found

    def of(self, node: gs.Node) -> NodeCost:
        """Return the cost of a node; all unknown for one in a function body."""
        return self._found.get(id(node), NodeCost(None, None))

    @property
    def macs(self) -> int:
        """Known MACs of one run: at least so many, when `unknown` is not empty."""
        return sum(self.of(node).macs or 0 for node in self._main)

    @property
    def bytes(self) -> int:
        """Known bytes read and written in one run: at least so many, when any node's are unknown."""
        return sum(self.of(node).bytes or 0 for node in self._main)

    @property
    def unknown(self) -> list[gs.Node]:
        """Nodes of the main graph whose MACs are unknown."""
        return [node for node in self._main if self.of(node).macs is None]


def costs(
    model: Model,
    shapes: Shapes | Sizes | None = None,
    *,
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> Costs:
    """Return the cost of every node.

    Args:
        model: whose nodes.
        shapes: its tensors' shapes, when already inferred; `Sizes` with what a run showed, if there was one.
        inputs: input name -> shape, where the model leaves dimensions open and `shapes` is not given.
    """
    found: dict[int, NodeCost] = {}
    sizes = shapes if isinstance(shapes, Sizes) else Sizes(shapes if shapes is not None else Shapes(model, inputs))
    functions = {(f.domain or "", f.name) for f in model.functions}
    _Counter(sizes, functions, found).graph(model.graph)
    return Costs(list(model.graph.nodes), found)


class Sizes:
    """Concrete shapes: inferred ones first, then those that a run showed, with branches taken and turns of loops."""

    def __init__(self, shapes: Shapes, observed: Observation | None = None) -> None:
        self._shapes = shapes
        self.observed = observed

    def of(self, tensor: gs.Tensor) -> Shape | None:
        """Return the shape of a tensor, None where unknown."""
        static = self._shapes.of(tensor).static
        return self.observed.shapes.get(id(tensor)) if static is None and self.observed is not None else static

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """Return the type of a tensor, None where unknown."""
        return self._shapes.of(tensor).dtype

    def shown(self, tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
        """Return the shape as far as it is known, symbols included."""
        static = self.of(tensor)
        return self._shapes.of(tensor).shape if static is None else static

    def bytes(self, tensor: gs.Tensor) -> int | None:
        """Return the bytes of a tensor, None where shape or type are unknown, and for strings."""
        shape, dtype = self.of(tensor), self._shapes.of(tensor).dtype
        if shape is None or dtype is None or dtype.kind in "OSU":
            return None
        try:
            return byte_size(onnx_dtype(dtype), shape, tensor.name)
        except ModelError:
            return None


class View:
    """A node as rules see it: concrete shapes of its inputs and outputs, or None."""

    def __init__(self, node: gs.Node, sizes: Sizes) -> None:
        self.node = node
        self.attrs: Mapping[str, Any] = node.attrs
        self._sizes = sizes

    def input(self, index: int) -> Shape | None:
        """Return the shape of an input, None where unknown or left out."""
        tensors = self.node.inputs
        return self._sizes.of(tensors[index]) if index < len(tensors) and tensors[index].name else None

    def output(self, index: int = 0) -> Shape | None:
        """Return the shape of an output, None where unknown."""
        return self._sizes.of(self.node.outputs[index]) if index < len(self.node.outputs) else None


Rule: TypeAlias = Callable[[View], int | None]


def _convolution(weight: int) -> Rule:
    """Each output element takes one filter: Cin / group · kernel."""

    def rule(view: View) -> int | None:
        return _times(_size(view.output()), _size_after(view.input(weight), 1))

    return rule


def _transposed(view: View) -> int | None:
    """Each input element goes through one filter: Cout / group · kernel."""
    return _times(_size(view.input(0)), _size_after(view.input(1), 1))


def _product(left: int = 0) -> Rule:
    """Each output element takes the row of the left matrix."""

    def rule(view: View) -> int | None:
        shape = view.input(left)
        inner = 0 if view.attrs.get("transA") and shape is not None and len(shape) > 1 else 1
        return None if not shape else _times(_size(view.output()), shape[-1 - (1 - inner)])

    return rule


def _block_quantized(view: View) -> int | None:
    """MatMulNBits: N columns and K rows are attributes."""
    return _times(_size(view.output()), view.attrs.get("K"))


def _einsum(view: View) -> int | None:
    """One or two operands: the product of all letters' sizes, if any is summed over two operands."""
    equation = str(view.attrs.get("equation", "")).replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if len(terms) == 1:
        return 0
    shapes = [view.input(i) for i in range(len(terms))]
    if (
        len(terms) != 2
        or "..." in equation
        or any(s is None or len(s) != len(t) for s, t in zip(shapes, terms, strict=True))
    ):
        return None
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape or (), strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    return math.prod(sizes.values())


def _recurrent(view: View) -> int | None:
    """Every step of every sequence takes all of W and R, in each direction."""
    sequence, weights, recurrence = view.input(0), view.input(1), view.input(2)
    if sequence is None or weights is None or recurrence is None or len(sequence) != 3:
        return None
    return sequence[0] * sequence[1] * (math.prod(weights) + math.prod(recurrence))


def _attention(view: View) -> int | None:
    """Standard Attention (opset 23): QKᵀ and its product with V, the past included; 3-D inputs hold all heads."""
    query, key, value, past = view.input(0), view.input(1), view.input(2), view.input(4)
    if query is None or key is None or value is None:
        return None
    if len(query) == 4 and len(key) == 4 and len(value) == 4:
        batch, heads, rows, depth = query
        columns, wide = key[2], value[3]
    elif len(query) == 3 and view.attrs.get("q_num_heads") and view.attrs.get("kv_num_heads"):
        heads = int(view.attrs["q_num_heads"])
        batch, rows, depth = query[0], query[1], query[2] // heads
        columns, wide = key[1], value[2] // int(view.attrs["kv_num_heads"])
    else:
        return None
    columns += past[2] if past is not None and len(past) == 4 else 0
    return batch * heads * rows * columns * (depth + wide)


def _packed_attention(view: View) -> int | None:
    """ORT's Attention: one projection to Q, K and V, then both products."""
    source, weights = view.input(0), view.input(1)
    if source is None or weights is None or len(source) != 3 or view.node.attrs.get("past_present_share_buffer"):
        return None
    batch, rows, _ = source
    return batch * rows * math.prod(weights) + 2 * batch * rows * rows * (weights[1] // 3)


def _multi_head(view: View) -> int | None:
    """ORT's MultiHeadAttention with separate 3-D query, key, value."""
    query, key, value = view.input(0), view.input(1), view.input(2)
    if query is None or key is None or value is None or not len(query) == len(key) == len(value) == 3:
        return None
    return query[0] * query[1] * key[1] * (query[2] + value[2])


MACS: Mapping[tuple[str, str], Rule] = {
    ("", "Conv"): _convolution(1),
    ("", "ConvInteger"): _convolution(1),
    ("", "DeformConv"): _convolution(1),
    ("", "QLinearConv"): _convolution(3),
    ("", "ConvTranspose"): _transposed,
    ("", "Gemm"): _product(),
    ("", "MatMul"): _product(),
    ("", "MatMulInteger"): _product(),
    ("", "QLinearMatMul"): _product(),
    ("", "Einsum"): _einsum,
    ("", "LSTM"): _recurrent,
    ("", "GRU"): _recurrent,
    ("", "RNN"): _recurrent,
    ("", "Attention"): _attention,
    ("com.microsoft", "FusedConv"): _convolution(1),
    ("com.microsoft", "NhwcFusedConv"): _convolution(1),
    ("com.microsoft", "QLinearConv"): _convolution(3),
    ("com.microsoft", "FusedGemm"): _product(),
    ("com.microsoft", "FusedMatMul"): _product(),
    ("com.microsoft", "QGemm"): _product(),
    ("com.microsoft", "MatMulIntegerToFloat"): _product(),
    ("com.microsoft", "DynamicQuantizeMatMul"): _product(),
    ("com.microsoft", "MatMulNBits"): _block_quantized,
    ("com.microsoft", "DynamicQuantizeLSTM"): _recurrent,
    ("com.microsoft", "Attention"): _packed_attention,
    ("com.microsoft", "MultiHeadAttention"): _multi_head,
    ("com.microsoft.nchwc", "Conv"): _convolution(1),
}
"""(domain, operator) -> MACs.  A standard operator that is neither here nor in `UNRULED` has none."""

UNRULED = frozenset({"DFT", "STFT", "SequenceMap", "LinearAttention", "CausalConvWithState", "FlexAttention"})
"""Standard operators that multiply and accumulate in a way that has no rule: unknown."""

ORT_WITHOUT_MACS = frozenset(
    {
        "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "BiasAdd", "BiasSoftmax", "LayerNormalization",
        "SkipLayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
        "EmbedLayerNormalization", "RotaryEmbedding", "QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearMul",
        "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearConcat", "QLinearAveragePool",
        "QLinearGlobalAveragePool", "QLinearWhere", "QLinearReduceMean", "DynamicQuantizeLinear", "Inverse", "Pad",
        "ReorderInput", "ReorderOutput", "GridSample", "GroupNorm", "Unique", "ExpandDims", "CropAndResize",
        "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "Upsample", "GatherND", "Trilu",
    }
)  # fmt: skip
"""Contrib operators known to have no matrix product in them."""

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Constant"})
"""Nothing is read or written: the output is the input's memory (or, for Constant, a weight)."""

PICKS = frozenset({"Gather", "GatherElements", "GatherND", "Slice", "Shape", "Size"})
"""Of the first input, only what comes out is read (of Shape and Size nothing)."""


class _Counter:
    """Costs the nodes of a graph, inner graphs first."""

    def __init__(self, sizes: Sizes, functions: set[tuple[str, str]], found: dict[int, NodeCost]) -> None:
        self.sizes, self.functions, self.found = sizes, functions, found

    def graph(self, graph: gs.Graph) -> None:
        """Cost every node of `graph`."""
        for node in graph.nodes:
            self.found[id(node)] = self._node(node)

    def _node(self, node: gs.Node) -> NodeCost:
        inner = [a for a in node.attrs.values() if isinstance(a, gs.Graph)]
        for graph in inner:
            self.graph(graph)
        parameters = list(_parameters(node))
        size = sum(math.prod(values.shape) for values in parameters)
        weight = sum(int(values.nbytes) for values in parameters)
        if inner:
            return NodeCost(*self._repeated(node, inner), size, weight)
        return NodeCost(self._macs(node), self._bytes(node), size, weight)

    def _macs(self, node: gs.Node) -> int | None:
        domain = "" if node.domain in STANDARD_DOMAINS else str(node.domain)
        if (domain, node.op) in self.functions:
            return None
        rule = MACS.get((domain, node.op))
        if rule is not None:
            return rule(View(node, self.sizes))
        counted = node.op not in UNRULED if not domain else domain in ORT_DOMAINS and node.op in ORT_WITHOUT_MACS
        return 0 if counted else None

    def _repeated(self, node: gs.Node, inner: Sequence[gs.Graph]) -> tuple[int | None, int | None]:
        """Return MACs and bytes of a node with subgraphs.

        As observed; else those of the dearer branch, or of the body times its turns.
        """
        observed = self.sizes.observed
        if observed is not None and id(node) in observed.calls:
            calls = observed.calls[id(node)]
            ran = [
                (self.found[id(n)], observed.calls[id(n)]) for g in inner for n in g.nodes if id(n) in observed.calls
            ]
            macs, moved = _sum(_times(c.macs, k) for c, k in ran), _sum(_times(c.bytes, k) for c, k in ran)
            return None if macs is None else macs // calls, None if moved is None else moved // calls
        bodies = [[self.found[id(n)] for n in g.nodes] for g in inner]
        each = [(_sum(c.macs for c in body), _sum(c.bytes for c in body)) for body in bodies]
        if node.op == "If":
            return _largest(m for m, _ in each), _largest(b for _, b in each)
        turns = self._turns(node)
        return _times(each[0][0], turns), _times(each[0][1], turns)

    def _turns(self, node: gs.Node) -> int | None:
        if node.op == "Loop" and (len(node.inputs) < 2 or not node.inputs[1].name):
            count = scalar_of(node.inputs[0]) if node.inputs else None
            return int(count) if count is not None else None
        return self._scan_length(node) if node.op == "Scan" else None

    def _scan_length(self, node: gs.Node) -> int | None:
        scanned = int(node.attrs.get("num_scan_inputs", 0))
        axes = node.attrs.get("scan_input_axes") or [0]
        if not 0 < scanned <= len(node.inputs):
            return None
        shape = self.sizes.of(node.inputs[len(node.inputs) - scanned])
        return shape[axes[0]] if shape is not None and -len(shape) <= axes[0] < len(shape) else None

    def _bytes(self, node: gs.Node) -> int | None:
        standard = node.domain in STANDARD_DOMAINS
        if standard and node.op in VIEWS:
            return 0
        written = _sum(self.sizes.bytes(t) for t in node.outputs if t.name)
        read = list({id(t): t for t in node.inputs if t.name}.values())
        first = 1 if standard and node.op in PICKS else 0
        picked = written if first and node.op not in ("Shape", "Size") else 0
        return _sum([written, picked, *(self.sizes.bytes(t) for t in read[first:])])


def _parameters(node: gs.Node) -> Iterator[Any]:
    """Yield the constant inputs of a node, as values or lazy values (they have a shape, nothing is read)."""
    for tensor in {id(t): t for t in node.inputs}.values():
        if isinstance(tensor, gs.Constant):
            yield tensor._values
        elif (maker := constant_node(tensor)) is not None and (values := node_values(maker)) is not None:
            yield values


def _size(shape: Shape | None) -> int | None:
    return None if shape is None else math.prod(shape)


def _size_after(shape: Shape | None, axis: int) -> int | None:
    return None if shape is None else math.prod(shape[axis:])


def _times(a: int | None, b: int | None) -> int | None:
    if a == 0 or b == 0:
        return 0
    return None if a is None or b is None else int(a) * int(b)


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _largest(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if any(v is None for v in known) else max((v for v in known if v is not None), default=0)
