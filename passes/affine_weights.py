"""Operators with constant weights that take an affine map into them, before (x * a + b) or behind ((·) * a + b).

conv(x, W, c) * a + b    =  conv(x, a W, a c + b)                      a, b along the output channels
conv(x * a + b, W, c)    =  conv(x, W a, c + sum(W b))                 a, b along the input channels; b unpadded
(x * a + b) @ W          =  x @ (diag(a) W) + b @ W
norm(x; s, t) * a + b    =  norm(x; a s, a t + b)                      LayerNormalization and its like
table[i] * a + b         =  (table * a + b)[i]
hardsigmoid(x * a + b)   =  hardsigmoid(x) with alpha a, beta + alpha b
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine, along
from graphopt.analysis.constants import array_of, is_constant, refers
from graphopt.tensors import is_float

from .affine_linear import Conv, ConvTranspose, Gemm, LeftMatMul, Linear, MatMul, linear
from .affine_rule import Carried, Found, Rule
from .affine_site import AffineSite


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
        return "it is padded with zeros, which the shift would change"
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
