"""Operators with constant weights that take an affine map into them, before (x * a + b) or behind ((·) * a + b).

    conv(x, W, c) * a + b    =  conv(x, a W, a c + b)                      a, b along the output channels
    conv(x * a + b, W, c)    =  conv(x, W a, c + sum(W b))                 a, b along the input channels; b unpadded
    (x * a + b) @ W          =  x @ (diag(a) W) + b @ W
    norm(x; s, t) * a + b    =  norm(x; a s, a t + b)                      LayerNormalization and its like
    table[i] * a + b         =  (table * a + b)[i]
    hardsigmoid(x * a + b)   =  hardsigmoid(x) with alpha a, beta + alpha b

Factors are collected in float64 and the weights computed from the original ones, so they are rounded once
however many maps one operator takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine, along
from graphopt.analysis.constants import array_of, is_constant, refers
from graphopt.tensors import is_float

from .affine_rule import Carried, Found, Rule
from .affine_site import AffineSite

Array = np.ndarray[Any, Any]


class Linear:
    """What an operator's weights become: original weight, factors collected so far, bias.

    Args:
        site: where the node stands.
        node: the operator.
        values: its weight as it came.
    """

    weight: ClassVar[int] = 1
    bias_input: ClassVar[int | None] = 2
    what: ClassVar[str] = "the bias"

    def __init__(self, site: AffineSite, node: gs.Node, values: Array) -> None:
        self.site, self.node, self.values = site, node, values
        self.into: Array = np.ones(())
        self.out: Array = np.ones(())
        self.bias: Array | None = self._bias()
        self.base = node.inputs[self.weight].name
        self._peak: float | None = None
        self._taps: Array | None = None

    def _bias(self) -> Array | None:
        index = self.bias_input
        if index is None or index >= len(self.node.inputs) or self.node.inputs[index].is_empty():
            return None
        held = array_of(self.node.inputs[index])
        return None if held is None else self.bias_shape(held.astype(np.float64))

    def bias_shape(self, bias: Array) -> Array:
        """Return the bias as a vector of the output's channels."""
        return bias.reshape(-1)

    @property
    def channels(self) -> int:
        """How many outputs a map varies over."""
        raise TypeError(f"{type(self).__name__} has no channels")

    @property
    def inputs(self) -> int:
        """How many inputs a map varies over."""
        raise TypeError(f"{type(self).__name__} has no inputs")

    def spread_out(self, factor: Array) -> Array:
        """Return a factor per output, to multiply the weight by."""
        raise TypeError(f"{type(self).__name__} has no channels")

    def spread_into(self, factor: Array) -> Array:
        """Return a factor per input, to multiply the weight by."""
        raise TypeError(f"{type(self).__name__} has no inputs")

    def contract(self, taps: Array, shift: Array) -> Array:
        """Return what a shift per input adds to each output."""
        raise TypeError(f"{type(self).__name__} takes no shift")

    def taps(self) -> Array:
        """Return the original weight with its window summed, float64."""
        if self._taps is None:
            wide = self.values.astype(np.float64)
            self._taps = wide.sum(axis=tuple(range(2, wide.ndim)), keepdims=True) if self.windowed else wide
        return self._taps

    windowed: ClassVar[bool] = True

    def why_not(self, factor: Array, shift: Array | None) -> str | None:
        """Return why a factor must not go into the weight, or these numbers into the bias."""
        if self._peak is None:
            self._peak = float(np.abs(self.values.astype(np.float64)).max(initial=0.0))
        limit = float(ml_dtypes.finfo(self.values.dtype).max)
        most = self._peak * np.abs(self.out).max() * np.abs(self.into).max() * np.abs(factor).max(initial=0.0)
        parts = [a for a in (self.bias, shift) if a is not None]
        with np.errstate(all="ignore"):
            most = max(most, *(float(np.abs(p).max(initial=0.0)) for p in parts)) if parts else most
            if self.bias is not None:
                most = max(most, float(np.abs(self.bias).max(initial=0.0) * np.abs(factor).max(initial=0.0)))
        if not most <= limit:
            return f"a folded weight is not a finite {self.values.dtype}"
        return self.site.why_not_copy(self.node.inputs[self.weight])

    def take_out(self, factor: Array, shift: Array) -> None:
        """Put a map behind the operator into it."""
        self.out = self.out * self.spread_out(factor)
        bias = np.zeros(self.channels) if self.bias is None else self.bias
        if shift.any() or self.bias is not None:
            self.bias = bias * factor + shift
        self.write()

    def take_in(self, factor: Array, added: Array | None) -> None:
        """Put a map in front of the operator into it; `added` is what its shift makes of the bias."""
        self.into = self.into * self.spread_into(factor)
        if added is not None and added.any():
            self.bias = added if self.bias is None else self.bias + added
        self.write()

    def added(self, shift: Array) -> Array:
        """Return what a shift of the input, before this one's factor, adds to the output."""
        return self.contract(self.taps() * self.out * self.into, shift)

    def write(self) -> None:
        """Give the node its new constants."""
        dtype = self.values.dtype
        new = (self.values.astype(np.float64) * self.out * self.into).astype(dtype)
        self.site.put(self.node, self.weight, f"{self.base}/affine", new)
        if self.bias_input is not None and self.bias is not None:
            base = f"{self.node.outputs[0].name}/bias"
            self.site.put(self.node, self.bias_input, base, self.bias.astype(dtype))


class Conv(Linear):
    """Weight [outputs, inputs / groups, window…]."""

    @property
    def groups(self) -> int:
        """How many groups of channels."""
        return int(self.node.attrs.get("group", 1))

    @property
    def channels(self) -> int:
        """Output channels."""
        return int(self.values.shape[0])

    @property
    def inputs(self) -> int:
        """Input channels."""
        return int(self.values.shape[1]) * self.groups

    def spread_out(self, factor: Array) -> Array:
        """One factor for each row."""
        return along(factor, 0, self.values.ndim)

    def spread_into(self, factor: Array) -> Array:
        """Each row has the factors of its group."""
        rows = np.repeat(factor.reshape(self.groups, -1), self.channels // self.groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * (self.values.ndim - 2))

    def contract(self, taps: Array, shift: Array) -> Array:
        """Sum over inputs and window."""
        return np.asarray((taps * self.spread_into(shift)).reshape(self.channels, -1).sum(axis=1))


class ConvTranspose(Linear):
    """Weight [inputs, outputs / groups, window…]."""

    @property
    def groups(self) -> int:
        """How many groups of channels."""
        return int(self.node.attrs.get("group", 1))

    @property
    def channels(self) -> int:
        """Output channels."""
        return int(self.values.shape[1]) * self.groups

    @property
    def inputs(self) -> int:
        """Input channels."""
        return int(self.values.shape[0])

    def spread_out(self, factor: Array) -> Array:
        """The inputs of each group have the factors of its outputs."""
        rows = np.repeat(factor.reshape(self.groups, -1), self.inputs // self.groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * (self.values.ndim - 2))

    def spread_into(self, factor: Array) -> Array:
        """One factor for each row."""
        return along(factor, 0, self.values.ndim)


class Gemm(Linear):
    """Weight [inputs, outputs], or transposed; the bias may have any shape that broadcasts to the output."""

    windowed: ClassVar[bool] = False

    @property
    def transposed(self) -> bool:
        """Whether the weight is [outputs, inputs]."""
        return bool(self.node.attrs.get("transB", 0))

    def bias_shape(self, bias: Array) -> Array:
        """Return the bias times beta, as a vector where it is one per output."""
        wide = bias * float(self.node.attrs.get("beta", 1.0))
        plain = wide.size == 1 or (wide.shape[-1] == wide.size == self.channels)
        return wide.reshape(-1) if plain else wide

    @property
    def channels(self) -> int:
        """Columns of the output."""
        return int(self.values.shape[0 if self.transposed else 1])

    @property
    def inputs(self) -> int:
        """Columns of the input."""
        return int(self.values.shape[1 if self.transposed else 0])

    def spread_out(self, factor: Array) -> Array:
        """Along the outputs."""
        return along(factor, 0 if self.transposed else 1, 2)

    def spread_into(self, factor: Array) -> Array:
        """Along the inputs."""
        return along(factor, 1 if self.transposed else 0, 2)

    def contract(self, taps: Array, shift: Array) -> Array:
        """Alpha * shift @ B."""
        product = taps @ shift if self.transposed else shift @ taps
        return np.asarray(product * float(self.node.attrs.get("alpha", 1.0)))

    def write(self) -> None:
        """Beta is in the bias by now."""
        super().write()
        self.node.attrs.pop("beta", None)


class MatMul(Linear):
    """x @ W with W [..., inputs, outputs]."""

    bias_input: ClassVar[int | None] = None
    windowed: ClassVar[bool] = False
    into_axis: ClassVar[int] = -2
    out_axis: ClassVar[int] = -1

    @property
    def channels(self) -> int:
        """Size of the output's axis that the weight makes."""
        return int(self.values.shape[self.out_axis])

    @property
    def inputs(self) -> int:
        """Size of the axis that is summed over."""
        return int(self.values.shape[self.into_axis])

    def spread_out(self, factor: Array) -> Array:
        """Along the outputs."""
        return along(factor, self.values.ndim + self.out_axis, self.values.ndim)

    def spread_into(self, factor: Array) -> Array:
        """Along the inputs."""
        return along(factor, self.values.ndim + self.into_axis, self.values.ndim)

    def contract(self, taps: Array, shift: Array) -> Array:
        """Shift @ W."""
        return np.asarray(shift @ taps)


class LeftMatMul(MatMul):
    """W @ x with W [..., outputs, inputs]."""

    weight: ClassVar[int] = 0
    into_axis: ClassVar[int] = -1
    out_axis: ClassVar[int] = -2

    def contract(self, taps: Array, shift: Array) -> Array:
        """W @ shift."""
        return np.asarray(taps @ shift)


_RANKS: Mapping[type[Linear], range] = {
    Conv: range(3, 99),
    ConvTranspose: range(3, 99),
    Gemm: range(2, 3),
    MatMul: range(2, 99),
    LeftMatMul: range(2, 99),
}


def linear(site: AffineSite, node: gs.Node, kind: type[Linear]) -> Linear | str:
    """Return the weights of a node, or why they cannot be changed."""
    known = site.weights.get(id(node))
    if known is not None:
        return known  # type: ignore[no-any-return]
    if refers(node):
        return f"an attribute of '{node.op}' is an argument of the function around it"
    for index in (kind.weight, kind.bias_input):
        given = index is not None and index < len(node.inputs) and not node.inputs[index].is_empty()
        if given and not is_constant(node.inputs[index or 0]):
            return f"a weight of {node.op} is not constant"
    values = array_of(node.inputs[kind.weight])
    if values is None or not is_float(values.dtype):
        return f"the weight of {node.op} is {'not constant' if values is None else values.dtype}"
    if values.ndim not in _RANKS[kind] or not _divides(node, kind, values):
        return f"the weight of {node.op} has shape {list(values.shape)}"
    record = kind(site, node, values)
    site.weights[id(node)] = record
    return record


def _divides(node: gs.Node, kind: type[Linear], values: Array) -> bool:
    groups = int(node.attrs.get("group", 1))
    return kind not in (Conv, ConvTranspose) or (groups > 0 and values.shape[0] % groups == 0)


def _absorb_out(record: Linear, given: Affine, axis: int) -> Found:
    """Take a map of the output, which varies along `axis`."""
    both = given.vectors(axis, record.channels)
    if both is None:
        return f"the map varies along other axes than the outputs of {record.node.op}"
    factor, shift = both
    bias = record.bias
    if bias is not None and bias.ndim > 1 and (bias.shape[-1] != record.channels and not given.uniform):
        return f"the bias of {record.node.op} varies along the batch"
    if (reason := record.why_not(factor, shift)) is not None:
        return reason
    return [Carried(do=lambda: record.take_out(factor, shift))]


def _absorb_in(record: Linear, given: Affine, axis: int) -> Found:
    """Take a map of the input, which varies along `axis`; the shift goes into the bias."""
    both = given.vectors(axis, record.inputs)
    if both is None:
        return f"the map varies along other axes than the inputs of {record.node.op}"
    factor, shift = both
    added = record.added(shift) if shift.any() else None
    if (reason := record.why_not(factor, added)) is not None:
        return reason

    def do() -> None:  # anew: another map may have come into the weights meanwhile
        record.take_in(factor, record.added(shift) if shift.any() else None)

    return [Carried(do=do)]


def _conv_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    record = linear(site, node, Conv)
    return record if isinstance(record, str) else _absorb_out(record, given, 1)


def padded(node: gs.Node) -> bool:
    """Tell whether a Conv or pool may read beyond the edge."""
    auto = node.attrs.get("auto_pad", "NOTSET")
    return any(node.attrs.get("pads", ())) or str(auto) not in ("NOTSET", "VALID", "")


def _conv_fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    if index != 0:
        return "it is a weight there"
    if given.shifts and padded(node):
        return f"{node.op} '{node.name}' is padded with zeros, which the shift would change"
    record = linear(site, node, Conv)
    return record if isinstance(record, str) else _absorb_in(record, given, 1)


def _transposed_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    record = linear(site, node, ConvTranspose)
    return record if isinstance(record, str) else _absorb_out(record, given, 1)


def _transposed_fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    if index != 0:
        return "it is a weight there"
    if given.shifts:
        return "ConvTranspose does not add a shift evenly"
    record = linear(site, node, ConvTranspose)
    return record if isinstance(record, str) else _absorb_in(record, given, 1)


def _gemm_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    record = linear(site, node, Gemm)
    return record if isinstance(record, str) else _absorb_out(record, given, 1)


def _gemm_fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    if index != 0:
        return "it is a weight there"
    record = linear(site, node, Gemm)
    if isinstance(record, str):
        return record
    if given.shifts and record.bias is not None and record.bias.ndim > 1 and record.bias.shape[-1] != record.channels:
        return "the bias of Gemm varies along the batch"
    return _absorb_in(record, given, 0 if node.attrs.get("transA", 0) else 1)


def _matmul_kind(node: gs.Node) -> type[MatMul] | None:
    constant = [is_constant(t) for t in node.inputs]
    return None if constant[0] == constant[1] else MatMul if constant[1] else LeftMatMul


def _matmul_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    kind = _matmul_kind(node)
    if given.shifts:
        return "MatMul has no bias"
    if kind is None:
        if not given.uniform:
            return "the map varies, and neither side of MatMul is constant"
        return [Carried(backward=((0, given),)), Carried(backward=((1, given),))]
    record = linear(site, node, kind)
    if isinstance(record, str):
        return record
    rank = given.scale.ndim
    if rank == 1 and kind is LeftMatMul:
        return "it is a product with a vector"
    return _absorb_out(record, given, max(rank + kind.out_axis, 0))


def _matmul_fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    kind = _matmul_kind(node)
    if kind is None:
        if given.shifts or not given.uniform:
            return "neither side of MatMul is constant"
        return [Carried(forward=((0, given),))]
    record = linear(site, node, kind)
    if isinstance(record, str):
        return record
    rank, out = site.rank(node.inputs[index]), site.rank(node.outputs[0])
    if given.shifts and (record.values.ndim != 2 or out is None or out < 2 or rank != out):
        return "the shape of what MatMul adds is not known"
    if rank == 1 and kind is LeftMatMul:
        return "it is a product with a vector"
    axis = 0 if rank is None else rank + (-1 if kind is MatMul else -2)
    both = given.vectors(axis, record.inputs)
    if both is None:
        return "the map varies along other axes than MatMul sums over"
    factor, shift = both
    if (reason := record.why_not(factor, None)) is not None:
        return reason
    behind = Affine.of()
    if given.shifts:
        assert out is not None
        behind = Affine.of(1.0, along(record.added(shift), out + kind.out_axis, out))
    return [Carried(forward=((0, behind),), do=lambda: record.take_in(factor, None))]


def _norm_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    """LayerNormalization and InstanceNormalization: scale and bias are inputs 1 and 2."""
    if refers(node) or len(node.inputs) < 2 or any(t.name for t in node.outputs[1:]):
        return f"this form of {node.op} is not understood"
    held = [array_of(t) for t in node.inputs[1:3]]
    if any(h is None or not is_float(h.dtype) for h in held):
        return f"a parameter of {node.op} is not constant"
    scale = np.asarray(held[0], np.float64)
    bias = np.asarray(held[1], np.float64) if len(held) > 1 else np.zeros(scale.shape)
    found = _norm_parameters(site, node, given, scale.shape)
    if found is None:
        return f"the map varies along other axes than the parameters of {node.op}"
    factor, shift = found
    assert held[0] is not None
    dtype, new = held[0].dtype, (scale * factor, bias * factor + shift)
    if not all(np.isfinite(n.astype(dtype).astype(np.float64)).all() for n in new):
        return f"a folded parameter is not a finite {dtype}"

    def do() -> None:
        for place, kind, values in ((1, "scale", new[0]), (2, "bias", new[1])):
            site.put(node, place, f"{node.outputs[0].name}/{kind}", values.astype(dtype))

    return [Carried(do=do)]


def _norm_parameters(site: AffineSite, node: gs.Node, given: Affine, shape: tuple[int, ...]) -> Any:
    """Return a map's scale and shift in the shape of a normalisation's parameters."""
    if given.uniform:
        return given.scale, given.shift
    if node.op == "InstanceNormalization":
        return given.vectors(1, shape[0])
    rank = site.rank(node.inputs[0])
    if rank is None or len(shape) > rank or given.varies_beside(*range(rank - len(shape), rank)):
        return None
    parts = [a.reshape(a.shape[rank - len(shape) :]) if a.ndim else a for a in (given.scale, given.shift)]
    fit = all(p.ndim == 0 or all(d in (1, s) for d, s in zip(p.shape, shape, strict=True)) for p in parts)
    return parts if fit else None


def _table_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    """Gather from a constant table along its first axis."""
    table = array_of(node.inputs[0])
    if table is None and given.uniform and not refers(node):
        return [Carried(backward=((0, given),))]
    if table is None or not is_float(table.dtype):
        return "the table of Gather is not constant"
    if node.attrs.get("axis", 0) != 0 or refers(node):
        return "Gather is not along the first axis"
    if (reason := site.why_not_copy(node.inputs[0])) is not None:
        return reason
    tail = table.ndim - 1
    rank = site.rank(node.outputs[0])
    if not given.uniform and (rank is None or given.varies_beside(*range(rank - tail, rank))):
        return "the map varies along the indices of Gather"
    parts = [a.reshape((1, *a.shape[a.ndim - tail :])) if a.ndim else a for a in (given.scale, given.shift)]
    new = (table.astype(np.float64) * parts[0] + parts[1]).astype(table.dtype)
    if new.shape != table.shape or not np.isfinite(new.astype(np.float64)).all():
        return f"a folded table is not a finite {table.dtype}"
    return [Carried(do=lambda: site.put(node, 0, f"{node.inputs[0].name}/affine", new))]


def _hard_sigmoid_fore(_site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    if not given.uniform or refers(node):
        return "HardSigmoid has one slope for all elements"
    alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    new = {"alpha": float(alpha * given.scale), "beta": float(beta + alpha * given.shift)}
    if not all(abs(v) < float(np.finfo(np.float32).max) for v in new.values()):
        return "alpha and beta would not be finite"
    return [Carried(do=lambda: node.attrs.update(new))]


BACK: Mapping[str, Rule] = {
    "Conv": _conv_back,
    "ConvTranspose": _transposed_back,
    "Gemm": _gemm_back,
    "MatMul": _matmul_back,
    "LayerNormalization": _norm_back,
    "InstanceNormalization": _norm_back,
    "Gather": _table_back,
}
"""Operator -> how it takes a map of its output."""

FORE: Mapping[str, Rule] = {
    "Conv": _conv_fore,
    "ConvTranspose": _transposed_fore,
    "Gemm": _gemm_fore,
    "MatMul": _matmul_fore,
    "HardSigmoid": _hard_sigmoid_fore,
}
"""Operator -> how it takes a map of an input."""
