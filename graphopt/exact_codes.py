"""Scales with which integer and float arithmetic give the same codes, bit for bit.

    scale of an activation   p 2^k,  p one of 1, 1.25, 1.5, 1.75, the same for all that meet in a sum; even zero point
    scale of a weight        p 2^k,  any of these, or the p of the output where input and output have different ones

Every product of codes, every sum of them of up to 20 bits (the factors take the rest of 24) and every quotient by the
next scale is then a float32 without rounding: it matters neither in which order is added nor whether floats or integers
are.  With other scales a last digit decides where a value lies between two codes; the code that flips moves others, and
after some tens of layers two ways to compute the same model differ by a part of what quantization itself costs.  An
even zero point keeps ties: half to even is the same before it is added and behind.

Powers of two as scales: Jain et al., "Trained Quantization Thresholds", MLSys 2020.  The price is up to one bit of the
range, which training takes back (`graphopt finetune --qat`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from graphopt.codes import Affine, code_range, normal

Array: TypeAlias = np.ndarray[Any, Any]

PHASES = (1.0, 1.25, 1.5, 1.75)

CUT = 0.95
"""A range may be cut to this part of itself rather than be doubled."""

_ROUNDING = 1.0 + 1e-6


def phase_of(codes: Iterable[tuple[Affine, bool]]) -> float:
    """Return the phase that widens, or cuts, the ranges of activations least.

    Args:
        codes: scalar codes, each with whether its range must not get wider.
    """
    held = [(float(code.scale), bounded) for code, bounded in codes]

    def change(phase: float) -> float:
        return sum(abs(float(np.log2(_scale(scale, phase, bounded=b) / scale))) for scale, b in held)

    return min(PHASES, key=change)


def exact_activation(code: Affine, phase: float, *, bounded: bool) -> Affine:
    """Return a scalar code with a scale of this phase and an even zero point.

    Args:
        code: the code that suits the range.
        phase: of the model.
        bounded: whether the ends of the range stand for a Clip, so that it must not get wider.
    """
    low, high = code_range(code.dtype)
    scale = _scale(float(code.scale), phase, bounded=bounded)
    zero = int(code.zero_point)
    if scale > float(code.scale) and low < zero < high:  # as much room is left at both ends
        middle = (low + high) / 2
        zero = round(middle - (middle - zero) * float(code.scale) / scale)
    return Affine(np.asarray(scale, np.float32), np.asarray(min(max(zero, low), high) // 2 * 2).astype(code.dtype))


def weight_phase(input_scale: float, output_phase: float) -> float | None:
    """Return the phase that the weights of a layer need, None where any does.

    The factor between sums and output, input scale x weight scale / output scale, is to have few binary digits: the
    weight's has to hold the odd part of the output's, unless that is 1 or the input's.
    """
    of_input = 2.0 * float(np.frexp(input_scale)[0])
    return None if output_phase in (1.0, of_input) else output_phase


def exact_weight(code: Affine, values: Array, least: Array | None = None, *, phase: float | None = None) -> Affine:
    """Return a weight's code with scales of the phases, each the one of its neighbours that leaves less squared error.

    Args:
        code: zero points 0, one scale or one per channel.
        values: the weight.
        least: no scale is to be smaller, in the shape of the scales; None for no such limit.
        phase: of the scales; None for any of the phases.
    """
    wanted = code.scale.astype(np.float64) / (phase or 1.0)
    mantissa, exponent = np.frexp(wanted)  # 0.5 <= mantissa < 1: in eighths it has three binary digits
    digits = 8 if phase is None else 1
    scales = [(phase or 1.0) * np.ldexp(step(mantissa * digits) / digits, exponent) for step in (np.floor, np.ceil)]
    if phase is not None:
        scales[0] = scales[1] / 2
    below, above = (replace(code, scale=normal(scale)) for scale in scales)
    axes = tuple(i for i in range(values.ndim) if code.axis is None or i != code.axis % values.ndim)
    errors = [np.square(values - c.approximate(values)).sum(axis=axes, dtype=np.float64) for c in (below, above)]
    scale = np.where(errors[0] < errors[1], below.scale, above.scale)
    if least is not None:
        scale = np.where(scale < least, above.scale, scale)
    return replace(code, scale=np.asarray(scale, np.float32))


def _scale(scale: float, phase: float, *, bounded: bool) -> float:
    """Return the scale of a phase nearest to one."""
    steps = np.log2(scale / phase)
    steps = np.floor(steps + np.log2(_ROUNDING)) if bounded else np.ceil(steps + np.log2(CUT))
    return float(phase * np.exp2(steps))
