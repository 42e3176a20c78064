"""One output of a lossy result beside the reference's: how it is judged, and the numbers.

An output is judged by what it looks like (`output_kind`, read off the reference's graph and first outputs):

    classes     a softmax, or rows of scores that a Gemm, MatMul or Conv made: whether the largest stays the largest,
                what it costs where it does not, and SQNR
    mask        a sigmoid: overlap (intersection over union) of what lies above 0.5, and SQNR
    embedding   any other rows of numbers: mean cosine of a row with the reference's, and SQNR
    values      any other float output: SQNR
    exact       integers, booleans, strings: fraction of equal elements

SQNR is 10 log10(sum a^2 / sum (a - b)^2) over all samples; 20 dB is noise of a tenth of the signal, which between
vectors is a cosine of 0.995 (1 - 1 / (2 * 100)).

What another class costs is the reference's own probability of its class, less that of the candidate's: how much the
accuracy is expected to fall if the reference's probabilities are right.  Two nearly equal classes cost nearly nothing,
a sure answer turned over costs up to 1; plain agreement counts both alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.outputs import probability_outputs
from graphopt.compare import Array, looks_like_logits, top1
from graphopt.model import Model
from graphopt.tensors import is_float

Kind: TypeAlias = Literal["classes", "mask", "embedding", "values", "exact"]

LARGEST_SCORE = 150.0
"""Score of equal outputs, dB: float32 itself rounds at about this."""


@dataclass(frozen=True)
class Limits:
    """What one output must keep; None asks for nothing.  SQNR in dB, the others between 0 and 1; `loss` at most."""

    sqnr: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    loss: float | None = None


@dataclass
class OutputQuality:
    """One output (one leaf of it, for sequences) of a candidate beside the reference's, over all samples.

    `rows` counts what `cosine` is the mean of, `decisions` what `agreement` is the part of.
    """

    name: str
    kind: Kind
    limits: Limits
    rows: int = 0
    decisions: int = 0
    agreeing: int = 0
    nonfinite: int = 0
    different: str = ""
    _signal: float = 0.0
    _noise: float = 0.0
    _cosines: float = 0.0
    _losses: float = 0.0

    @property
    def sqnr(self) -> float | None:
        """Signal to noise, dB; `LARGEST_SCORE` without noise; None for exact types and where there is no signal."""
        if self.kind == "exact" or not (self._signal > 0 or self._noise > 0):
            return None
        if self._signal <= 0 or not math.isfinite(self._noise):
            return -LARGEST_SCORE
        if self._noise <= 0:
            return LARGEST_SCORE
        return float(np.clip(10 * math.log10(self._signal / self._noise), -LARGEST_SCORE, LARGEST_SCORE))

    @property
    def cosine(self) -> float | None:
        """Mean cosine of a row with the reference's; None where the output has no rows."""
        return self._cosines / self.rows if self.rows else None

    @property
    def agreement(self) -> float | None:
        """Part of the decisions that stay; None where the output decides nothing."""
        return self.agreeing / self.decisions if self.decisions else None

    @property
    def loss(self) -> float | None:
        """Expected fall of the accuracy, mean over the decisions; None where there are no classes."""
        return self._losses / self.decisions if self.decisions and self.kind == "classes" else None

    @property
    def score(self) -> float:
        """SQNR in dB; of exact types the same of the part of elements that differ."""
        if self.different or self.nonfinite:
            return -LARGEST_SCORE
        if self.kind != "exact":
            return LARGEST_SCORE if self.sqnr is None else self.sqnr
        lost = self.decisions - self.agreeing
        return 10 * math.log10(self.decisions / lost) if lost else LARGEST_SCORE

    @property
    def failures(self) -> list[str]:
        """In words, what is missed."""
        at = f"output '{self.name}': "
        if self.different:
            return [at + self.different]
        found = [f"{self.nonfinite} values are NaN or infinite on one side only"] if self.nonfinite else []
        for what, value, least, unit in (
            ("SQNR", self.sqnr, self.limits.sqnr, " dB"),
            ("mean cosine", self.cosine, self.limits.cosine, ""),
            (_AGREEMENT[self.kind], self.agreement, self.limits.agreement, ""),
        ):
            if value is not None and least is not None and value < least:
                found.append(f"{what} {value:.5g}{unit}, at least {least:g} asked")
        if self.loss is not None and self.limits.loss is not None and self.loss > self.limits.loss:
            found.append(f"expected loss of accuracy {self.loss:.2g}, at most {self.limits.loss:g} accepted")
        return [at + what for what in found]

    def add(self, reference: Array, candidate: Array) -> None:
        """Take in one pair of arrays."""
        if reference.shape != candidate.shape or reference.dtype != candidate.dtype:
            self.different = (
                f"{candidate.dtype}{list(candidate.shape)} instead of {reference.dtype}{list(reference.shape)}"
            )
        elif self.kind == "exact":
            self.decisions += reference.size
            self.agreeing += int(np.count_nonzero(np.asarray(reference == candidate)))
        elif reference.size:
            self._add_floats(_wide(reference), _wide(candidate))

    def _add_floats(self, a: Array, b: Array) -> None:
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            self.nonfinite += int(np.count_nonzero(~finite & ~same))
            a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        gap = a - b
        self._signal += _power(a)
        self._noise += _power(gap)
        if self.kind in _HAS_ROWS:
            self._add_rows(a, b)
        if self.kind == "classes":
            agree = top1(a, b)
            self.decisions += agree.size
            self.agreeing += int(np.count_nonzero(agree))
            self._losses += _loss(a, b, ~agree)
        elif self.kind == "mask":
            self.decisions += int(np.count_nonzero((a > 0.5) | (b > 0.5)))
            self.agreeing += int(np.count_nonzero((a > 0.5) & (b > 0.5)))

    def _add_rows(self, a: Array, b: Array) -> None:
        x, y = _rows(a), _rows(b)
        norms = np.sqrt(np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", y, y))
        used = norms > 0
        self.rows += int(np.count_nonzero(used))
        self._cosines += float(np.sum(np.einsum("ij,ij->i", x, y)[used] / norms[used]))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {
            "output": self.name, "kind": self.kind, "sqnr": self.sqnr, "cosine": self.cosine,
            "agreement": self.agreement, "loss": self.loss, "rows": self.rows, "decisions": self.decisions,
            "limits": asdict(self.limits), "failures": self.failures,
        }  # fmt: skip


_HAS_ROWS = frozenset({"classes", "embedding"})
_AGREEMENT: Mapping[Kind, str] = {
    "classes": "the largest score stays the largest in a part of", "mask": "overlap above 0.5 of",
    "exact": "part of equal elements", "embedding": "agreement", "values": "agreement",
}  # fmt: skip


def output_kind(model: Model, name: str, values: Array) -> Kind:
    """Return how an output is judged (see the module's text).

    Args:
        model: the reference.
        name: of the output, or of a leaf of it.
        values: what it is for one sample.
    """
    if not is_float(values.dtype) and values.dtype.kind != "c":
        return "exact"
    maker = probability_outputs(model).get(name, "")
    if maker == "sigmoid":
        return "mask"
    if not looks_like_logits(values):
        return "values"
    tensors = {tensor.name: tensor for tensor in model.graph.outputs}
    if maker == "softmax" or (name in tensors and _made_by_weights(tensors[name])):
        return "classes"
    return "embedding"


_MAKES_SCORES = frozenset({"Gemm", "MatMul", "Conv", "FusedGemm", "FusedMatMul", "MatMulNBits"})
_PASSES_SCORES = frozenset({
    "Add", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "GlobalAveragePool",
    "AveragePool", "ReduceMean", "LogSoftmax", "Relu", "DequantizeLinear", "QuantizeLinear",
})  # fmt: skip


def _made_by_weights(tensor: gs.Tensor) -> bool:
    """Tell whether a layer with constant weights made the rows, give or take a bias, a pool and data movement."""
    for _ in range(16):
        if isinstance(tensor, gs.Constant) or not tensor.inputs:
            return False
        node = tensor.inputs[0]
        if node.op in _MAKES_SCORES:
            return True
        varying = [t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
        if node.op not in _PASSES_SCORES or (node.op == "Add" and len(varying) != 1):
            return False
        tensor = varying[0] if node.op == "Add" else node.inputs[0]
    return False


def _wide(values: Array) -> Array:
    """Return floats in double precision: sums of squares of float32 lose noise below -70 dB."""
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def _power(values: Array) -> float:
    """Return the sum of squares; `einsum` takes one thread, which BLAS does not."""
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat.conj()).real)


def _rows(values: Array) -> Array:
    """Return an output as rows of scores (N, classes), trailing axes of 1 aside."""
    return values.reshape(-1, next((n for n in reversed(values.shape) if n > 1), 1))


def _loss(reference: Array, candidate: Array, changed: Array) -> float:
    """Return the sum, over the rows that changed, of p(reference's class) - p(candidate's), p being the reference's."""
    x, chosen = _rows(reference)[changed], _rows(candidate)[changed].argmax(axis=1)
    if not x.size:
        return 0.0
    if not ((x >= 0).all() and np.allclose(x.sum(axis=1), 1.0, atol=1e-2)):  # scores, not probabilities
        x = np.exp(x - x.max(axis=1, keepdims=True))
        x /= x.sum(axis=1, keepdims=True)
    return float(np.sum(x.max(axis=1) - np.take_along_axis(x, chosen[:, None], axis=1)[:, 0]))
