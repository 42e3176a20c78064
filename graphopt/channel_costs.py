"""MACs and parameters of a model with any number of units kept in each channel group, without cutting it.

The size of an axis is a sum over the groups that lie on it, one number of elements per unit kept, and what no group
has.  What a layer costs is a product of such sizes (output channels x input channels x kernel x positions), so the
cost of the whole model is a polynomial in the counts:

    cost(n) = constant + sum over monomials of factor x n[a] x n[b] x …

Most have two groups (those that make and read a layer's channels), some the same group twice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, constant_node, node_values
from graphopt.analysis.cost import Sizes, costs
from graphopt.analysis.dims import Dims, plans
from graphopt.analysis.inputs import InputUses
from graphopt.analysis.shapes import Shapes
from graphopt.edit import label
from graphopt.model import Model
from graphopt.ops import DEQUANTIZE, is_standard
from graphopt.samples import Samples
from graphopt.tensors import is_float

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group, Site

Array: TypeAlias = np.ndarray[Any, Any]

Counts: TypeAlias = Mapping[str, int]
"""Group -> units kept; those left out keep all."""

Monomial: TypeAlias = tuple[str, ...]
"""Groups, sorted; one that counts twice is there twice."""

WEIGHTS: Mapping[str, tuple[int, ...]] = {"LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2)}
"""Operator -> inputs whose elements each take part in a multiplication per position; all others: `_FIRST`."""

_FIRST = (1, 0)


NO_PARAMETERS = frozenset(map(np.dtype, (np.int64, np.int32, np.bool_, np.object_)))
"""Types of constants that are shapes, axes, indices: not learned."""


@dataclass(frozen=True)
class Width:
    """Size of an axis: `fixed`, and for each group so many elements per unit kept."""

    fixed: float
    shares: tuple[tuple[str, float], ...] = ()

    def monomials(self) -> dict[Monomial, float]:
        """Return it as a polynomial."""
        found: dict[Monomial, float] = defaultdict(float)
        if self.fixed:
            found[()] += self.fixed
        for group, each in self.shares:
            found[group,] += each
        return found


@dataclass(frozen=True)
class Piece:
    """What one layer (or one tensor) costs: `scale` times the product of the sizes.

    Attributes:
        label: of the layer.
        scale: positions (of parameters: 1).
        widths: sizes of axes.
    """

    label: str
    scale: float
    widths: tuple[Width, ...]

    @cached_property
    def monomials(self) -> dict[Monomial, float]:
        """It as a polynomial in the counts."""
        found: dict[Monomial, float] = {(): self.scale}
        for width in self.widths:
            product: dict[Monomial, float] = defaultdict(float)
            for mine, factor in found.items():
                for other, each in width.monomials().items():
                    product[tuple(sorted((*mine, *other)))] += factor * each
            found = product
        return found


class Polynomial:
    """A cost as a polynomial in the counts.

    Args:
        sizes: group -> its units.
        pieces: what is summed.
    """

    def __init__(self, sizes: Mapping[str, int], pieces: Iterable[Piece]) -> None:
        self.sizes = dict(sizes)
        found: dict[Monomial, float] = defaultdict(float)
        for piece in pieces:
            for monomial, factor in piece.monomials.items():
                found[monomial] += factor
        self.constant = found.pop((), 0.0)
        self.factors = dict(found)

    def at(self, counts: Counts) -> float:
        """Return the cost with so many units kept."""
        kept = {**self.sizes, **counts}
        return self.constant + sum(f * math.prod(kept[g] for g in m) for m, f in self.factors.items())

    def tables(self, options: Mapping[str, Sequence[int]]) -> dict[tuple[str, ...], dict[tuple[int, ...], float]]:
        """Return the cost as a sum of tables: groups -> their counts -> cost, for the counts in `options`.

        What does not depend on them stands at no groups.
        """
        found: dict[tuple[str, ...], dict[tuple[int, ...], float]] = {(): {(): self.constant}}
        for monomial, factor in self.factors.items():
            groups = tuple(g for g in dict.fromkeys(monomial) if g in options)
            rest = factor * math.prod(self.sizes[g] for g in monomial if g not in options)
            powers = [monomial.count(g) for g in groups]
            table = found.setdefault(groups, defaultdict(float))
            for combination in _combinations([options[g] for g in groups]):
                table[combination] += rest * math.prod(n**p for n, p in zip(combination, powers, strict=True))
        return found


def _combinations(options: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for counts in options:
        found = [(*before, count) for before in found for count in counts]
    return found


@dataclass(frozen=True)
class MacsModel:
    """MACs and parameters as functions of the counts of some groups, all others whole.

    Attributes:
        sizes: group -> its units.
        layers: MACs of each layer.
        tensors: parameters of each initializer.
        unknown: labels of nodes whose MACs nobody can tell; they are left out.
    """

    sizes: Mapping[str, int]
    layers: tuple[Piece, ...]
    tensors: tuple[Piece, ...]
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, groups: Sequence[Group], samples: Samples | None = None) -> MacsModel:
        """Return the costs of a model.

        Args:
            model: as it is now.
            groups: those that may be cut.
            samples: the shapes of the first are taken where the model leaves dimensions open.
        """
        return _Builder(model, groups, Shapes(model, input_shapes(model, samples))).build()

    def polynomial(self, of: str) -> Polynomial:
        """Return what is counted: `macs`, `params` or `channels`."""
        pieces = {"macs": self.layers, "params": self.tensors, "channels": self._channels}[of]
        return Polynomial(self.sizes, pieces)

    @property
    def _channels(self) -> tuple[Piece, ...]:
        return tuple(Piece(name, 1.0, (Width(0.0, ((name, 1.0),)),)) for name in self.sizes)

    def macs(self, counts: Counts | None = None) -> float:
        """Return the MACs of one run."""
        return self.polynomial("macs").at(counts or {})

    def params(self, counts: Counts | None = None) -> float:
        """Return the number of elements of all float constants."""
        return self.polynomial("params").at(counts or {})


def input_shapes(model: Model, samples: Samples | None) -> dict[str, tuple[int, ...]]:
    """Return shapes to count with: of the first sample, else such as are likely where the model leaves them open."""
    if samples is not None and not samples.random:
        feed = samples.first()
        return {name: tuple(value.shape) for name, value in feed.items() if hasattr(value, "shape")}
    if all(spec.shape is not None and all(isinstance(d, int) for d in spec.shape) for spec in model.inputs):
        return {}
    dims = Dims.of(model, InputUses(model), {})
    return dims.shapes(next(iter(plans(dims)), ()))


class _Proved(Sizes):
    """Shapes that ONNX's inference does not find, but that follow from those of the inputs, too."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self._known = shapes

    def of(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """Return the shape of a tensor, None where unknown."""
        found = super().of(tensor)
        return self._known.proved(tensor).static if found is None else found


class _Builder:
    """Reads off a model which groups lie on which axis of what."""

    def __init__(self, model: Model, groups: Sequence[Group], shapes: Shapes) -> None:
        self.model, self.shapes = model, shapes
        self.sizes = {group.name: group.size for group in groups}
        self.at_port: dict[tuple[int, int], list[tuple[str, Site]]] = defaultdict(list)
        self.at_tensor: dict[int, list[tuple[str, Site]]] = defaultdict(list)
        for group in groups:
            for site in group.sites:
                if site.role == "carries" or site.node is None:
                    self.at_tensor[id(site.tensor)].append((group.name, site))
                else:
                    self.at_port[id(site.node), site.port].append((group.name, site))

    def build(self) -> MacsModel:
        """Return the model's costs."""
        found = costs(self.model, _Proved(self.shapes))
        layers: list[Piece] = []
        unknown: list[str] = []
        for node in self.model.graph.nodes:
            macs = found.of(node).macs
            if macs is None:
                unknown.append(label(node))
            elif macs:
                layers += self._layer(node, macs)
        return MacsModel(self.sizes, tuple(layers), tuple(self._tensors()), tuple(unknown))

    def _layer(self, node: gs.Node, macs: int) -> list[Piece]:
        weights = [w for port in WEIGHTS.get(node.op, _FIRST) if (w := self._weight(node, port)) is not None]
        if node.op not in WEIGHTS:
            weights = weights[:1]
        elements = sum(math.prod(shape) for shape, _ in weights)
        if elements:
            return [Piece(label(node), macs / elements, self._widths(shape, sites)) for shape, sites in weights]
        return [Piece(label(node), *self._product(node, macs))]

    def _weight(self, node: gs.Node, port: int) -> tuple[tuple[int, ...], list[tuple[str, Site]]] | None:
        """Return shape and sites of a constant of two axes or more, behind a DequantizeLinear too."""
        if port >= len(node.inputs):
            return None
        tensor = node.inputs[port]
        sites = self.at_port.get((id(node), port), [])
        if tensor.inputs and is_standard(tensor.inputs[0], *DEQUANTIZE):
            node = tensor.inputs[0]
            tensor = node.inputs[0]
            sites = sites or self.at_port.get((id(node), 0), [])
        values = _stored(tensor)
        return None if values is None or len(values.shape) < 2 else (tuple(values.shape), sites)

    def _product(self, node: gs.Node, macs: int) -> tuple[float, tuple[Width, ...]]:
        """Return scale and sizes of a product of activations: each group on a letter of it counts once."""
        letters = {
            (_letter(node, port, site.axis, self.shapes.of(tensor).rank or 1), name)
            for port, tensor in enumerate((*node.inputs, *node.outputs))
            for name, site in self.at_tensor.get(id(tensor), ())
        }
        names = sorted(name for _, name in letters)
        widths = tuple(Width(0.0, ((name, 1.0),)) for name in names)
        return macs / math.prod(self.sizes[name] for name in names), widths

    def _widths(self, shape: Sequence[int], sites: Sequence[tuple[str, Site]]) -> tuple[Width, ...]:
        """Return the size of each axis as a function of the counts."""
        found = []
        for axis, size in enumerate(shape):
            taken = {n: int((s.units >= 0).sum()) for n, s in sites if s.axis % len(shape) == axis}
            shares = tuple((name, count / self.sizes[name]) for name, count in taken.items() if count)
            found.append(Width(float(size - sum(taken.values())), shares))
        return tuple(found)

    def _tensors(self) -> list[Piece]:
        """Return parameters: each constant of floats once, its sites those of its first reader."""
        seen: set[int] = set()
        pieces = []
        for node in self.model.nodes():
            for port, tensor in enumerate(node.inputs):
                values = None if id(tensor) in seen else _stored(tensor)
                if values is None or values.dtype in NO_PARAMETERS:
                    continue
                seen.add(id(tensor))
                sites = self.at_port.get((id(node), port), [])
                pieces.append(Piece(tensor.name, 1.0, self._widths(tuple(values.shape), sites)))
        return pieces


def _stored(tensor: gs.Tensor) -> Any:
    """Return what a constant holds, with its shape and type, unread; None for anything else."""
    if isinstance(tensor, gs.Constant):
        return tensor._values
    node = constant_node(tensor)
    return None if node is None else node_values(node)


def weights_of(site: Site) -> Array | None:
    """Return a site's weight as float64, decoded where it is stored as codes; None where it is no weight."""
    tensor, node = site.tensor, site.node
    values = array_of(tensor)
    if values is None and tensor.inputs:
        node = tensor.inputs[0]
        values = array_of(node.inputs[0]) if is_standard(node, *DEQUANTIZE) and node.inputs else None
    if values is None or is_float(values.dtype):
        return None if values is None else values.astype(np.float64)
    scale = array_of(node.inputs[1]) if node is not None and is_standard(node, *DEQUANTIZE) else None
    if node is None or scale is None:
        return None
    zero = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    shape = [1] * values.ndim
    if scale.size > 1:
        axis = int(node.attrs.get("axis", 1))
        if scale.ndim != 1 or scale.size != values.shape[axis]:
            return None  # a scale per block
        shape[axis] = scale.size
    steps = values.astype(np.float64) - (0.0 if zero is None else zero.astype(np.float64).reshape(shape))
    return np.asarray(steps * scale.astype(np.float64).reshape(shape))


def _letter(node: gs.Node, port: int, axis: int, rank: int) -> int:
    """Return which index of a product an axis is, counted from the end, 0 for the contracted one."""
    if not is_standard(node, "MatMul"):
        return 0
    back = rank - axis % rank
    return 0 if (port, back) in {(0, 1), (1, 2)} else back
