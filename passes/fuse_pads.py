"""Rules for Pad, Expand and Tile: what is put around a tensor, or made of copies of it.

Pad(Pad(x))                    ->  Pad(x)              pads added
Conv(Pad(x, 0))                ->  Conv(x)             the pads are the convolution's
AveragePool(Pad(x, 0))         ->  AveragePool(x)      counting them
MaxPool(Pad(x, lowest))        ->  MaxPool(x)          or 0, where x is not negative
Tile(x, r)                     ->  Expand(x, r)        only axes of size 1 repeat
Expand(x, s) + y               ->  x + y               where y, or x itself, has those sizes (so has the sum)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.analysis.constants import Unknown
from graphopt.matcher import NodeView
from graphopt.ops import BROADCASTING, is_standard
from graphopt.pattern import Op, Value
from graphopt.rewrite import Match, RefusedError, Rule

from .fuse_views import numbers

Pads = dict[int, tuple[int, int]]

_BINARY = sorted(BROADCASTING - {"Where", "PRelu", "Sum", "Mean", "Mod"})

_NOT_NEGATIVE = frozenset({"Relu", "Sigmoid", "Abs", "HardSigmoid", "Softplus", "Softmax", "Exp", "Sqrt"})


def pads_of(pad: NodeView, x: Value) -> Pads | None:
    """Return (before, after) of each axis that a Pad pads; None where they are computed, or crop."""
    pads, axes = numbers(pad.param("pads")), pad.param("axes")
    if pads is None or x.rank is None or min(pads, default=0) < 0:
        return None
    places = list(range(x.rank)) if axes is None else numbers(axes)
    if places is None or 2 * len(places) != len(pads):
        return None
    found = {a % x.rank: (pads[i], pads[i + len(places)]) for i, a in enumerate(places)}
    return {a: p for a, p in found.items() if p != (0, 0)}


def mode_of(pad: NodeView) -> str:
    """Return a Pad's mode."""
    found = pad.param("mode")
    return found.decode() if isinstance(found, bytes) else str(found)


def filling(pad: NodeView) -> float | None:
    """Return the number that a Pad puts around, None where it is computed or copied from x."""
    found: Any = pad.param("value")
    if mode_of(pad) != "constant" or isinstance(found, Unknown):
        return None
    if found is None:
        return 0.0
    held = np.asarray(found).reshape(-1)
    return float(held[0]) if held.size == 1 else None


class PadOfPad(Rule):
    """Pad(Pad(x)) -> Pad(x)    pads added, one filling"""

    min_opset = 11

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Return what random draws do not hit."""
        pads = {f"{name}.pads": [0, int(rng.integers(0, 3)), 1, int(rng.integers(0, 2))] for name in ("inner", "outer")}
        values = {f"{name}.value": float(rng.integers(0, 2)) for name in ("inner", "outer")}
        modes = ["constant", "constant", "edge", "reflect"]
        return {
            "x": (3, 4),
            **pads,
            **values,
            "inner.mode": str(rng.choice(modes)),
            "outer.mode": str(rng.choice(modes)),
        }

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Pad(op.Pad(x, name="inner"), name="outer")

    @staticmethod
    def check(m: Match) -> str | None:
        inner, outer = m["inner"], m["outer"]
        if mode_of(inner) != mode_of(outer) or mode_of(inner) not in ("constant", "edge"):
            return "the modes differ, or mirror"
        if mode_of(inner) == "constant" and (filling(inner) is None or filling(inner) != filling(outer)):
            return "they do not fill with one number"
        return None

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        first, second = pads_of(m["inner"], x), pads_of(m["outer"], x)
        if first is None or second is None or x.rank is None:
            raise RefusedError("pads are computed, or crop, or the rank is unknown")
        nothing = (0, 0)
        pairs = [(first.get(a, nothing), second.get(a, nothing)) for a in range(x.rank)]
        pads = [p[0] + q[0] for p, q in pairs] + [p[1] + q[1] for p, q in pairs]
        value = filling(m["inner"]) if mode_of(m["inner"]) == "constant" else None
        return op.Pad(x, np.asarray(pads, np.int64), value or None, mode=mode_of(m["inner"]))


def _window_pads(m: Match, x: Value, window: NodeView) -> list[int]:
    """Return the pads of a Pad and of the window behind it, added.

    Raises:
        RefusedError: the two are not the same.
    """
    pads, rank = pads_of(m["pad"], x), x.rank
    if pads is None or rank is None:
        raise RefusedError("pads are computed, or crop, or the rank is unknown")
    if any(axis < 2 for axis in pads):
        raise RefusedError("it pads batch or channels")
    mode = window.param("auto_pad")
    if mode not in (None, b"NOTSET", b"VALID", "NOTSET", "VALID") or window.param("ceil_mode"):
        raise RefusedError("the window's own pads depend on the padded size")
    own = numbers(window.param("pads")) or [0] * (2 * (rank - 2))
    if mode in (b"VALID", "VALID"):
        own = [0] * len(own)
    sides = [pads.get(a, (0, 0))[0] for a in range(2, rank)] + [pads.get(a, (0, 0))[1] for a in range(2, rank)]
    return [a + b for a, b in zip(own, sides, strict=True)]


def _attributes(window: NodeView, **changed: Any) -> dict[str, Any]:
    return {**{k: v for k, v in window.attrs.items() if k != "auto_pad"}, **changed}


class PadIntoConv(Rule):
    """Conv(Pad(x, 0), w) -> Conv(x, w)    the pads added to the convolution's"""

    min_opset = 11

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Return what random draws do not hit."""
        pads = [0, 0, *(int(p) for p in rng.integers(0, 3, 2)), 0, 0, *(int(p) for p in rng.integers(0, 3, 2))]
        return {
            "x": (2, 3, 5, 6),
            "w": (4, 3, 3, 3),
            "b": (4,),
            "pad.pads": pads,
            "pad.value": float(rng.integers(0, 2)),
        }

    @staticmethod
    def pattern(op: Op, x: Value, w: Value, b: Value | None) -> Value:
        return op.Conv(op.Pad(x, name="pad"), w, b, name="conv")

    @staticmethod
    def check(m: Match) -> str | None:
        return None if filling(m["pad"]) == 0 else "it does not pad with zeros"

    @staticmethod
    def rewrite(op: Op, x: Value, w: Value, b: Value | None, m: Match) -> Value:
        pads = _window_pads(m, x, m["conv"])
        return op.Conv(x, w, b, **_attributes(m["conv"], pads=pads))


def _short(pads: Sequence[int], window: NodeView) -> bool:
    """Tell whether each window reaches into the tensor: ORT refuses pads as large as the kernel."""
    kernel = numbers(window.param("kernel_shape")) or []
    dilations = numbers(window.param("dilations"))
    plain = dilations is None or set(dilations) == {1}
    return plain and len(pads) == 2 * len(kernel) and all(p < k for p, k in zip(pads, kernel * 2, strict=True))


class PadIntoAveragePool(Rule):
    """AveragePool(Pad(x, 0)) -> AveragePool(x)    that counts its padding"""

    min_opset = 11

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.AveragePool(op.Pad(x, name="pad"), name="pool")

    @staticmethod
    def check(m: Match) -> str | None:
        if filling(m["pad"]) != 0:
            return "it does not pad with zeros"
        if any(numbers(m["pool"].param("pads")) or ()) and not m["pool"].param("count_include_pad"):
            return "the pool does not count its own padding"
        return None

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        pads = _window_pads(m, x, m["pool"])
        if not _short(pads, m["pool"]):
            raise RefusedError("the pads are as large as the window")
        return op.AveragePool(x, **_attributes(m["pool"], pads=pads, count_include_pad=1))


class PadIntoMaxPool(Rule):
    """MaxPool(Pad(x, lowest)) -> MaxPool(x)    or Pad(x, 0), where x is not negative"""

    min_opset = 11

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Return what random draws do not hit."""
        pads = [0, 0, int(rng.integers(0, 2)), 1, 0, 0, 1, int(rng.integers(0, 2))]
        shape = (2, 3, 5, int(rng.integers(4, 7)))
        return {
            "x": shape,
            "pad.pads": pads,
            "pad.value": float(rng.choice([-np.inf, 2.0])),
            "pool.kernel_shape": [3, 3],
            "pool.ceil_mode": 0,
        }

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.MaxPool(op.Pad(x, name="pad"), name="pool")

    @staticmethod
    def check(x: Value, m: Match) -> str | None:
        value = filling(m["pad"])
        if value == 0 and _not_negative(x):
            return None
        return None if value == -np.inf else "it pads with what may be larger than an element"

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        pads = _window_pads(m, x, m["pool"])
        if not _short(pads, m["pool"]):
            raise RefusedError("the pads are as large as the window")
        return op.MaxPool(x, **_attributes(m["pool"], pads=pads))


def _not_negative(x: Value) -> bool:
    node = x.tensor.inputs[0] if len(x.tensor.inputs) == 1 else None
    if node is None or not is_standard(node):
        return False
    low = numbers(NodeView(node, 13).param("min")) if node.op == "Clip" else None
    return node.op in _NOT_NEGATIVE or (low is not None and len(low) == 1 and low[0] >= 0)


class TileOfOnes(Rule):
    """Tile(x, r) -> Expand(x, r)    where only axes of size 1 repeat"""

    types = None
    min_opset = 8

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Tile(x, name="tile")

    @staticmethod
    def check(x: Value, m: Match) -> str | None:
        repeats = numbers(m["tile"].param("repeats"))
        if repeats is None or x.shape is None:
            return "the repeats are computed, or the rank is unknown"
        if any(r != 1 and (r < 1 or d != 1) for r, d in zip(repeats, x.shape, strict=True)):
            return "an axis repeats that may be larger than 1"
        return None

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        repeats = np.asarray(numbers(m["tile"].param("repeats")), np.int64)
        return op.Expand(x, repeats)


def _useless(x: Value, wide: Value, y: Value) -> str | None:
    """Return why Expand of `x` to `wide` matters beside `y`."""
    if x.shape is None or wide.shape is None or y.shape is None:
        return "a rank is unknown"
    rank = len(wide.shape)
    if max(len(x.shape), len(y.shape)) < rank:
        return "the rank comes from it alone"
    sizes = [((1,) * rank + shape)[len(shape) :] for shape in (x.shape, y.shape)]
    for own, size, other in zip(sizes[0], wide.shape, sizes[1], strict=True):
        if size is None or size not in (own, other):
            return f"a size ({size}) comes from it alone"
    return None


class ExpandOfOperand(Rule):
    """Expand(x, s) + y -> x + y    where y has those sizes; on either side of any operator that broadcasts"""

    types = None
    min_opset = 8
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value, s: Value, y: Value) -> Value:
        wide = op.Expand(x, s, name="expand")
        left = (getattr(op, kind)(wide, y, name="left") for kind in _BINARY)
        return op.any(*left, *(getattr(op, kind)(y, wide, name="right") for kind in _BINARY))

    @staticmethod
    def check(x: Value, y: Value, m: Match) -> str | None:
        return _useless(x, Value("wide", m["expand"].node.outputs[0], m.shapes), y)

    @staticmethod
    def rewrite(x: Value, y: Value, m: Match) -> Value:
        return m["left"].again(x, y) if "left" in m else m["right"].again(y, x)


RULES: tuple[type[Rule], ...] = (
    PadOfPad,
    PadIntoConv,
    PadIntoAveragePool,
    PadIntoMaxPool,
    TileOfOnes,
    ExpandOfOperand,
)
