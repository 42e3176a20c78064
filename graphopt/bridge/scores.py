"""Outputs that are probabilities, looked through: the scores that a Softmax or Sigmoid made them of, in their layout.

Losses of probabilities are computed from scores: log softmax(x) is exact where log(softmax(x)) has underflowed. Where
nodes that only move values stand between the Softmax and the output, scores are moved the same way. An output whose
Softmax cannot be reached (written out as a quotient of exponentials, or sliced) gives log p, which is as good up to a
constant per row as long as p does not underflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch

from graphopt.analysis.outputs import probability_outputs
from graphopt.model import Model
from graphopt.ops import DEQUANTIZE, QUANTIZE, STANDARD_DOMAINS, WEIGHTED
from graphopt.tensors import is_float

_MAKERS = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}
_UNMOVED = frozenset({"Identity", "Cast", "Dropout"}) | QUANTIZE | DEQUANTIZE
_RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_LAST = frozenset({"Gemm", "MatMul"})
"""Layers whose features are the last axis."""

_TINY = 1e-30


@dataclass(frozen=True)
class Move:
    """One step from scores to the output's layout: a permutation, or the shape of a tensor."""

    perm: tuple[int, ...] | None = None
    like: str = ""


@dataclass(frozen=True)
class Score:
    """Where the scores behind an output are.

    Attributes:
        output: its name.
        tensor: the tensor to read; the output itself where it is not looked through.
        maker: what turns scores into the output: `softmax`, `sigmoid`, or '' for nothing.
        axis: of the classes in `tensor`; None where the graph does not tell.
        flat: whether classes are all axes from `axis` on (Softmax before opset 13).
        moves: what leads from `tensor` to the output's layout.
        probabilities: whether `tensor` holds probabilities all the same.
    """

    output: str
    tensor: str
    maker: str = ""
    axis: int | None = None
    flat: bool = False
    moves: tuple[Move, ...] = ()
    probabilities: bool = False

    @property
    def taps(self) -> tuple[str, ...]:
        """Tensors beside the outputs that `read` needs."""
        names = (self.tensor, *(move.like for move in self.moves))
        return tuple(dict.fromkeys(n for n in names if n not in ("", self.output)))

    def read(self, values: Mapping[str, torch.Tensor], shape: torch.Size) -> tuple[torch.Tensor, int | None]:
        """Return scores in the output's layout, in float32, and the axis of the classes.

        Args:
            values: tensors by name.
            shape: of the output.
        """
        scores = _float(values[self.tensor])
        if self.probabilities:
            return from_probabilities(scores, self.maker), None
        if self.axis is None or self.maker == "sigmoid":
            return _moved(scores, None, self.moves, values, shape)
        axis = self.axis % max(scores.dim(), 1)
        if self.flat and math.prod(scores.shape[axis + 1 :]) != 1:
            return scores.flatten(axis), axis
        return _moved(scores, axis, self.moves, values, shape)


def scores(model: Model) -> dict[str, Score]:
    """Return where the scores of each float output are, by output."""
    makers = probability_outputs(model)
    outputs = [t for t in model.graph.outputs if t.dtype is None or is_float(t.dtype)]
    return {t.name: _found(model, t) or _as_it_is(t, makers.get(t.name, "")) for t in outputs}


def from_probabilities(values: torch.Tensor, maker: str) -> torch.Tensor:
    """Return scores that a `softmax` or `sigmoid` would make these probabilities of."""
    if maker == "sigmoid":
        return torch.logit(values, eps=1e-7)
    return values.clamp_min(_TINY).log()


def _as_it_is(output: gs.Tensor, maker: str) -> Score:
    axis = None if maker else _layer_axis(output)
    return Score(output.name, output.name, maker, axis, probabilities=bool(maker))


def _layer_axis(output: gs.Tensor) -> int | None:
    """Return the axis of the features of a layer that makes an output, None where none does."""
    perms: list[list[int]] = []
    tensor = output
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        node = tensor.inputs[0]
        if node.op in WEIGHTED or node.op in _LAST:
            axis = 1 if node.op in WEIGHTED else -1
            for perm in reversed(perms):
                axis = perm.index(axis % len(perm))
            return axis
        read = [t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
        if len(read) != 1 or not (
            node.op in _UNMOVED or node.op == "Add" or (node.op == "Transpose" and "perm" in node.attrs)
        ):
            return None
        if node.op == "Transpose":
            perms.append([int(p) for p in node.attrs["perm"]])
        tensor = read[0]
    return None


def _found(model: Model, output: gs.Tensor) -> Score | None:
    moves: list[Move] = []
    tensor = output
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        node = tensor.inputs[0]
        if node.domain not in STANDARD_DOMAINS or not node.inputs or isinstance(node.inputs[0], gs.Constant):
            return None
        if node.op in _MAKERS:
            flat = model.opset < 13 and node.op != "Sigmoid"
            axis = None if node.op == "Sigmoid" else int(node.attrs.get("axis", 1 if flat else -1))
            return Score(output.name, node.inputs[0].name, _MAKERS[node.op], axis, flat, _shortened(moves))
        if node.op == "Transpose":
            perm = node.attrs.get("perm")
            moves.append(Move(perm=() if perm is None else tuple(int(p) for p in perm)))
        elif node.op in _RESHAPES:
            moves.append(Move(like="" if tensor is output else tensor.name))
        elif node.op not in _UNMOVED:
            return None
        tensor = node.inputs[0]
    return None


def _shortened(backwards: list[Move]) -> tuple[Move, ...]:
    """Return moves in order, without shapes that another shape follows at once; the last has the output's shape."""
    kept: list[Move] = []
    for move in backwards:
        if move.perm is None and kept and kept[-1].perm is None:
            continue
        kept.append(Move() if move.perm is None and not kept else move)
    return tuple(reversed(kept))


def _moved(
    values: torch.Tensor, axis: int | None, moves: tuple[Move, ...], held: Mapping[str, torch.Tensor], shape: torch.Size
) -> tuple[torch.Tensor, int | None]:
    for move in moves:
        if move.perm is not None:
            perm = move.perm or tuple(reversed(range(values.dim())))
            values, axis = values.permute(perm), None if axis is None else perm.index(axis)
        else:
            to = held[move.like].shape if move.like else shape
            axis = None if axis is None else _axis_after(values.shape, axis, to)
            values = values.reshape(to)
    return values, axis


def _axis_after(before: torch.Size, axis: int, after: torch.Size) -> int | None:
    """Return where an axis is after a reshape, None where it was cut up or merged."""
    ahead, size = math.prod(before[:axis]), before[axis]
    fitting = [i for i, n in enumerate(after) if n == size and math.prod(after[:i]) == ahead]
    return fitting[0] if fitting else None


def _float(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
