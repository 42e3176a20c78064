"""Where codes go: a graph, and the layers that are to run on integers -> which tensors are quantized, and together.

    layers    what does the work (Conv, MatMul, Gemm); the caller chooses
    followers what has an integer kernel and lies between integer neighbours (Add, Concat, pools, reshapes …)
    folded    Relu and Clip right behind an integer kernel: saturation stands for them

A follower joins where every operand comes from an integer kernel (small ones excepted) and an integer kernel reads its
result: so nothing is quantized only to be dequantized again.  Codes are shared along what only moves values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant, parameter
from graphopt.analysis.shapes import Shapes
from graphopt.edit import is_output, label, nested_graphs
from graphopt.ops import DEQUANTIZE, QUANTIZE, is_standard
from graphopt.targets import FOLDED, INTEGER_FORMS, OUTPUT_AXIS, SMALL_OPERAND, IntegerForm

FLOAT: np.dtype[Any] = np.dtype(np.float32)


@dataclass(frozen=True)
class Layer:
    """A node that could run on integers, or the reason why it cannot."""

    node: gs.Node
    label: str
    why_not: str = ""


@dataclass
class Coded:
    """A tensor that gets a code.

    Attributes:
        tensor: in the graph.
        replaced: whether all that read it read the dequantized one; else integer kernels only do.
        readers: integer kernels that read it.
        group: number of the group that shares its code.
    """

    tensor: gs.Tensor
    replaced: bool
    readers: list[gs.Node] = field(default_factory=list)
    group: int = 0


@dataclass
class Placement:
    """Where codes go.

    Attributes:
        integer: nodes that are to be integer kernels, in the graph's order.
        coded: tensors that get a code, by id.
        folded: id of an integer kernel's raw output -> the activation behind it that goes.
    """

    integer: list[gs.Node]
    coded: dict[int, Coded]
    folded: dict[int, gs.Node]

    def output(self, node: gs.Node) -> gs.Tensor:
        """Return what an integer kernel computes, a folded activation included."""
        return result(node, self.folded)

    def is_folded(self, node: gs.Node) -> bool:
        """Tell whether a node is an activation that goes."""
        return is_folded(node, self.folded)

    @property
    def groups(self) -> dict[int, list[Coded]]:
        """Tensors by the group that shares a code."""
        found: dict[int, list[Coded]] = {}
        for coded in self.coded.values():
            found.setdefault(coded.group, []).append(coded)
        return found


def result(node: gs.Node, folded: Mapping[int, gs.Node]) -> gs.Tensor:
    """Return a node's first output, behind an activation that is folded into it."""
    activation = folded.get(id(node.outputs[0]))
    return node.outputs[0] if activation is None else activation.outputs[0]


def is_folded(node: gs.Node, folded: Mapping[int, gs.Node]) -> bool:
    """Tell whether a node is an activation that is folded into the one before it."""
    return bool(node.inputs) and id(folded.get(id(node.inputs[0]))) == id(node)


def layers(graph: gs.Graph, shapes: Shapes, provider: str) -> list[Layer]:
    """Return the nodes of a graph that do the work, each with the reason why it cannot be an integer kernel, if any."""
    forms = INTEGER_FORMS.get(provider, {})
    found = []
    for node in graph.nodes:
        form = forms.get(node.op) if is_standard(node) else None
        if form is not None and form.weight is not None:
            found.append(Layer(node, label(node), _why_not(node, form, shapes)))
    return found


def _why_not(node: gs.Node, form: IntegerForm, shapes: Shapes) -> str:
    inputs = node.inputs[: form.inputs]
    if any(is_standard(p, *DEQUANTIZE) for t in node.inputs for p in t.inputs):
        return "it is quantized already"
    kinds = [shapes.proved(t).dtype for t in inputs]
    if any(kind != FLOAT for kind in kinds):
        kind = next(kind for kind in kinds if kind != FLOAT)
        return f"it computes on {kind.name if kind is not None else 'a type that is not known'}, not on float32"
    if is_constant(node.inputs[0]):
        return "its first operand is a constant"
    weight = node.inputs[form.weight or 0]
    if not is_constant(weight):
        return "" if node.op == "MatMul" else "its weight is computed"
    if not isinstance(weight, gs.Constant):
        return "its weight is not an initializer (canonicalize makes it one)"
    if node.op == "MatMul" and len(weight.shape) != 2:
        return f"its weight has rank {len(weight.shape)}"
    return _why_not_bias(node, form, weight)


def _why_not_bias(node: gs.Node, form: IntegerForm, weight: gs.Constant) -> str:
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0):
        return "alpha or beta is not 1"
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        return "its first operand is transposed"
    if form.bias is None or len(node.inputs) <= form.bias or not node.inputs[form.bias].name:
        return ""
    bias = node.inputs[form.bias]
    if not isinstance(bias, gs.Constant):
        return "its bias is computed"
    channels = weight.shape[output_axis(node)]
    if int(np.prod(bias.shape, dtype=np.int64)) != channels or bias.shape[-1] != channels:
        return "its bias is not one number per output channel"
    return ""


def output_axis(node: gs.Node) -> int:
    """Return the axis of a layer's weight that is its output channel, counted from the front."""
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    weight = node.inputs[1]
    if weight.shape is None and weight.inputs:  # codes from elsewhere, and nobody has inferred shapes
        weight = weight.inputs[0].inputs[0]
    return OUTPUT_AXIS[node.op] % len(weight.shape)


def place(
    graph: gs.Graph, chosen: Iterable[gs.Node], shapes: Shapes, provider: str, opset: int,
    avoid: Collection[str] = (),
) -> Placement:  # fmt: skip
    """Return where codes go when the chosen layers run on integers; no follower is to touch tensors in `avoid`."""
    placer = _Placer(graph, list(chosen), shapes, provider, opset)
    placer.avoid = avoid
    return placer.place()


class _Placer:
    """Finds followers, folded activations, and the tensors that get codes."""

    def __init__(self, graph: gs.Graph, chosen: list[gs.Node], shapes: Shapes, provider: str, opset: int) -> None:
        self.graph, self.shapes, self.opset = graph, shapes, opset
        self.forms = INTEGER_FORMS.get(provider, {})
        self.layers = {id(n) for n in chosen}
        self.local = {id(n) for n in graph.nodes}
        self.integer = set(self.layers)
        self.folded: dict[int, gs.Node] = {}
        self.coded: dict[int, Coded] = {}
        self.avoid: Collection[str] = ()

    def place(self) -> Placement:
        self.integer |= {id(n) for n in self.graph.nodes if self._may_follow(n)}
        self._fold(n for n in self.graph.nodes if id(n) in self.integer)
        self._settle()
        self._drop_unused_folds()
        integer = [n for n in self.graph.nodes if id(n) in self.integer]
        for node in integer:
            self._code(node)
        self._group(integer)
        return Placement(integer, self.coded, self.folded)

    def _may_follow(self, node: gs.Node) -> bool:
        form = self.forms.get(node.op) if is_standard(node) else None
        if form is None or form.weight is not None or not self._is_float(node.outputs[0]):
            return False
        if not all(self._is_float(t) for t in self._operands(node)):
            return False
        if any(t.name in self.avoid for t in (*node.inputs, *node.outputs)):
            return False
        return node.op != "Resize" or str(node.attrs.get("mode", "nearest")) == "nearest"

    def _is_float(self, tensor: gs.Tensor) -> bool:
        kind = self.shapes.proved(tensor).dtype
        return bool(kind == FLOAT)

    def _operands(self, node: gs.Node) -> list[gs.Tensor]:
        """Return the inputs that must be quantized."""
        inputs = [t for t in node.inputs if t.name]
        count = self.forms[node.op].inputs
        return inputs[:count] if count else inputs

    def _fold(self, nodes: Iterable[gs.Node]) -> None:
        for node in nodes:
            raw = node.outputs[0]
            readers = list({id(n): n for n in raw.outputs}.values())
            if self.forms[node.op].keeps or len(readers) != 1 or is_output(self.graph, raw):
                continue
            if id(readers[0]) in self.local and is_standard(readers[0], *FOLDED) and self._around_zero(readers[0]):
                self.folded[id(raw)] = readers[0]

    def _around_zero(self, activation: gs.Node) -> bool:
        if activation.op == "Relu":
            return True
        low, high = (parameter(activation, name, self.opset) for name in ("min", "max"))
        for bound, sign in ((low, 1), (high, -1)):
            if bound is not None and (not isinstance(bound, np.ndarray) or bound.size != 1 or bound.item() * sign > 0):
                return False
        return True

    def _settle(self) -> None:
        """Drop followers until each has integer neighbours on both sides."""
        waiting = [n for n in self.graph.nodes if id(n) in self.integer and id(n) not in self.layers]
        while waiting:
            node = waiting.pop()
            if id(node) not in self.integer or self._belongs(node):
                continue
            self.integer.discard(id(node))
            self.folded.pop(id(node.outputs[0]), None)
            near = [*self._readers(node.outputs[0]), *(p for t in self._operands(node) for p in t.inputs)]
            near += [p for n in near for t in n.inputs for p in t.inputs if is_standard(n, *FOLDED)]
            near += [r for n in near if is_standard(n, *FOLDED) for r in self._readers(n.outputs[0])]
            waiting += [n for n in near if id(n) in self.integer and id(n) not in self.layers]

    def _belongs(self, node: gs.Node) -> bool:
        """Tell whether a follower has integer neighbours before and behind it."""
        if not self._read_by_integer(result(node, self.folded)):
            return False
        operands = self._operands(node)
        made = [self._made_by_integer(t) for t in operands]
        if not any(made):
            return False
        return all(fine or is_constant(t) or self._small(t, node) for fine, t in zip(made, operands, strict=True))

    def _readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        return list({id(n): n for n in tensor.outputs}.values())

    def _read_by_integer(self, tensor: gs.Tensor) -> bool:
        return any(id(n) in self.integer and any(t is tensor for t in self._operands(n)) for n in tensor.outputs)

    def _maker(self, tensor: gs.Tensor) -> Any:
        """Return the integer kernel that makes a tensor, a folded activation looked through; None where none does."""
        if not tensor.inputs:
            return None
        node = tensor.inputs[0]
        if is_folded(node, self.folded):
            node = node.inputs[0].inputs[0]
        return node if id(node) in self.integer else None

    def _made_by_integer(self, tensor: gs.Tensor) -> bool:
        return self._maker(tensor) is not None

    def _small(self, operand: gs.Tensor, node: gs.Node) -> bool:
        """Tell whether an operand broadcasts to a much larger result."""
        own, full = self.shapes.proved(operand).shape, self.shapes.proved(node.outputs[0]).shape
        if own is None or full is None or len(own) > len(full):
            return False
        aligned = (1,) * (len(full) - len(own)) + tuple(own)
        grown = [f for o, f in zip(aligned, full, strict=True) if o == 1 and f != 1]
        return bool(grown) and (
            not all(isinstance(f, int) for f in grown) or int(np.prod(grown, dtype=np.int64)) >= SMALL_OPERAND  # type: ignore[arg-type]
        )

    def _drop_unused_folds(self) -> None:
        """Keep an activation behind a kernel whose result stays float."""
        for node in self.graph.nodes:
            if id(node.outputs[0]) not in self.folded or id(node) not in self.integer:
                continue
            if not self.forms[node.op].needs_output and not self._read_by_integer(result(node, self.folded)):
                del self.folded[id(node.outputs[0])]

    def _code(self, node: gs.Node) -> None:
        form = self.forms[node.op]
        for tensor in self._operands(node):
            if not is_constant(tensor):
                self._coded(tensor).readers.append(node)
        if form.needs_output:
            for tensor in node.outputs if form.keeps else [result(node, self.folded)]:
                self._coded(tensor)

    def _coded(self, tensor: gs.Tensor) -> Coded:
        if id(tensor) not in self.coded:
            maker = self._maker(tensor)
            replaced = maker is not None and (self.forms[maker.op].needs_output or id(maker.outputs[0]) in self.folded)
            self.coded[id(tensor)] = Coded(tensor, replaced)
        return self.coded[id(tensor)]

    def _group(self, integer: Collection[gs.Node]) -> None:
        import networkx as nx  # noqa: PLC0415  (slow to import, for those who need it)

        shared = nx.Graph()
        shared.add_nodes_from(self.coded)
        for node in integer:
            if self.forms[node.op].keeps:
                source = id(node.inputs[0])
                shared.add_edges_from((source, id(t)) for t in node.outputs)
        for number, members in enumerate(nx.connected_components(shared)):
            for member in members:
                if member in self.coded:
                    self.coded[member].group = number


def is_quantized(graph: gs.Graph) -> bool:
    """Tell whether a graph has quantized values already."""
    return any(is_standard(node, *QUANTIZE, *DEQUANTIZE) for node in graph.nodes)


def inner_layers(graph: gs.Graph, provider: str) -> list[gs.Node]:
    """Return the layers in subgraphs, at any depth: what flows there cannot be measured from outside."""
    forms = INTEGER_FORMS.get(provider, {})
    inner = [node for sub in nested_graphs(graph.nodes) for node in sub.nodes]
    return [n for n in inner if is_standard(n) and n.op in forms and forms[n.op].weight is not None]
