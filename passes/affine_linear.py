"""What the weights of a linear operator become when affine maps before and behind it go into them.

Factors are collected in float64 and the weights computed from the original ones, so they are rounded once
however many maps one operator takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import along
from graphopt.analysis.constants import array_of, is_constant, refers
from graphopt.tensors import is_float

from .affine_site import AffineSite, Array


def peak(values: Array) -> float:
    """Return the largest size of any element, 0 without any; no copy is made."""
    return max(-float(values.min()), float(values.max())) if values.size else 0.0


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
        weight = node.inputs[self.weight]  # one name for thousands of copies would take quadratic time to make unique
        self.base = f"{weight.name}/affine" if len(weight.outputs) == 1 else f"{node.outputs[0].name}/weight"
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
            self._peak = peak(self.values)
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
        dtype, factor = self.values.dtype, self.out * self.into
        if (factor != 1).any() or id(self.node.inputs[self.weight]) in self.site.own:
            new = np.empty_like(self.values)
            np.multiply(self.values, factor, out=new, dtype=np.float64, casting="unsafe")  # no wide copy, one rounding
            self.site.put(self.node, self.weight, self.base, new)
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
