"""Which nodes stay float32, and why: what schema, provider, values and samples say against float16."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import Unknown, is_constant, parameter, scalar_of
from graphopt.edit import label
from graphopt.errors import DataError
from graphopt.half import (
    EXACT_INTEGERS,
    FEW_DIGITS,
    KERNELS,
    LARGEST,
    MASK_FACTORS,
    MASKED,
    MASKING,
    NARROW_INTEGERS,
    RAW_OUTPUT,
    REDUCING,
    RISKS,
    SETTLES,
    SHRINKS,
    SMALLEST_NORMAL,
    SQUARE,
    Risk,
)
from graphopt.importer import origin
from graphopt.names import left_out
from graphopt.ops import BROADCASTING, MOVEMENT, REDUCTIONS, UNARY, is_standard

from .half_ports import is_function
from .half_survey import Survey, precise, values_of

if TYPE_CHECKING:
    from graphopt.calibrate import Calibration

Array = np.ndarray[Any, Any]

MARK = "graphopt.float32"
"""Metadata of a node that a measured range keeps in float32: another run on other samples does not undo it."""

_CHUNK = 1 << 20

_CARRIES = UNARY | BROADCASTING | MOVEMENT | REDUCTIONS
"""Operators whose results may be as large as what they read."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        only, skip: globs of node labels.
        headroom: how many times larger than any sample's a value may become.
    """

    only: tuple[str, ...]
    skip: tuple[str, ...]
    headroom: float


@dataclass
class Islands:
    """What stays float32.

    Attributes:
        kept: why, by the id of the node.
        measured: of these, the ones that only samples keep.
        masks: tensors, by id, that may be as good as infinite since they only tell a Softmax what to leave out.
    """

    kept: dict[int, str]
    measured: set[int] = field(default_factory=set)
    masks: set[int] = field(default_factory=set)


def islands(found: Survey, request: Request) -> Islands:
    """Return what must stay float32 in a graph."""
    result = Islands(dict(found.closed))
    for key in precise(found):
        result.kept.setdefault(key, "it computes whole numbers, angles or places, which float16 rounds")
    for key, node in found.nodes.items():
        if key not in result.kept and (reason := _asked(node, request) or _fixed(found, node)):
            result.kept[key] = reason
    large = _constants(found, result)
    ranges = _ranges(found, result, request)
    for key, node in found.nodes.items():
        if key not in result.kept and (reason := _risk_of(found, node, ranges)):
            result.kept[key] = reason
            if ranges is not None:
                result.measured.add(key)
    if ranges is None:
        _spread(found, result, large)
    else:
        _measure(found, result, ranges)
    return result


def _asked(node: gs.Node, request: Request) -> str | None:
    """Return what the user says against a node."""
    why = left_out(label(node), request.only, request.skip)
    return f"it is {why}" if why else None


def _fixed(found: Survey, node: gs.Node) -> str | None:
    """Return what keeps a node in float32 whatever its values are."""
    if origin(node) is not None and (mark := found.ctx.model.metadata(node).get(MARK)):
        return mark
    provider = found.ctx.target.provider
    missing = provider in KERNELS and found.opset < KERNELS[provider].get(node.op, 1 << 30)
    if missing and not is_function(node.op, found.opset):
        return f"provider '{provider}' has no float16 {node.op}"
    if node.op in REDUCING and node.attrs.get("reduction", "none") != "none":
        return REDUCING[node.op]
    raw, why = RAW_OUTPUT.get(node.op, (len(node.outputs), ""))
    if raw < len(node.outputs) and node.outputs[raw].name:
        return why
    trains = node.attrs.get("training_mode") or (found.opset < 14 and len(node.outputs) > 1)
    if is_standard(node, "BatchNormalization") and trains:
        return "it is in training mode"
    risk = risk_at(found, node)
    return None if risk is None or risk.measurable else f"{node.op}: {risk.why}"


def _risk_of(found: Survey, node: gs.Node, ranges: Ranges | None) -> str | None:
    """Return what keeps a node in float32 by its values, as far as they are known."""
    if is_standard(node, "Cast"):
        return _wide_integers(found, node, ranges)
    risk = risk_at(found, node)
    if risk is None:
        return None
    if ranges is None:
        return f"{node.op}: {risk.why} (samples would tell)"
    return None if risk.divisor is None else ranges.too_near_zero(node.inputs[risk.divisor])


def risk_at(found: Survey, node: gs.Node) -> Risk | None:
    """Return the risk of a node, None where there is none."""
    if is_standard(node, "Mul") and node.inputs[0] is node.inputs[1]:
        return SQUARE
    risk = RISKS.get(node.op)
    if risk is None or not is_standard(node):
        return None
    if risk.divisor is not None and is_constant(node.inputs[risk.divisor]):
        return None
    if risk.axis and (count := _reduced(found, node)) is not None and count <= risk.axis:
        return None
    return risk


def _reduced(found: Survey, node: gs.Node) -> int | None:
    """Return how many elements are reduced to one, None where that is not known."""
    shape = found.ctx.shapes.proved(node.inputs[0]).shape
    axes = parameter(node, "axes", found.opset)
    if shape is None or isinstance(axes, Unknown):
        return None
    chosen = range(len(shape)) if axes is None else [int(a) for a in axes.reshape(-1)]
    sizes = [size for a in chosen if isinstance(size := shape[a], int)]
    return math.prod(sizes) if len(sizes) == len(chosen) else None


def _wide_integers(found: Survey, cast: gs.Node, ranges: Ranges | None) -> str | None:
    """Return why a Cast must make float32: whole numbers that float16 may not hold."""
    source = found.ctx.shapes.of(cast.inputs[0]).dtype
    if source is None or source.name in NARROW_INTEGERS or source.kind not in "iu":
        return None
    if ranges is not None and (peak := ranges.peak(cast.outputs[0])) is not None and peak <= EXACT_INTEGERS:
        return None
    return f"it makes floats of {source}: {RISKS['Range'].why}"


# --- constants


def _constants(found: Survey, result: Islands) -> set[int]:
    """Keep what reads constants that float16 does not hold; return the tensors made of too large ones, by id."""
    seen: dict[int, str | None] = {}
    large: set[int] = set()
    for key, node in found.nodes.items():
        for tensor in found.inputs(node):
            if not is_constant(tensor):
                continue
            if id(tensor) not in seen:
                seen[id(tensor)] = _unfit(found, tensor, result.masks)
            reason = seen[id(tensor)]
            if reason is None:
                continue
            result.kept.setdefault(key, reason)
            if "beyond" in reason and node.op in _CARRIES:
                large.update(id(t) for t in found.outputs(node))
    return large


def peak_of(values: Array) -> float:
    """Return the largest finite magnitude of an array, 0 where there is none."""
    flat, peak = values.reshape(-1), 0.0
    for start in range(0, flat.size, _CHUNK):
        sizes = np.abs(flat[start : start + _CHUNK])
        peak = max(peak, float(sizes.max(initial=0.0, where=np.isfinite(sizes))))
    return peak


def _unfit(found: Survey, tensor: gs.Tensor, masks: set[int]) -> str | None:
    """Return why a constant must stay float32."""
    values = values_of(tensor)
    if values is None:
        return f"constant '{tensor.name}' cannot be read"
    peak = peak_of(values)
    if peak > LARGEST:
        flow = _mask(found, tensor)
        if flow is not None:
            masks.update(flow)
            return None
        return f"constant '{tensor.name}' holds {peak:.3g}, beyond {LARGEST:.0f}"
    if 0 < peak < FEW_DIGITS:
        return f"constant '{tensor.name}' is at most {peak:.3g}, which float16 rounds to {float(np.float16(peak)):.3g}"
    divides = any(is_standard(n, "Div", "Mod") and n.inputs[1] is tensor for n in found.edit.consumers(tensor))
    if divides and bool(((values.astype(np.float16) == 0) & (values != 0)).any()):
        return f"constant '{tensor.name}' divides, and is partly zero in float16"
    return None


def _mask(found: Survey, constant: gs.Tensor) -> set[int] | None:
    """Return the ids of all tensors on the way of a constant to Softmaxes, None where anything else reads it."""
    passed: set[int] = {id(constant)}
    waiting = [constant]
    reached = False
    while waiting:
        tensor = waiting.pop()
        if found.edit.is_output(tensor):
            return None
        for node in found.edit.consumers(tensor):
            if not found.edit.is_local(node) or not is_standard(node):
                return None
            if node.op in MASKED:
                reached = True
            elif not _masks_on(found, node):
                return None
            else:
                fresh = [t for t in node.outputs if t.name and id(t) not in passed]
                passed.update(id(t) for t in fresh)
                waiting += fresh
    return passed if reached else None


def _masks_on(found: Survey, node: gs.Node) -> bool:
    """Tell whether a node hands a mask on."""
    if node.op in MASK_FACTORS:
        return all(is_constant(t) or id(t) in found.whole for t in node.inputs)
    return node.op in MASKING or node.op in MOVEMENT


# --- without samples: what follows from an island that may return large numbers


def _spread(found: Survey, result: Islands, large: set[int]) -> None:
    """Keep what reads numbers that may be too large, up to operators that return numbers of usual size."""
    for node in found.edit.graph.nodes:
        key = id(node)
        reads_large = next((t for t in found.inputs(node) if id(t) in large), None)
        if reads_large is not None and key not in result.kept:
            result.kept[key] = f"'{reads_large.name}' may be too large for float16 (samples would tell)"
        risk = risk_at(found, node) if key in result.kept else None
        carries = reads_large is not None and node.op in _CARRIES - SETTLES and not shrinks(node) and not bounded(node)
        if carries or (risk is not None and risk.spreads):
            large.update(id(t) for t in found.outputs(node))


def shrinks(node: gs.Node) -> bool:
    """Tell whether a node multiplies by a small constant."""
    if not is_standard(node, "Mul"):
        return False
    factors = [v for t in node.inputs if (v := values_of(t)) is not None]
    return any(0 < peak_of(v) <= SHRINKS for v in factors)


def bounded(node: gs.Node) -> bool:
    """Tell whether a node cuts off on both sides at numbers that float16 holds."""
    if not is_standard(node, "Clip"):
        return False
    if len(node.inputs) < 3:
        low, high = node.attrs.get("min"), node.attrs.get("max")
    else:
        low, high = (scalar_of(t) for t in node.inputs[1:3])
    return low is not None and high is not None and max(abs(low), abs(high)) <= LARGEST


# --- with samples


@dataclass(frozen=True)
class Ranges:
    """Ranges of tensors on samples.

    Attributes:
        calibration: the statistics.
        names: tensors that were measured.
        limit: largest magnitude that is safe.
    """

    calibration: Calibration
    names: frozenset[str]
    limit: float

    def of(self, tensor: gs.Tensor) -> tuple[float, float] | None:
        """Return the least and the largest value of a tensor, None where they are not known."""
        if tensor.name not in self.names:
            return None
        found = self.calibration.range(tensor.name, "min-max")
        return float(found.low), float(found.high)

    def peak(self, tensor: gs.Tensor) -> float | None:
        """Return the largest magnitude."""
        found = self.of(tensor)
        return None if found is None else max(abs(found[0]), abs(found[1]))

    def unfit(self, tensor: gs.Tensor, *, mask: bool) -> str | None:
        """Return why a tensor must stay float32."""
        found = self.of(tensor)
        if found is None:
            return None
        low, high = found
        peak = high if mask else max(-low, high)
        if not peak <= self.limit:
            return f"'{tensor.name}' reaches {peak:.3g} on the samples, beyond {self.limit:.0f}"
        if 0 < max(-low, high) < SMALLEST_NORMAL:
            return f"'{tensor.name}' is at most {max(-low, high):.3g} on the samples: float16 keeps few of its digits"
        return None

    def too_near_zero(self, tensor: gs.Tensor) -> str | None:
        """Return why a divisor (or the argument of a logarithm) must stay float32."""
        found = self.of(tensor)
        if found is not None and (found[0] >= SMALLEST_NORMAL or found[1] <= -SMALLEST_NORMAL):
            return None
        return f"its divisor or argument '{tensor.name}' comes near zero on the samples"


def _ranges(found: Survey, result: Islands, request: Request) -> Ranges | None:
    """Measure the tensors in question; None without samples, or inside subgraphs, whose tensors are not measured."""
    samples = found.ctx.samples
    if samples is None or samples.random or found.edit.graph is not found.ctx.model.graph:
        return None
    open_nodes = [node for key, node in found.nodes.items() if key not in result.kept]
    tensors = [t for node in open_nodes for t in (*found.inputs(node), *found.outputs(node))]
    names = [t.name for t in tensors if not is_constant(t)]
    if not names:
        return None
    calibration = found.ctx.calibration(dict.fromkeys(names))
    measured = frozenset(name for name in names if _has_values(calibration, name))
    return Ranges(calibration, measured, LARGEST / request.headroom)


def _has_values(calibration: Calibration, name: str) -> bool:
    """Tell whether a tensor had any finite value on the samples (infinite ones float16 has, too)."""
    try:
        calibration.range(name)
    except DataError:
        return False
    return True


def _measure(found: Survey, result: Islands, ranges: Ranges) -> None:
    """Keep both sides of every tensor whose values on the samples do not fit."""
    unfit: dict[int, str | None] = {}
    for key, node in found.nodes.items():
        if key in result.kept:
            continue
        for tensor in (*found.inputs(node), *found.outputs(node)):
            if is_constant(tensor):
                continue
            if id(tensor) not in unfit:
                unfit[id(tensor)] = ranges.unfit(tensor, mask=id(tensor) in result.masks)
            reason = unfit[id(tensor)]
            if reason is not None:
                result.kept[key] = reason
                result.measured.add(key)


def half_of(values: Array) -> Array:
    """Return values as float16; finite ones beyond its range become the largest."""
    made = np.empty(values.shape, np.float16)
    source, target = np.ascontiguousarray(values).reshape(-1), made.reshape(-1)
    for start in range(0, source.size, _CHUNK):
        part = source[start : start + _CHUNK]
        target[start : start + _CHUNK] = np.where(np.isfinite(part), np.clip(part, -LARGEST, LARGEST), part)
    return made
