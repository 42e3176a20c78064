"""Constants too small to matter, as zeros: many processors compute with denormal numbers a hundred times slower.

A number below the smallest normal one (1.2e-38 in float32) may cost an assist of the microcode each time it is an
operand or a result.  So may products of numbers that are merely close to it: in a tensor whose largest element is of
usual size, everything below 2^-80 of that goes too, if it is below 1e-30.  Trained networks have such weights in dead
channels (weight decay drives them there; PP-OCR's detector and recogniser have some in 16 tensors), and folding
multiplies small numbers into smaller ones.  The change is far below half a unit in the last place of any sum with the
tensor's large elements.  Not every processor minds: on an AMD EPYC with AVX-512 it makes no difference (1.00).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.base import Change, Context, Pass
from graphopt.ops import is_standard
from graphopt.registry import register

Array = np.ndarray[Any, Any]

RELATIVE = 2.0**-80
"""Of a tensor's largest element: what is below (and below `SMALL`) is dropped."""

SMALL = 1e-30
"""Float32 numbers whose products with usual activations come near the denormal range."""

CHUNK = 1 << 16
"""Elements looked at together: they fit in a cache."""

_NOTHING, _LARGEST = 0xFFFFFFFF, 0x7F7FFFFF
"""What zero becomes when one is taken off it; the bits of the largest finite float32."""

_SMALL_TWICE = 2 * int(np.float32(SMALL).view(np.uint32))
"""Twice the bits of `SMALL`."""


LINEAR: Mapping[str, frozenset[int]] = {
    "Conv": frozenset({1, 2}),
    "ConvTranspose": frozenset({1, 2}),
    "Gemm": frozenset({0, 1, 2}),
    "MatMul": frozenset({0, 1}),
    "BatchNormalization": frozenset({1, 2}),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), frozenset({1, 2, 3})),
}
"""Operator -> inputs that it is linear in: elsewhere a tiny number may keep a divisor or a logarithm from zero."""


@register
@dataclass(frozen=True)
class FlushDenormals(Pass):
    """Set denormal weights to zero.

    Exact far beyond one rounding of what they are added to, keeps the signature.  Float32 initializers that nothing
    but convolutions, products, recurrences and batch normalisations read, as weights or biases.
    """

    name: ClassVar[str] = "flush-denormals"
    stage: ClassVar[Any] = "lowering"
    optional: ClassVar[bool] = True

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per constant."""
        seen: set[int] = set()
        for node in graph.nodes:
            for index in LINEAR.get(node.op, ()) if is_standard(node) else ():
                constant = node.inputs[index] if index < len(node.inputs) else None
                if not isinstance(constant, gs.Constant) or id(constant) in seen or constant.dtype != np.float32:
                    continue
                seen.add(id(constant))
                values = array_of(constant)
                limit = None if values is None or not _only_weight(constant) else threshold(values)
                if values is not None and limit is not None:
                    yield _flushed(constant, values, limit)


def _only_weight(constant: gs.Constant) -> bool:
    """Tell whether all that read a constant are linear in it."""
    return all(
        is_standard(node) and i in LINEAR.get(node.op, ())
        for node in constant.outputs
        for i, tensor in enumerate(node.inputs)
        if tensor is constant
    )


def _flushed(constant: gs.Constant, values: Array, limit: float) -> Change:
    small = (np.abs(values) < limit) & (values != 0)

    def apply() -> None:
        constant.values = np.where(small, np.float32(0), values)

    what = f"{int(small.sum())} of {values.size} elements below {limit:.1e} -> 0"
    return Change(constant.name, what, "denormal operands and results are slow", apply)


def _any_small(flat: Array) -> bool:
    """Tell whether any of these float32 bits is zero or below `SMALL`."""
    for start in range(0, flat.size, CHUNK):
        chunk = flat[start : start + CHUNK]
        if (chunk + chunk).min() < _SMALL_TWICE:  # doubling drops the sign bit
            return True
    return False


def threshold(values: Array) -> float | None:
    """Return below which size elements of a float32 array are to be zero, None where there are none."""
    largest, smallest = 0, _NOTHING
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint32)  # without the sign, floats sort like integers
    if not _any_small(flat):  # nearly always
        return None
    for start in range(0, flat.size, CHUNK):
        sizes = flat[start : start + CHUNK] & np.uint32(0x7FFFFFFF)
        largest = max(largest, int(sizes.max()))
        sizes -= np.uint32(1)  # zero becomes the largest of all
        smallest = min(smallest, int(sizes.min()))
    tiny = float(np.finfo(np.float32).tiny)
    peak = float(np.array(min(largest, _LARGEST), np.uint32).view(np.float32))
    limit = max(tiny, min(SMALL, peak * RELATIVE))
    if smallest == _NOTHING:
        return None
    return limit if float(np.array(smallest + 1, np.uint32).view(np.float32)) < limit else None
