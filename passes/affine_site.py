"""What the rules for affine maps share within one graph: shapes, constants, and nodes that are affine maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine, along, fits
from graphopt.analysis.constants import array_of, is_constant, refers
from graphopt.analysis.shapes import TensorType
from graphopt.base import Context
from graphopt.edit import Edit, label, make_node
from graphopt.ops import WEIGHTED, is_standard
from graphopt.tensors import is_float

Array = np.ndarray[Any, Any]
Shape = tuple[int | str | None, ...]

SHARED_BYTES = 1 << 20
"""Bytes above which a constant that others use, too, is not copied."""

MANY = 64
"""Readers of one tensor from which they are not looked through."""


@dataclass
class AffineSite:
    """One graph while its affine maps are being moved."""

    graph: gs.Graph
    ctx: Context
    edit: Edit
    weights: dict[int, Any] = field(default_factory=dict)
    own: dict[int, gs.Constant] = field(default_factory=dict)
    _maps: dict[int, tuple[gs.Node, Affine | None]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """The graph's operator set."""
        return int(self.graph.opset)

    def type_of(self, tensor: gs.Tensor) -> TensorType:
        """Return what is proved of a tensor."""
        return self.ctx.shapes.proved(tensor)

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """Return a tensor's shape as far as it is proved, or follows from the weight of what makes it."""
        shape = self.type_of(tensor).shape
        if shape is not None or len(tensor.inputs) != 1:
            return shape
        node = tensor.inputs[0]
        if not is_standard(node, *WEIGHTED) or len(node.inputs) < 2 or not is_constant(node.inputs[1]):
            return None
        axis, groups = WEIGHTED[node.op], int(node.attrs.get("group", 1)) if node.op == "ConvTranspose" else 1
        weight = constant_shape(node.inputs[1])
        if weight is None or refers(node):
            return None
        channels = weight[axis] * groups
        return (None, channels, *[None] * (len(weight) - 2))

    def rank(self, tensor: gs.Tensor) -> int | None:
        """Return how many axes a tensor has."""
        shape = self.shape(tensor)
        return None if shape is None else len(shape)

    def size(self, tensor: gs.Tensor, axis: int) -> int | None:
        """Return the size of an axis where it is a known number."""
        shape = self.shape(tensor)
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        return size if isinstance(size, int) else None

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """Return a tensor's element type."""
        return self.type_of(tensor).dtype

    def why_not_read(self, tensor: gs.Tensor, reader: gs.Node) -> str | None:
        """Return why `reader` does not have a tensor for itself, once."""
        if self.edit.is_output(tensor):
            return f"'{tensor.name}' is a graph output"
        if len(tensor.outputs) > MANY or len(self.edit.consumers(tensor)) != 1:
            others = [n for n in tensor.outputs[:MANY] if n is not reader and not self.edit.removed(n)]
            return f"'{tensor.name}' is read by {label(others[0]) if others else 'others'}, too"
        if sum(t is tensor for t in reader.inputs) != 1:
            return f"'{label(reader)}' reads '{tensor.name}' twice"
        return None

    def affine(self, node: gs.Node) -> Affine | None:
        """Return the map that a node does to its only computed input, None where it is no such node."""
        known = self._maps.get(id(node))
        if known is None:
            known = node, self._read(node)
            self._maps[id(node)] = known
        return known[1]

    def forget(self, node: gs.Node) -> None:
        """Read a node anew the next time: it was edited."""
        self._maps.pop(id(node), None)

    def _read(self, node: gs.Node) -> Affine | None:
        reader = READERS.get(node.op)
        if reader is None or not is_standard(node) or self.opset < 7 or refers(node):
            return None
        with np.errstate(all="ignore"):
            found = reader(self, node)
        return found if found is not None and found.finite else None

    def source(self, node: gs.Node) -> gs.Tensor:
        """Return the input of an affine node that is not constant."""
        return next(t for t in node.inputs if not is_constant(t))

    def constant(self, base: str, values: Array) -> gs.Constant:
        """Return a new constant, which this pass may edit again."""
        made = self.ctx.constant(base, values)
        self.own[id(made)] = made
        return made

    def put(self, node: gs.Node, index: int, base: str, values: Array) -> None:
        """Give a node a constant input, in place of one of this pass's own where it has one."""
        present = node.inputs[index] if index < len(node.inputs) else None
        if present is not None and id(present) in self.own and self.edit.consumers(present) == [node]:
            present.values = values
        else:
            self.edit.set_input(node, index, self.constant(base, values))

    def why_not_copy(self, constant: gs.Tensor) -> str | None:
        """Return why a constant must not be rewritten for one of those that read it."""
        held = array_of(constant)
        if held is not None and held.nbytes > SHARED_BYTES and len(constant.outputs) > 1:
            users = self.edit.consumers(constant) if len(constant.outputs) <= MANY else constant.outputs
            if len(users) > 1 or self.edit.is_output(constant):
                return f"'{constant.name}' ({held.nbytes} bytes) is used elsewhere, too"
        return None

    def renamed(self, tensor: gs.Tensor, suffix: str = "affine") -> gs.Variable:
        """Return a new tensor for other values of the type of `tensor`."""
        base = tensor.name if tensor.name.endswith(f"/{suffix}") else f"{tensor.name}/{suffix}"
        made = gs.Variable(self.ctx.fresh_name(base), dtype=tensor.dtype)
        self.ctx.shapes.learn(made, TensorType(self.dtype(tensor), self.shape(tensor)))
        return made

    def nodes_for(
        self, given: Affine, x: gs.Tensor, out: gs.Tensor, dtype: np.dtype[Any], like: Sequence[gs.Node]
    ) -> list[gs.Node]:
        """Return nodes that compute a map (not the identity) of `x` into `out`."""
        names = [n.name for n in like if n.name] or [f"{out.name}/affine"]
        if any(n.op == "BatchNormalization" for n in like) and (norm := self._norm(given, x, out, dtype, like)):
            return [norm]

        def node(op: str, operands: list[gs.Tensor], result: gs.Tensor, name: str) -> gs.Node:
            return make_node(op, operands, [result], name=name, like=like)

        def constant(values: Array, kind: str) -> gs.Constant:
            return self.constant(f"{out.name}/{kind}", _stripped(values).astype(dtype))

        if not given.scales:
            return [node("Add", [x, constant(given.shift, "shift")], out, names[-1])]
        if not given.shifts:
            return [node("Mul", [x, constant(given.scale, "scale")], out, names[0])]
        if given.scale.ndim == 0 and given.scale == -1:
            return [node("Sub", [constant(given.shift, "shift"), x], out, names[-1])]
        middle = self.renamed(out, "scaled")
        last = names[-1] if len(names) > 1 else self.ctx.fresh_name(f"{names[0]}/shift")
        return [
            node("Mul", [x, constant(given.scale, "scale")], middle, names[0]),
            node("Add", [middle, constant(given.shift, "shift")], out, last),
        ]

    def _norm(
        self, given: Affine, x: gs.Tensor, out: gs.Tensor, dtype: np.dtype[Any], like: Sequence[gs.Node]
    ) -> gs.Node | None:
        size = self.size(x, 1)
        both = None if size is None else given.vectors(1, size)
        if both is None:
            return None
        name = next(n.name for n in like if n.op == "BatchNormalization")
        return norm_node(self, both, x, out, dtype, name=name, like=like)

    def cost(self, given: Affine, like: Sequence[gs.Node] = ()) -> int:
        """Return how many nodes a map takes."""
        if any(n.op == "BatchNormalization" for n in like) and not given.varies_beside(1):
            return 0 if given.identity else 1
        reversed_ = given.scale.ndim == 0 and given.scale == -1
        return 1 if reversed_ else int(given.scales) + int(given.shifts)


def constant_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Return the shape of a constant, without reading it where it is an initializer."""
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    values = array_of(tensor)
    return None if values is None else values.shape


def norm_node(
    site: AffineSite,
    both: tuple[Array, Array],
    x: gs.Tensor,
    out: gs.Tensor,
    dtype: np.dtype[Any],
    *,
    name: str,
    like: Sequence[gs.Node],
) -> gs.Node:
    """Return a BatchNormalization that scales and shifts by vectors, exactly: mean 0, variance 1, epsilon 0."""
    size = len(both[0])
    values = {"scale": both[0], "shift": both[1], "mean": np.zeros(size), "variance": np.ones(size)}
    constants = [site.constant(f"{out.name}/{kind}", v.astype(dtype)) for kind, v in values.items()]
    return make_node("BatchNormalization", [x, *constants], [out], {"epsilon": 0.0}, name=name, like=like)


def _stripped(values: Array) -> Array:
    """Return values without leading axes of size 1."""
    keep = next((i for i, size in enumerate(values.shape) if size != 1), values.ndim)
    return values.reshape(values.shape[keep:])


def _operand(site: AffineSite, node: gs.Node, index: int) -> Array | None:
    """Return constant operand `index` of a binary node as float64 of the other's rank, if it does not enlarge it."""
    if len(node.inputs) != 2 or is_constant(node.inputs[1 - index]) or not is_constant(node.inputs[index]):
        return None
    c, shape = node.inputs[index], site.shape(node.inputs[1 - index])
    stated = constant_shape(c)
    values = array_of(c) if stated is not None and fits(stated, shape) else None
    if values is None or not is_float(values.dtype):
        return None
    wide = values.astype(np.float64)
    return wide.reshape([1] * (len(shape) - wide.ndim) + list(wide.shape)) if shape is not None and wide.ndim else wide


def _right(build: Callable[[Array], Affine]) -> Callable[[AffineSite, gs.Node], Affine | None]:
    """Return a reader of nodes whose right operand is the constant."""

    def read(site: AffineSite, node: gs.Node) -> Affine | None:
        values = _operand(site, node, 1)
        return None if values is None else build(values)

    return read


def _either(build: Callable[[Array], Affine], left: Callable[[Array], Affine]) -> Any:
    """Return a reader of nodes with a constant on either side."""

    def read(site: AffineSite, node: gs.Node) -> Affine | None:
        values = _operand(site, node, 1)
        if values is not None:
            return build(values)
        values = _operand(site, node, 0)
        return None if values is None else left(values)

    return read


def _negation(site: AffineSite, node: gs.Node) -> Affine | None:
    dtype = site.dtype(node.inputs[0])
    if dtype is None or not is_float(dtype) or is_constant(node.inputs[0]):
        return None
    return Affine.of(-1.0)


def _batch_norm(site: AffineSite, node: gs.Node) -> Affine | None:
    if why_not_norm(site, node) is not None:
        return None
    rank = site.rank(node.inputs[0])
    parameters = [array_of(t) for t in node.inputs[1:5]]
    if rank is None or rank < 2 or any(p is None for p in parameters):
        return None
    scale, shift, mean, var = (np.asarray(p, np.float64).reshape(-1) for p in parameters)
    factor = scale / np.sqrt(var + node.attrs.get("epsilon", 1e-5))
    return Affine.of(along(factor, 1, rank), along(shift - mean * factor, 1, rank))


def why_not_norm(site: AffineSite, node: gs.Node) -> str | None:
    """Return why a BatchNormalization is not an affine map by constants, from its attributes and outputs."""
    if site.opset < 7 or node.attrs.get("spatial", 1) != 1 or refers(node):
        return "this form of BatchNormalization is not understood"
    if node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:]):
        return "BatchNormalization is in training mode"
    if not all(is_constant(t) for t in node.inputs[1:5]) or is_constant(node.inputs[0]):
        return "a parameter of BatchNormalization is not constant"
    return None


READERS: Mapping[str, Callable[[AffineSite, gs.Node], Affine | None]] = {
    "Mul": _either(Affine.of, Affine.of),
    "Add": _either(lambda c: Affine.of(1.0, c), lambda c: Affine.of(1.0, c)),
    "Sub": _either(lambda c: Affine.of(1.0, -c), lambda c: Affine.of(-1.0, c)),
    "Div": _right(lambda c: Affine.of(1.0 / c)),
    "Neg": _negation,
    "BatchNormalization": _batch_norm,
}
"""Operator -> how its map is read."""
