"""BatchNormalization behind Conv, ConvTranspose or Gemm, folded into their weights.

    BN(conv(x, W, b))  =  conv(x, W * f, (b - mean) * f + shift)        f = scale / sqrt(var + epsilon)

with f along the output channels of W.  Computed in float64 and rounded once to the type of W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, refers
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label
from graphopt.ops import is_standard
from graphopt.registry import register
from graphopt.tensors import is_float

Array = np.ndarray[Any, Any]


@register
@dataclass(frozen=True)
class FuseBatchnorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm before it.

    Exact up to one rounding of each weight, keeps the signature.  Refuses in training mode, when something else
    reads the value between, when a weight or statistic is not constant, and when a folded weight overflows.  A
    weight that others use, too, is copied.
    """

    name: ClassVar[str] = "fuse-batchnorm"
    optional: ClassVar[bool] = True

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per BatchNormalization behind an operator with weights."""
        with Edit(graph) as edit:
            for norm in list(graph.nodes):
                if not is_standard(norm, "BatchNormalization") or len(norm.inputs[0].inputs) != 1:
                    continue
                node = norm.inputs[0].inputs[0]
                if is_standard(node, *_CHANNELS) and edit.is_local(node) and not edit.removed(node):
                    yield _fused(edit, ctx, node, norm)


def _fused(edit: Edit, ctx: Context, node: gs.Node, norm: gs.Node) -> Change:
    what = f"{node.op} + BatchNormalization -> {node.op}"
    reason = _refusal(edit, node, norm)
    folded = None if reason else _fold(node, norm)
    if folded is None or isinstance(folded, str):
        return Change(label(norm), what, reason or str(folded))
    weight, bias = folded

    def apply() -> None:
        edit.set_input(node, 1, ctx.constant(f"{node.inputs[1].name}/{label(norm)}", weight))
        edit.set_input(node, 2, ctx.constant(f"{node.outputs[0].name}/bias", bias))
        if node.op == "Gemm":
            node.attrs.pop("beta", None)
        edit.hand_over(node, node.outputs[0], norm.outputs[0])
        edit.remove(norm)

    return Change(label(norm), what, f"scale and shift go into '{node.inputs[1].name}'", apply)


def _refusal(edit: Edit, node: gs.Node, norm: gs.Node) -> str | None:
    """Return why the two cannot become one, from their places and attributes alone."""
    opset = int(edit.graph.opset)
    if opset < 7 or norm.attrs.get("spatial", 1) != 1 or refers(norm) or refers(node):
        return "this form of BatchNormalization is not understood"
    if norm.attrs.get("training_mode", 0) or any(t.name for t in norm.outputs[1:]):
        return "BatchNormalization is in training mode"
    if edit.sole_consumer(norm.inputs[0]) is None:
        return f"something else reads the output of {node.op}, too"
    return edit.why_not_bypass(norm.outputs[0], norm.inputs[0])


def _fold(node: gs.Node, norm: gs.Node) -> tuple[Array, Array] | str:
    """Return the folded weight and bias, or why there are none."""
    parameters = [array_of(t) for t in norm.inputs[1:5]]
    weight = array_of(node.inputs[1])
    has_bias = len(node.inputs) > 2 and not node.inputs[2].is_empty()
    bias = array_of(node.inputs[2]) if has_bias else np.zeros(1)
    if any(p is None for p in parameters):
        return "a parameter of BatchNormalization is not constant"
    if weight is None or bias is None:
        return f"a weight of {node.op} is not constant"
    if not is_float(weight.dtype):
        return f"the weight is {weight.dtype}"
    scale, shift, mean, var = (np.asarray(p, np.float64) for p in parameters)
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(var + norm.attrs.get("epsilon", 1e-5))
        wide = bias.astype(np.float64) * (node.attrs.get("beta", 1.0) if node.op == "Gemm" else 1.0)
        if not _one_per_channel(wide, factor):
            return f"the bias of {node.op} varies along the batch"
        new_bias = (wide.reshape(-1) - mean) * factor + shift
        scaled = _CHANNELS[node.op](weight.astype(np.float64), factor, node)
        if scaled is None:
            return "the channels of the weight do not fit those of BatchNormalization"
        results = scaled.astype(weight.dtype), new_bias.astype(weight.dtype)
    if not all(np.isfinite(r.astype(np.float64)).all() for r in results):
        return f"a folded weight is not a finite {weight.dtype}"
    return results


def _one_per_channel(bias: Array, factor: Array) -> bool:
    """Tell whether a bias is one number, or one for each output channel."""
    return bias.size == 1 or (bias.size == factor.size == bias.shape[-1])


def _conv(weight: Array, factor: Array, _: gs.Node) -> Array | None:
    if weight.ndim < 3 or weight.shape[0] != factor.size:
        return None
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))


def _conv_transpose(weight: Array, factor: Array, node: gs.Node) -> Array | None:
    """Weights are [inputs, outputs / groups, …]: the outputs of group g belong to its slice of the inputs."""
    groups = int(node.attrs.get("group", 1))
    if weight.ndim < 3 or weight.shape[1] * groups != factor.size or weight.shape[0] % groups:
        return None
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    scaled = grouped * factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return np.asarray(scaled.reshape(weight.shape))


def _gemm(weight: Array, factor: Array, node: gs.Node) -> Array | None:
    transposed = bool(node.attrs.get("transB", 0))
    if weight.ndim != 2 or weight.shape[0 if transposed else 1] != factor.size:
        return None
    return weight * (factor.reshape(-1, 1) if transposed else factor)


_CHANNELS: Mapping[str, Any] = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm}
"""Operator -> how its weight takes a factor per output channel."""
