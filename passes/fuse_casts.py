"""Rules for Cast: where two conversions are one.

    Cast(Cast(x, B), C)  ->  Cast(x, C)     B holds every value of x exactly
    Cast(Cast(x, B), A)  ->  x              x is of type A

No rounding changes: what narrows in between stays.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx

from graphopt.matcher import NodeView
from graphopt.pattern import Op, Value
from graphopt.rewrite import Match, Rule
from graphopt.tensors import is_float

_EXACT = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
"""Bits of whole numbers that a float holds."""


def target_of(cast: NodeView) -> np.dtype[Any] | None:
    """Return what a Cast makes, None where a function's attribute says it."""
    found = cast.param("to")
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(found)) if isinstance(found, int) else None


def holds(wide: np.dtype[Any], narrow: np.dtype[Any]) -> bool:
    """Tell whether a type has every value of another, exactly."""
    if wide == narrow:
        return True
    if narrow == np.bool_:
        return wide.kind in "iuf" or wide.name in _EXACT
    if narrow.kind in "iu":
        low, high = int(np.iinfo(narrow).min), int(np.iinfo(narrow).max)
        if wide.kind in "iu":
            return int(np.iinfo(wide).min) <= low and high <= int(np.iinfo(wide).max)
        return wide.name in _EXACT and wide.name != "float16" and max(-low, high + 1) <= 1 << _EXACT[wide.name]
    if narrow.name not in _EXACT or wide.name not in _EXACT:
        return False
    a, b = ml_dtypes.finfo(wide), ml_dtypes.finfo(narrow)
    return bool(a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp)


def converts_differently(narrow: np.dtype[Any], wide: np.dtype[Any], last: np.dtype[Any]) -> str | None:
    """Return why `narrow` to `last` is not the same by way of `wide`, None where it is."""
    if not holds(wide, narrow):
        return f"{wide} does not hold every {narrow}"
    if last in (narrow, np.bool_):
        return None
    if narrow.kind in "iu" and is_float(wide) and not holds(last, narrow):
        return f"what {last} does not hold is converted differently from {narrow} and from {wide}"
    return None


class CastOfCast(Rule):
    """Cast(Cast(x, B), C) -> Cast(x, C)    where B holds every value of x"""

    types = None
    min_opset = 6
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Cast(op.Cast(x, name="inner"), name="outer")

    @staticmethod
    def check(x: Value, m: Match) -> str | None:
        between, last = target_of(m["inner"]), target_of(m["outer"])
        if x.dtype is None or between is None or last is None or x.dtype.kind in "OSU":
            return "a type is not known"
        return converts_differently(x.dtype, between, last)

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        if x.dtype == target_of(m["outer"]):
            return op.Identity(x)
        return op.Cast(x, to=m["outer"].param("to"))


RULES: tuple[type[Rule], ...] = (CastOfCast,)
