"""What it costs to cut a channel group: which units go first, and the error that is left for each number of them.

A consumer of the group computes X W on its inputs X, with H = XᵀX (centred where its bias can be changed too).  With
the rows S of W gone and all others solved again by least squares, the squared error of its output is

    error(S) = trace(Wsᵀ ([H⁻¹]ss)⁻¹ Ws)          rest of W:  W - [H⁻¹]:s ([H⁻¹]ss)⁻¹ Ws

Units go one by one, each time the one that adds least, summed over all consumers, each relative to the variance of its
output; H⁻¹ and W are brought up to date in between.  Only the rows and columns of the group take part, so that a group
of n rows takes n³ operations, whatever else its consumers read.

How far the model's outputs are then off, `channel_noise.py` measures.  Source: Hassibi, Stork, Optimal Brain Surgeon,
1993; Kurtic, Frantar, Alistarh, ZipLM, NeurIPS 2023, for removing structures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.base import Context
from graphopt.channel_costs import weights_of
from graphopt.edit import label
from graphopt.gptq import damped
from graphopt.layer_inputs import Gram, GramRequest, request_of
from graphopt.ops import is_standard
from graphopt.tensors import is_float

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group, Site

Array: TypeAlias = np.ndarray[Any, Any]

DAMPING = 1e-3
"""Of the mean diagonal of H, added to all of it."""

SHORTAGE = 0.1
"""Times the columns for each row of X, added likewise: few rows say little of how channels stand for each other, and a
fit to 1,280 averages over 200 pictures would look perfect on these."""

WIDEST = 2400
"""Rows of a consumer's weight from which on each of its kernel's positions is solved by itself, with one H of the
channels for all: an upper bound of the error."""

ROWS = 16384
"""Of X, in all, about."""

BYTES = 1 << 29
"""Of Gram matrices at a time: the samples are read again for more."""

AHEAD = 4
"""For each unit to go, so many of the least are looked at together."""

STEPS = 24
"""In so many steps all units go; within a step they go one by one."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads the group.

    Attributes:
        node: it.
        weight: its constant.
        request: of its rows.
        rows: (units, elements) which rows of the weight as a matrix each unit feeds.
        bias: its constant of one value per output channel, None where it has none.
    """

    node: gs.Node
    weight: gs.Constant
    request: GramRequest
    rows: Array
    bias: gs.Constant | None = None

    @property
    def label(self) -> str:
        """How reports call it."""
        return label(self.node)

    @property
    def channel_axis(self) -> int:
        """Which axis of its input holds the channels."""
        return 1 if self.request.window is not None else self.request.axis

    @property
    def kernel(self) -> int:
        """Rows of its weight for each channel."""
        return math.prod(self.request.window.kernel) if self.request.window is not None else 1

    def matrix(self) -> Array:
        """Return the weight as (rows, outputs), float64; with one H for the channels, kernel positions are outputs."""
        values = np.asarray(self.weight.values, np.float64)
        return _as_rows(self.node, values, self.request)

    def from_matrix(self, matrix: Array) -> Array:
        """Return a matrix in the layout and type of the weight."""
        shape, dtype = tuple(self.weight.shape), self.weight.dtype
        if is_standard(self.node, "Conv"):
            if self.request.window is not None:
                return np.ascontiguousarray(matrix.T.reshape(shape).astype(dtype))
            kernels = matrix.reshape(shape[1], shape[0], *shape[2:])
            return np.ascontiguousarray(np.swapaxes(kernels, 0, 1).astype(dtype))
        if is_standard(self.node, "Gemm") and self.node.attrs.get("transB", 0):
            return np.ascontiguousarray(matrix.T.astype(dtype))
        return np.ascontiguousarray(matrix.reshape(shape).astype(dtype))


def _as_rows(node: gs.Node, values: Array, request: GramRequest) -> Array:
    if is_standard(node, "Conv"):
        if request.window is not None:
            return values.reshape(len(values), -1).T
        return np.swapaxes(values, 0, 1).reshape(values.shape[1], -1)
    if is_standard(node, "Gemm"):
        return values.T if node.attrs.get("transB", 0) else values
    return values.reshape(len(values), -1)


def reader_of(site: Site, size: int) -> Reader | None:
    """Return the reader at a site, None where it is no linear layer of one weight whose rows the units are."""
    node, weight = site.node, site.tensor
    if node is None or site.port != 1 or not isinstance(weight, gs.Constant) or not is_float(weight.dtype):
        return None
    shape = tuple(weight.shape)
    request = request_of(node, shape)
    if request is None or request.group != 1:
        return None
    kernel = request.width // shape[site.axis]
    if request.width > WIDEST and request.window is not None:
        request, kernel = GramRequest(request.tensor, shape[1], axis=1), 1
    rows = np.arange(shape[site.axis] * kernel).reshape(shape[site.axis], kernel)
    counts = np.bincount(site.units[site.units >= 0], minlength=size)
    if not len(counts) or (counts != counts[0]).any() or not counts[0]:
        return None
    order = np.argsort(np.where(site.units >= 0, site.units, size), kind="stable")[: int(counts.sum())]
    return Reader(node, weight, request, rows[order].reshape(size, -1), _bias(node))


def _bias(node: gs.Node) -> gs.Constant | None:
    """Return the constant that can take the mean of an error: input 2, or what an Add behind a product adds."""
    if is_standard(node, "ConvTranspose"):  # how many positions of its kernel meet in an output depends on the strides
        return None
    if len(node.inputs) > 2 and node.inputs[2].name:
        found = node.inputs[2]
    elif is_standard(node, "MatMul"):
        after = node.outputs[0].outputs
        if len(after) != 1 or not is_standard(after[0], "Add"):
            return None
        found = next((t for t in after[0].inputs if isinstance(t, gs.Constant)), None)
    else:
        return None
    flat = isinstance(found, gs.Constant) and is_float(found.dtype) and len(found.shape) == 1
    return found if flat and len(found.outputs) == 1 else None


@dataclass(frozen=True)
class Curve:
    """How a group shrinks.

    Attributes:
        order: units, the first to go first.
        errors: (units + 1,) of the consumers' outputs, relative to their variance, with so many gone; never falls.
        noise: (units gone, noise at the model's outputs relative to them) as measured, rising.
    """

    order: Array
    errors: Array
    noise: tuple[tuple[int, float], ...] = ()

    @property
    def scores(self) -> Array:
        """The error once each unit is gone: (units,), by unit, no two alike."""
        found = np.empty(len(self.order))
        rising = np.arange(1, len(self.order) + 1) * (1e-9 * max(float(self.errors[-1]), 1e-12))
        found[self.order] = self.errors[1:] + rising
        return found

    def loss(self, gone: int) -> float:
        """Return the noise at the outputs with so many units gone: along the curve of errors between what was measured.

        Where nothing was measured, the error itself.
        """
        before = 0, 0.0
        for count, noise in self.noise:
            if gone <= count:
                return before[1] + (noise - before[1]) * self._part(before[0], count, gone)
            before = count, noise
        if not self.noise:
            return float(self.errors[gone])
        count, noise = self.noise[-1]
        known = float(self.errors[count])
        return noise * float(self.errors[gone]) / known if known > 0.0 else noise * gone / max(count, 1)

    def _part(self, low: int, high: int, at: int) -> float:
        below, above, here = (float(self.errors[k]) for k in (low, high, at))
        return (here - below) / (above - below) if above > below else (at - low) / max(high - low, 1)


@dataclass
class _Part:
    """The rows of a reader that the group feeds: [H⁻¹] and W of them, by unit."""

    inverse: Array
    weight: Array

    def scores(self, alive: Array, each: int) -> Array:
        """Return what each unit adds to the error if it goes next: (alive,)."""
        rows = alive[:, None] * each + np.arange(each)
        blocks, weights = self.inverse[rows[:, :, None], rows[:, None, :]], self.weight[rows]
        return np.asarray((weights * np.linalg.solve(blocks, weights)).sum(axis=(1, 2)))

    def drop(self, rows: Array) -> None:
        """Take rows out: the others make up for them."""
        block = np.linalg.solve(self.inverse[np.ix_(rows, rows)], np.c_[self.weight[rows], self.inverse[rows]])
        outputs = self.weight.shape[1]
        column = self.inverse[:, rows].copy()
        self.weight -= column @ block[:, :outputs]
        self.inverse -= column @ block[:, outputs:]

    def part(self, rows: Array) -> _Part:
        """Return a copy of some rows."""
        return _Part(self.inverse[np.ix_(rows, rows)].copy(), self.weight[rows].copy())


def _rows_of(units: Array, each: int) -> Array:
    return (units[:, None] * each + np.arange(each)).ravel()


def shrink(parts: Sequence[tuple[_Part, int]], size: int) -> tuple[Array, Array]:
    """Return the order in which the units go, and the errors (units + 1,) that they leave.

    Args:
        parts: of each reader, with the rows that each unit has in it; used up.
        size: units.
    """
    left = np.arange(size)
    order: list[int] = []
    errors = [0.0]
    state = list(parts)
    while len(left):
        count = min(len(left), max(1, size // STEPS))
        places = np.arange(len(left))
        scores = sum(part.scores(places, each) for part, each in state)
        near = np.sort(np.argsort(scores, kind="stable")[: min(len(left), AHEAD * count)])
        picked, added = _few([(part.part(_rows_of(near, each)), each) for part, each in state], len(near), count)
        gone = near[picked]
        order += left[gone].tolist()
        errors += [errors[-1] + sum(added[: k + 1]) for k in range(len(added))]
        keep = np.setdiff1d(places, gone)
        for k, (part, each) in enumerate(state):
            part.drop(_rows_of(gone, each))
            state[k] = part.part(_rows_of(keep, each)), each
        left = left[keep]
    return np.array(order, np.int64), np.maximum.accumulate(np.array(errors))


def _few(parts: Sequence[tuple[_Part, int]], size: int, count: int) -> tuple[list[int], list[float]]:
    """Let some of a few units go, one by one; return which, and what each adds to the error."""
    alive = np.arange(size)
    picked: list[int] = []
    added: list[float] = []
    for _ in range(count):
        scores = sum(part.scores(alive, each) for part, each in parts)
        place = int(np.argmin(scores))
        unit = int(alive[place])
        picked.append(unit)
        added.append(max(float(np.asarray(scores)[place]), 0.0))
        alive = np.delete(alive, place)
        for part, each in parts:
            if len(alive):
                part.drop(_rows_of(np.array([unit]), each))
    return picked, added


@dataclass(frozen=True)
class Solved:
    """A reader with its moments: H⁻¹, the mean of its rows, its weight as a matrix, and the variance of its output."""

    reader: Reader
    inverse: Array
    mean: Array
    matrix: Array
    energy: float

    @classmethod
    def of(cls, reader: Reader, gram: Gram) -> Solved | None:
        """Return a reader with what is known of its rows; None where nothing flows through it."""
        centred = gram.covariance() if reader.bias is not None else gram.matrix / max(gram.count, 1)
        matrix = reader.matrix()
        energy = float(np.sum((centred @ matrix) * matrix))
        if not gram.count or not energy > 0.0:
            return None
        ridge = DAMPING + SHORTAGE * len(centred) / gram.count
        return cls(reader, np.linalg.inv(damped(centred, ridge)), gram.mean, matrix, energy)

    def part(self) -> tuple[_Part, int]:
        """Return what `shrink` takes."""
        rows = self.reader.rows.ravel()
        weight = self.matrix[rows] / math.sqrt(self.energy)
        return _Part(self.inverse[np.ix_(rows, rows)].copy(), weight), self.reader.rows.shape[1]

    def without(self, units: Array) -> dict[str, Array]:
        """Return the constants of the reader without some units, solved again: weight, and bias where it has one."""
        rows = self.reader.rows[units].ravel()
        block = np.linalg.solve(self.inverse[np.ix_(rows, rows)], self.matrix[rows])
        found = self.matrix - self.inverse[:, rows] @ block
        found[rows] = 0.0
        values = {self.reader.weight.name: self.reader.from_matrix(found)}
        bias = self.reader.bias
        if bias is not None:
            shift = self.mean @ (self.matrix - found)
            size = math.prod(bias.shape)
            shift = shift.reshape(size, -1).sum(axis=1) if shift.size != size else shift
            values[bias.name] = (np.asarray(bias.values, np.float64) + shift).astype(bias.dtype)
        return values


Fitted: TypeAlias = tuple["Curve", list["Solved"]]
"""How a group shrinks on some samples: the order in which its units go, and its readers solved on these."""


def curves(groups: Sequence[Group], ctx: Context) -> dict[str, Curve]:
    """Return how each group shrinks, by its name; nothing is measured at the model's outputs.

    Groups that no linear layer reads go by the norm of what makes them.

    Raises:
        DataError: there are no samples.
    """
    return {name: curve for name, curve, _ in shrinking(groups, [ctx])}


def shrinking(groups: Sequence[Group], parts: Sequence[Context]) -> Iterator[tuple[str, Curve, list[Fitted]]]:
    """Yield how each group shrinks: its name, its curve on all samples, and what each part of them says by itself.

    Args:
        groups: those that may be cut.
        parts: the model with parts of the samples; one with all of them will do.

    Raises:
        DataError: there are no samples.
    """
    readers = {g.name: [r for s in g.role("reads") if (r := reader_of(s, g.size)) is not None] for g in groups}
    rows = max(16, ROWS // max(1, sum(map(_count, parts)))) if any(readers.values()) else 0
    for batch in _batches(groups, readers):
        requests = {f"{g.name} {k}": r.request for g in batch for k, r in enumerate(readers[g.name])}
        grams = [ctx.grams(requests, rows) if requests else {} for ctx in parts]
        for group in batch:
            labels = {f"{group.name} {k}": reader for k, reader in enumerate(readers[group.name])}
            known = [{name: found[name] for name in labels if name in found} for found in grams]
            whole = {name: sum((found[name] for found in known[1:]), known[0][name]) for name in known[0]}
            everything = _fitted(group, labels, whole)
            each = [_fitted(group, labels, found) for found in known] if len(parts) > 1 else [everything]
            yield group.name, everything[0], each


def _fitted(group: Group, readers: Mapping[str, Reader], grams: Mapping[str, Gram]) -> Fitted:
    solved = _solved(readers, grams)
    return _curve(group, solved), solved


def _solved(readers: Mapping[str, Reader], grams: Mapping[str, Gram]) -> list[Solved]:
    found = (Solved.of(reader, grams[name]) for name, reader in readers.items() if name in grams)
    return [solved for solved in found if solved is not None]


def _count(ctx: Context) -> int:
    return sum(1 for _ in ctx.samples) if ctx.samples is not None else 0


def magnitudes(groups: Sequence[Group]) -> dict[str, Curve]:
    """Return how each group shrinks by the energy of the weights that make it, by its name: without samples."""
    return {group.name: _magnitude(group) for group in groups}


def _curve(group: Group, found: Sequence[Solved]) -> Curve:
    return Curve(*shrink([solved.part() for solved in found], group.size)) if found else _magnitude(group)


def _magnitude(group: Group) -> Curve:
    energy = np.zeros(group.size)
    for site in group.role("makes"):
        values = weights_of(site)
        if values is not None:
            along = np.square(values).sum(axis=tuple(i for i in range(values.ndim) if i != site.axis))
            mine = site.units >= 0
            energy += np.bincount(site.units[mine], along[mine], group.size) / max(float(along.sum()), 1e-30)
    order = np.argsort(energy, kind="stable")
    return Curve(order, np.r_[0.0, np.cumsum(energy[order])])


def _batches(groups: Sequence[Group], readers: Mapping[str, Sequence[Reader]]) -> Iterator[list[Group]]:
    """Cut groups into runs whose Gram matrices fit `BYTES` together, or are alone."""
    batch: list[Group] = []
    taken: set[GramRequest] = set()
    used = 0
    for group in groups:
        new = {r.request for r in readers[group.name]} - taken
        size = sum(8 * request.width**2 for request in new)
        if batch and used + size > BYTES:
            yield batch
            batch, taken, used = [], set(), 0
            new = {r.request for r in readers[group.name]}
            size = sum(8 * request.width**2 for request in new)
        batch.append(group)
        taken |= new
        used += size
    if batch:
        yield batch
