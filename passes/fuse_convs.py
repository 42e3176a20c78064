"""Convolutions with constant weights that add up, or follow each other, as one.

    Conv(Conv(x, W1, b1), W2, b2)            one of the two 1x1     ->  Conv(x, W2·W1, W2·b1 + b2)
    Conv(x, W1, b1) + Conv(x, W2, b2)                               ->  Conv(x, W1 + W2, b1 + b2)
    Conv(x, W, b) + BatchNormalization(x), + x·c + d, + x           ->  Conv(x, W + diag(c), b + d)
    Conv(x, W) with zeros at the rim of W                           ->  Conv(x, the rest of W), less padding

How kernels of different windows, strides and groups meet stands in `conv_kernels`.  Sums are what re-parametrised
networks (RepVGG, MobileOne, ACNet, DBB, FastViT) hold when they were exported without being switched to deployment,
and adapters (LoRA) that were not merged.  ORT does none of this; measured against it, ORT 1.31, one thread: RepVGG
blocks 0.82 to 0.86, an identity branch 0.92 to 0.95, Conv·Conv at half the MACs 0.56 to 0.72, at equal MACs 0.98.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, refers
from graphopt.base import Change, Context
from graphopt.edit import Edit, label
from graphopt.ops import is_standard
from graphopt.pattern import Constant, Op, Value
from graphopt.registry import register
from graphopt.rewrite import Match, RefusedError, Rule, RulePass

from .conv_kernels import (
    Kernel,
    added,
    composed,
    diagonal,
    outline,
    product_macs,
    sum_macs,
    trimmed,
    why_not_composed,
    window_of,
)

Array = np.ndarray[Any, Any]


def kernel(m: Match, node: str, w: str, b: str) -> Kernel | str:
    """Return a matched Conv as a value, its weight not read yet, or why it cannot be one.

    Args:
        m: the match.
        node: name of the Conv in the pattern.
        w: name of its weight.
        b: name of its bias.
    """
    weight, attrs, bias = m.values[w].values, m[node].attrs, m.values[b]
    if weight.ndim < 3:
        return "its weight has no kernel"
    window = window_of(attrs, weight.shape[2:])
    if isinstance(window, str):
        return window
    group = int(attrs.get("group", 1))
    if weight.shape[0] % group:
        return "its outputs do not fall into its groups"
    if bias is not None and bias.values.shape != weight.shape[:1]:
        return "its bias is not one number per output"
    return Kernel(weight, None if bias is None else bias.wide, group, window)


def conv(op: Op, x: Value, made: Kernel | str) -> Value:
    """Return the Conv that a value stands for.

    Raises:
        RefusedError: there is none.
    """
    made = sure(made)
    return op.Conv(x, made.weight, made.bias, **made.attributes())


def sure(found: Kernel | str) -> Kernel:
    """Return a convolution.

    Raises:
        RefusedError: there is a reason instead.
    """
    if isinstance(found, str):
        raise RefusedError(found)
    return found


def _why_not_in_a_row(m: Match, *names: str) -> str | None:
    """Return why two matched Convs (node, weight, bias; twice) are not one where they are one behind the other."""
    first, second = kernel(m, *names[:3]), kernel(m, *names[3:])
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    biased = first.bias is not None and bool(first.bias.any())
    return why_not_composed(first.window, second.window, biased=biased)


class ConvOfConv(Rule):
    """Conv(Conv(x, v, c), w, b) -> Conv(x, w·v, w·c + b)      one of them 1x1"""

    @staticmethod
    def pattern(op: Op, x: Value, v: Constant, c: Constant | None, w: Constant, b: Constant | None) -> Value:
        return op.Conv(op.Conv(x, v, c, name="first"), w, b, name="second")

    @staticmethod
    def check(m: Match) -> str | None:
        return _why_not_in_a_row(m, "first", "v", "c", "second", "w", "b")

    @staticmethod
    def worth(m: Match) -> str | None:
        first, second = kernel(m, "first", "v", "c"), kernel(m, "second", "w", "b")
        if isinstance(first, str) or isinstance(second, str):
            return first if isinstance(first, str) else str(second)
        before, after = product_macs(first, second)
        return f"{after} MACs for each place instead of {before}" if after > before else None

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        return conv(op, x, composed(sure(kernel(m, "first", "v", "c")), sure(kernel(m, "second", "w", "b"))))

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Either is 1x1; strides, padding and groups of both."""
        last, axes = bool(rng.random() < 0.5), int(rng.integers(1, 3))
        big, pads, strides, group = (int(n) for n in rng.integers((1, 0, 1, 1), (4, 2, 3, 3)))
        first, second = (big, 1) if last else (1, big)
        return {
            "x": (2, 4, *[7] * axes), "v": (6, 4 // group, *[first] * axes), "c": (6,),
            "w": (2, 6 // group, *[second] * axes), "b": (2,), "first.group": group, "second.group": group,
            "first.pads": [pads if last else 0] * 2 * axes, "first.strides": [strides if last else 1] * axes,
            "second.pads": [0 if last and rng.random() < 0.8 else pads] * 2 * axes,
            "second.strides": [int(rng.integers(1, 3))] * axes,
        }  # fmt: skip


class SumOfConvs(Rule):
    """(y + Conv(x, w1, b1)) + Conv(x, w2, b2) -> y + Conv(x, w1 + w2, b1 + b2)      with or without y

    The second may be two in a row, which are one (`ConvOfConv`): an adapter of low rank beside a layer.
    """

    @staticmethod
    def pattern(
        op: Op, x: Value, y: Value, w1: Constant, b1: Constant | None, w2: Constant, b2: Constant | None,
        v: Constant, c: Constant | None,
    ) -> Value:  # fmt: skip
        one = op.Conv(x, w1, b1, name="one")
        other = op.Conv(op.any(x, op.Conv(x, v, c, name="inner")), w2, b2, name="other")
        return op.any(one, y + one) + other

    @staticmethod
    def check(m: Match) -> str | None:
        return _why_not_in_a_row(m, "inner", "v", "c", "other", "w2", "b2") if "inner" in m else None

    @staticmethod
    def worth(m: Match) -> str | None:
        one, other = kernel(m, "one", "w1", "b1"), _other(m)
        if isinstance(one, str) or isinstance(other, str):
            return one if isinstance(one, str) else str(other)
        before, after = sum_macs(one, other)
        if "inner" in m:
            weights = [m.values[name].values for name in ("w1", "v", "w2")]
            before = sum(w.size for w in weights) // len(weights[0])
        return f"{after} MACs for each output instead of {before}" if after > before else None

    @staticmethod
    def rewrite(op: Op, x: Value, y: Value | None, m: Match) -> Value:
        other = sure(kernel(m, "other", "w2", "b2"))
        if "inner" in m:
            other = sure(composed(sure(kernel(m, "inner", "v", "c")), other))
        made = conv(op, x, added(sure(kernel(m, "one", "w1", "b1")), other))
        return made if y is None else y + made

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Kernels of different sizes, in groups, with padding that mostly fits."""
        one, other = (int(k) for k in rng.choice((1, 3), 2))
        groups, strides = [int(g) for g in rng.choice((1, 2, 4), 2)], int(rng.integers(1, 3))
        shift = int(rng.random() < 0.2)
        return {
            "x": (2, 4, 7, 7), "w1": (4, 4 // groups[0], one, one), "w2": (4, 4 // groups[1], other, other),
            "b1": (4,), "b2": (4,), "one.group": groups[0], "other.group": groups[1],
            "v": (4, 4, 1, 1), "c": (4,), "inner.group": 1, "inner.strides": [1, 1], "inner.pads": [0] * 4,
            "one.strides": [strides] * 2, "other.strides": [strides if rng.random() < 0.9 else 1] * 2,
            "one.pads": [one // 2 + shift] * 4, "other.pads": [other // 2] * 4,
        }  # fmt: skip


def _other(m: Match) -> Kernel | str:
    """Return the second convolution of a sum; where it is two in a row, their product without its values."""
    other = kernel(m, "other", "w2", "b2")
    if isinstance(other, str) or "inner" not in m:
        return other
    inner = kernel(m, "inner", "v", "c")
    if isinstance(inner, str):
        return inner
    return outline(inner, other)


class ConvPlusScaled(Rule):
    """(y + Conv(x, w, b)) + x·c + d -> y + Conv(x, w + diag(c), b + d)      with or without y, c and d

    In place of x·c + d, a BatchNormalization of x.
    """

    @staticmethod
    def pattern(
        op: Op, x: Value, y: Value, w: Constant, b: Constant | None, c: Constant, d: Constant,
        gain: Constant, shift: Constant, mean: Constant, var: Constant,
    ) -> Value:  # fmt: skip
        made = op.Conv(x, w, b, name="conv")
        norm = op.BatchNormalization(x, gain, shift, mean, var, name="norm")
        return op.any(made, y + made) + op.any(norm, x * c, x * c + d, x)

    @staticmethod
    def worth(m: Match) -> str | None:
        found = kernel(m, "conv", "w", "b")
        beside = found if isinstance(found, str) else _beside(found, m)
        if isinstance(found, str) or isinstance(beside, str):
            return str(beside)
        before, after = sum_macs(found, beside)
        return f"{after} MACs for each output instead of {before}" if after > before else None

    @staticmethod
    def rewrite(op: Op, x: Value, y: Value | None, m: Match) -> Value:
        found = sure(kernel(m, "conv", "w", "b"))
        made = conv(op, x, added(found, sure(_beside(found, m))))
        return made if y is None else y + made

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Kernels that keep the size, mostly; scales of every shape."""
        size, group = int(rng.choice((1, 3))), int(rng.choice((1, 2, 4)))
        pads = size // 2 if rng.random() < 0.9 else 1
        shapes = [(4, 1, 1), (1, 4, 1, 1), (1,), (), (1, 1), (7,), (4, 1, 7)]
        return {
            "x": (2, 4, 7, 7), "w": (4, 4 // group, size, size), "b": (4,), "conv.group": group,
            "conv.strides": [1 if rng.random() < 0.9 else 2] * 2, "conv.pads": [pads] * 4,
            "c": shapes[rng.integers(len(shapes))], "d": shapes[rng.integers(len(shapes))],
            "gain": (4,), "shift": (4,), "mean": (4,), "var": rng.uniform(0.5, 2, 4),
        }  # fmt: skip


def _beside(found: Kernel, m: Match) -> Kernel | str:
    """Return what is added to a convolution as a depthwise one on the same input, or why it is none."""
    channels, axes = found.outputs, len(found.window.size)
    if found.inputs != found.outputs:
        return f"it makes {found.outputs} channels of {found.inputs}"
    if "norm" in m:
        if m["norm"].param("training_mode") or m["norm"].param("spatial") == 0:
            return "BatchNormalization is in training mode"
        gain, shift, mean, var = (m.values[name].wide for name in ("gain", "shift", "mean", "var"))
        scale = gain / np.sqrt(var + float(m["norm"].param("epsilon")))
        return diagonal(scale, shift - mean * scale, axes)
    pair: list[Array | None] = []
    for name in ("c", "d"):
        constant = m.values[name]
        values = None if constant is None else per_channel(constant.wide, channels, axes)
        if isinstance(values, str):
            return values
        pair.append(values)
    return diagonal(np.ones(channels) if pair[0] is None else pair[0], pair[1], axes)


def per_channel(values: Array, channels: int, axes: int) -> Array | str:
    """Return what an operand is for each channel of a tensor with so many spatial axes, or why it varies inside one."""
    if values.ndim > axes + 2:
        return "the constant has more axes than the tensor"
    wide = values.reshape((1,) * (axes + 2 - values.ndim) + values.shape)
    if wide.size not in (1, wide.shape[1]) or wide.shape[1] not in (1, channels):
        return "the constant is not one number per channel"
    return np.broadcast_to(wide.reshape(-1), (channels,)).copy()


@register
@dataclass(frozen=True)
class FuseConvs(RulePass):
    """Make one Conv of those that add up or follow each other, and cut zeros off kernels.

    Exact up to one rounding of each weight, keeps the signature.  Refuses weights that are not constant or too large,
    a padding between two that would not see the bias of the first, values that others read, and whatever would need
    more MACs.
    """

    name: ClassVar[str] = "fuse-convs"
    optional: ClassVar[bool] = True
    rules: ClassVar = (SumOfConvs, ConvPlusScaled, ConvOfConv)

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose the rules' changes, then one per kernel with a rim of zeros."""
        yield from super().run(graph, ctx)
        with Edit(graph) as edit:
            for node in list(graph.nodes):
                if is_standard(node, "Conv") and len(node.inputs) > 1 and not refers(node):
                    yield from _smaller(edit, ctx, node)


def _smaller(edit: Edit, ctx: Context, node: gs.Node) -> Iterator[Change]:
    """Propose to cut the zeros off a kernel: masked and causal convolutions, pruned kernels, former 1x1 ones."""
    if not isinstance(node.inputs[1], gs.Constant) or all(k == 1 for k in node.inputs[1].shape[2:]):
        return
    weight = array_of(node.inputs[1])
    if weight is None or (weight[:1, :1] != 0).all():  # nearly always
        return
    window = window_of(node.attrs, weight.shape[2:])
    if isinstance(window, str):
        return
    made = trimmed(Kernel(weight, None, int(node.attrs.get("group", 1)), window))
    if made.weight.size == weight.size:
        return

    def apply() -> None:
        edit.set_input(node, 1, ctx.constant(f"{node.inputs[1].name}/trimmed", made.weight))
        node.attrs.pop("auto_pad", None)
        node.attrs.update(made.attributes())

    what = f"kernel {list(window.size)} -> {list(made.window.size)}"
    yield Change(label(node), what, "all other taps are zero", apply)
