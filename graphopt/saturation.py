"""Sums of two 8-bit products that leave int16: what processors without VNNI make of a quantized layer.

ONNX Runtime multiplies unsigned activation codes a by signed weight codes w.  With VNNI it adds the products up in 32
bits.  Without, on AVX2 and AVX-512, the instruction VPMADDUBSW adds two neighbours in 16 bits, and cuts off:

    clip(a[2i]·w[2i] + a[2i+1]·w[2i+1], -32768, 32767)          then 32 bits, over all i

Neighbours are neighbours along K, the axis that is summed over: the rows of a MatMul's weight; for a convolution the
kernel's places, and for each of them the input channels of the group (its input is laid out channels-last).  K is
filled up with zeros.  Weights of 7 bits cannot overflow: 2 · 255 · 64 = 32640.  Not concerned: unsigned weights, which
have another kernel, and depthwise convolutions, which widen to 32 bits before they multiply.

Sources: Intel's manual for the instruction; MLAS, the kernels QgemmU8X8KernelAvx2 and ConvSymKernelAvx2.  What this
module says of other machines was not run on one; on machines with VNNI the tests hold ORT to exact sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, scalar_of
from graphopt.codes import Affine, weight_code
from graphopt.edit import label
from graphopt.errors import SpecError
from graphopt.layer_inputs import GramRequest, request_of, row_chunks
from graphopt.ops import is_standard

Array: TypeAlias = np.ndarray[Any, Any]

SATURATES: Mapping[str, bool] = {"avx2": True, "avx512": True, "vnni": False}
"""Instruction sets -> whether sums of two products are cut off to 16 bits."""

LOW, HIGH = -32768, 32767

SAFE_BITS = 7
"""Bits of a weight's code with which no sum overflows."""

ROWS = 512
"""Rows of a layer's input that are looked at in each sample."""

_FILL = 4
"""K is filled up to a multiple of this."""


def saturates(isa: str) -> bool:
    """Tell whether an instruction set cuts off.

    Raises:
        SpecError: an unknown one.
    """
    if isa not in SATURATES:
        raise SpecError(f"unknown instruction set '{isa}'", hint=f"known: {', '.join(SATURATES)}")
    return SATURATES[isa]


@dataclass(frozen=True)
class Saturation:
    """What is cut off in a layer, per output channel.

    Attributes:
        outputs: share of its outputs, on the samples, with a sum that was cut off; float64 (channels,).
        error: the largest error of an output, in units of the product of both scales; int64 (channels,).
        possible: whether codes within the range seen could saturate, whatever their order along K; bool (channels,).
        rows: rows of the layer's input that were looked at.
    """

    outputs: Array
    error: Array
    possible: Array
    rows: int

    @property
    def channels(self) -> Array:
        """Which channels saturate on the samples; bool (channels,)."""
        return np.asarray(self.outputs > 0)

    @property
    def fraction(self) -> float:
        """Share of all outputs that a cut-off sum went into."""
        return float(self.outputs.mean()) if self.outputs.size else 0.0

    def __add__(self, other: Saturation) -> Saturation:
        rows = self.rows + other.rows
        outputs = (self.outputs * self.rows + other.outputs * other.rows) / max(rows, 1)
        return Saturation(outputs, np.maximum(self.error, other.error), self.possible | other.possible, rows)


def multiply(codes: Array, weights: Array) -> Array:
    """Return what processors without VNNI make of codes x weights.

    Args:
        codes: uint8 (rows, K).
        weights: int8 (K, channels).

    Returns:
        int32 (rows, channels).
    """
    a, w = _paired(codes.T), _paired(weights)  # (pairs, 2, ...)
    sums = np.einsum("pkr,pkn->prn", a, w)
    return np.asarray(np.clip(sums, LOW, HIGH).sum(axis=0), np.int32)


def possible(weights: Array, low: int = 0, high: int = 255, *, any_order: bool = True) -> Array:
    """Return which output channels could saturate with activation codes from `low` to `high`; bool (channels,).

    Args:
        weights: int8 (K, channels).
        low: smallest activation code.
        high: largest one.
        any_order: whatever weights are neighbours (the two largest might be); else as they stand along K.
    """
    w = weights.astype(np.int64)
    largest, smallest = np.maximum(w * high, w * low), np.minimum(w * high, w * low)
    if any_order:
        top = np.sort(np.maximum(largest, 0), axis=0)[-2:].sum(axis=0)
        bottom = np.sort(np.minimum(smallest, 0), axis=0)[:2].sum(axis=0)
        return np.asarray((top > HIGH) | (bottom < LOW))
    top, bottom = _paired(largest).sum(axis=1), _paired(smallest).sum(axis=1)
    return np.asarray((top > HIGH).any(axis=0) | (bottom < LOW).any(axis=0))


def saturating(weights: Array, codes: Array) -> Saturation:
    """Return what is cut off when these activation codes meet these weights.

    Args:
        weights: int8 (K, channels).
        codes: uint8 (rows, K).
    """
    a, w = _paired(codes.T).astype(np.int32), _paired(weights).astype(np.int32)
    rows, channels = codes.shape[0], weights.shape[1]
    outputs, error = np.zeros(channels), np.zeros(channels, np.int64)
    if rows:
        low, high = a.min(axis=2)[..., None], a.max(axis=2)[..., None]
        top = np.maximum(w * low, w * high).sum(axis=1)
        bottom = np.minimum(w * low, w * high).sum(axis=1)
        suspect = (top > HIGH) | (bottom < LOW)  # (pairs, channels): only these need to be added up
        for n in np.flatnonzero(suspect.any(axis=0)):
            at = np.flatnonzero(suspect[:, n])
            sums = a[at, 0] * w[at, 0, n][:, None] + a[at, 1] * w[at, 1, n][:, None]
            lost = sums - np.clip(sums, LOW, HIGH)
            outputs[n] = float((lost != 0).any(axis=0).mean())
            error[n] = int(np.abs(lost.sum(axis=0)).max())
    seen = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    return Saturation(outputs, error, possible(weights, *seen), rows)


def reduced(values: Array, code: Affine, channels: Array) -> Affine:
    """Return a weight's code with 7 bits for the channels that saturate, and as it was for the others.

    Args:
        values: the weights.
        code: int8, symmetric, one scale or one per channel; with one scale any channel decides for all.
        channels: bool, per output channel.

    Raises:
        SpecError: a code by blocks, or not of int8.
    """
    if code.block or code.dtype != np.int8 or bool(np.any(code.zero_point)):
        raise SpecError("only int8 weights with zero point 0 and no blocks saturate so")
    if not bool(np.any(channels)):
        return code
    safe = weight_code(values, code.axis, bits=SAFE_BITS)
    if code.axis is None:
        return safe
    scale = np.where(channels, np.maximum(safe.scale, code.scale), code.scale).astype(np.float32)
    return replace(code, scale=scale)


def _paired(values: Array) -> Array:
    """Return values (K, ...) as neighbours: (pairs, 2, ...), filled up with zeros; int64."""
    fill = -values.shape[0] % _FILL
    padded = np.pad(values.astype(np.int64), [(0, fill), *[(0, 0)] * (values.ndim - 1)])
    return padded.reshape(-1, 2, *values.shape[1:])


# --- whole graphs


@dataclass(frozen=True)
class Layer:
    """A layer of a graph with Q and DQ nodes that VPMADDUBSW would compute.

    Attributes:
        name: as reports call it.
        codes: tensor that holds its activation codes.
        zero_point: of the activation.
        signed: whether those codes are int8; ORT adds 128 to them, and so does `rows`.
        weights: int8 (groups, K, channels of a group), K as the kernel has it.
        request: how its input is laid out.
    """

    name: str
    codes: str
    zero_point: int
    signed: bool
    weights: Array
    request: GramRequest

    def rows(self, codes: Array, limit: int, rng: np.random.Generator) -> Iterator[Array]:
        """Yield rows of activation codes as the kernel reads them: uint8 (rows, groups, K), `limit` in all."""
        shift = 128 if self.signed else 0
        centred = codes.astype(np.float32) - self.zero_point  # so that padding is zero
        places = math.prod(self.request.window.kernel) if self.request.window else 1
        for chunk in row_chunks(self.request, centred, limit, rng):
            count, groups, width = chunk.shape
            moved = chunk.reshape(count, groups, width // places, places).swapaxes(2, 3)
            yield (moved.reshape(count, groups, width) + self.zero_point + shift).astype(np.uint8)


def layers(graph: gs.Graph) -> list[Layer]:
    """Return the layers of a graph that saturate on some machines."""
    return [layer for node in graph.nodes if (layer := _layer(node)) is not None]


def _layer(node: gs.Node) -> Layer | None:
    if not is_standard(node, "Conv", "MatMul", "Gemm"):
        return None
    activation, weight = (_dequantizer(t) for t in node.inputs[:2])
    codes = None if weight is None else array_of(weight.inputs[0])
    if activation is None or codes is None or codes.dtype != np.int8:
        return None
    request = request_of(node, codes.shape)
    zero = scalar_of(activation.inputs[2]) if len(activation.inputs) > 2 else 0
    depthwise = is_standard(node, "Conv") and codes.shape[1] == 1
    if request is None or zero is None or depthwise:
        return None
    signed = len(activation.inputs) > 2 and activation.inputs[2].dtype == np.int8
    matrix = kernel_weights(node, codes)
    return Layer(label(node), activation.inputs[0].name, int(zero), signed, matrix, request)


def _dequantizer(tensor: gs.Tensor) -> gs.Node | None:
    node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    return node if node is not None and is_standard(node, "DequantizeLinear") else None


def kernel_weights(node: gs.Node, codes: Array) -> Array:
    """Return a layer's weights as its kernel has them: (groups, K, channels of a group)."""
    if is_standard(node, "Conv"):
        groups = int(node.attrs.get("group", 1))
        moved = np.moveaxis(codes, 1, -1)  # (channels, kernel..., input channels)
        return np.asarray(moved.reshape(groups, codes.shape[0] // groups, -1).swapaxes(1, 2))
    return (codes.T if is_standard(node, "Gemm") and node.attrs.get("transB", 0) else codes)[None]


def check(
    concerned: Sequence[Layer], values: Iterable[Mapping[str, Any]], *, rows: int = ROWS, seed: int = 0
) -> dict[str, Saturation]:
    """Return what processors without VNNI cut off in a quantized graph, by layer, on samples.

    Args:
        concerned: the graph's `layers`.
        values: for each sample, what their tensors `codes` hold, by name.
        rows: rows of each layer's input that are looked at in each sample, drawn at random.
        seed: for the draw.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Saturation] = {}
    for held in values if concerned else ():
        for layer in concerned:
            for chunk in layer.rows(np.asarray(held[layer.codes]), rows, rng):
                parts = [saturating(w, chunk[:, g]) for g, w in enumerate(layer.weights)]
                more = _joined(parts)
                found[layer.name] = found[layer.name] + more if layer.name in found else more
    return found


def _joined(parts: Sequence[Saturation]) -> Saturation:
    """Return the channels of all groups behind each other."""
    outputs, error, could = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("outputs", "error", "possible")
    )
    return Saturation(outputs, error, could, parts[0].rows)
