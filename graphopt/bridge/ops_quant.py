"""QuantizeLinear and DequantizeLinear in torch, with gradients.

    q = clip(round(x / s), low - z, high - z) + z          QuantizeLinear, half to even
    y = (q - z) s                                          DequantizeLinear

Codes travel as whole numbers in float tensors, so that gradients pass.  Rounding is straight-through (Bengio et al.
2013): dq/dx = 1/s where q is not cut off, else 0.  Through both nodes the scale gets the gradient of LSQ (Esser et al.,
"Learned Step Size Quantization", ICLR 2020): (q - z) - x/s inside, q - z where it is cut off, times
1 / sqrt(elements that share the scale · largest code).

Source: ONNX operators QuantizeLinear and DequantizeLinear, opsets 10 to 25.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import torch
from onnx import TensorProto
from torch import Tensor

from graphopt.bridge.host import torch_kind
from graphopt.bridge.table import Table
from graphopt.codes import code_range
from graphopt.errors import ModelError
from graphopt.tensors import numpy_dtype

_NAMES = {torch.int8: "int8", torch.uint8: "uint8", torch.int16: "int16", torch.int32: "int32", torch.int64: "int32"}

_LIMITS = {
    name: code_range(getattr(ml_dtypes, name, None) or name)
    for name in ("int4", "uint4", "int8", "uint8", "int16", "uint16", "int32")
}
"""Codes that are trained: their type -> the smallest and the largest (plain tables: `torch.compile` reads them)."""

_CODES = {code: dtype.name for code in TensorProto.DataType.values() if (dtype := numpy_dtype(code)) is not None}


def limits_of(code: str) -> tuple[int, int]:
    """Return the smallest and largest code of a type by its name.

    Raises:
        ModelError: not an integer type of at least 4 bits.
    """
    if code not in _LIMITS:
        raise ModelError(
            f"training takes integer codes of 4 to 16 bits, not {code}",
            hint="quantize to int8 or int4: `graphopt quantize`",
        )
    return _LIMITS[code]


def quantize_linear(
    x: Tensor, scale: Tensor, zero: Any = None, *,
    axis: int = 1, block_size: int = 0, output_dtype: int = 0, code: str = "",
) -> Tensor:  # fmt: skip
    """Return codes, as whole numbers of float32.

    Args:
        x: any shape.
        scale: one number, one per index of `axis`, or one per block along `axis` in the rank of `x`.
        zero: zero points, as `scale`; None for 0.
        axis: of the scales.
        block_size: elements along `axis` that share a scale; 0 for none.
        output_dtype: `TensorProto.DataType` of the codes where there is no zero point.
        code: name of the codes' type, where torch's type of the zero point does not tell it (4 bits, uint16).
    """
    low, high = limits_of(code or _code_type(zero, output_dtype))
    spread_scale = spread(_scaled(scale.float(), x, high), x, axis, block_size)
    spread_zero = spread(_as_float(zero, x), x, axis, block_size)
    codes: Tensor = Quantize.apply(x.float(), spread_scale, spread_zero, low, high)
    return codes


def dequantize_linear(
    codes: Tensor, scale: Tensor, zero: Any = None, *,
    axis: int = 1, block_size: int = 0, output_dtype: int = 0, code: str = "",
) -> Tensor:  # fmt: skip
    """Return the values that codes stand for, in the type of the scale.

    Arguments are those of `quantize_linear`; `codes` may be integers.
    """
    _, high = limits_of(code or _code_type(codes if zero is None else zero, 0))
    spread_scale = spread(_scaled(scale.float(), codes, high), codes, axis, block_size)
    shifted = codes.float()
    if zero is not None:
        shifted = shifted - spread(_as_float(zero, codes), codes, axis, block_size)
    return (shifted * spread_scale).to(torch_kind(output_dtype) if output_dtype else scale.dtype)


def encode(
    master: Tensor, unit: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, mask: Tensor | None = None, *,
    axis: int = 1, block_size: int = 0,
) -> Tensor:  # fmt: skip
    """Return the codes of a constant that is trained as floats, as whole numbers of float32.

    Args:
        master: the floats, in units.
        unit: what they are multiplied by, in the shape of `scale`.
        scale: as `quantize_linear` takes it.
        zero: zero points, in the shape of `scale`.
        low: smallest codes, in the shape of `scale`.
        high: largest codes.
        mask: 0 where a float is to be zero, else 1; None for no such place.
        axis: of the scales.
        block_size: elements along `axis` that share a scale; 0 for none.
    """
    floats = master * spread(unit, master, axis, block_size)
    if mask is not None:
        floats = floats * mask
    spread_scale = spread(_scaled(scale.float(), master, 127), master, axis, block_size)
    zero, low, high = (spread(held, master, axis, block_size) for held in (zero, low, high))
    codes: Tensor = Quantize.apply(floats, spread_scale, zero, low, high)
    return codes


def learned_scale(logarithm: Tensor, stored: Tensor, *, half: bool = False, whole: bool = False) -> Tensor:
    """Return a scale while it is trained.

    Args:
        logarithm: what it is multiplied by, as a logarithm plus 1, so that a rate may be relative to it; trained.
        stored: the scale as it was.
        half: round it to float16, as it will be stored.
        whole: round it to a power of two (`stored` is one).
    """
    logarithm = logarithm - 1.0
    scale = stored * torch.exp(logarithm)
    if half:
        return scale + (scale.half().float() - scale).detach()
    if whole:
        steps = torch.round(logarithm.detach() / math.log(2.0)).clamp(-60, 60).int()
        power = ((steps + 127) << 23).view(torch.float32)  # by the bits of a float32: exact, which exp2 need not be
        return scale / scale.detach() * (stored * power)
    return scale


def tied_scale(of_input: Tensor, of_weight: Tensor, like: Tensor) -> Tensor:
    """Return the scale of a bias, that of the products it is added to, in the shape of `like`; without gradient."""
    return (of_input.detach().reshape(-1) * of_weight.detach().reshape(-1)).expand(like.numel()).reshape(like.shape)


class Quantize(torch.autograd.Function):
    """Rounds to codes; gradients pass where nothing is cut off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: Any, high: Any) -> Tensor:
        """Return codes; `scale` and `zero` broadcast to the shape of `x`."""
        steps = x / scale
        cut = steps.clamp(low - zero, high - zero)
        ctx.save_for_backward(steps, scale, cut == steps)
        return cut.round_().add_(zero)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the scale."""
        steps, scale, inside = ctx.saved_tensors
        passed = (gradient * inside).div_(scale)
        to_scale = -(passed * steps).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        return passed, to_scale, None, None, None


def spread(parameter: Tensor, like: Tensor, axis: int, block: int) -> Tensor:
    """Return scales or zero points in a shape that broadcasts to the shape of `like`."""
    if parameter.dim() == 0 or (parameter.numel() == 1 and not block):
        return parameter.reshape(())
    axis %= like.dim()
    if block:
        return parameter.repeat_interleave(block, dim=axis).narrow(axis, 0, like.shape[axis])
    return parameter.reshape([-1 if i == axis else 1 for i in range(like.dim())])


def _scaled(scale: Tensor, x: Tensor, high: int) -> Tensor:
    """Return a scale whose gradient is made smaller, by the elements that share it."""
    if not scale.requires_grad:
        return scale
    sharing = max(x.numel() // max(scale.numel(), 1), 1)
    factor = 1.0 / math.sqrt(float(sharing) * max(high, 1))
    fixed = scale.detach()
    return fixed + (scale - fixed) * factor


def _as_float(zero: Any, x: Tensor) -> Tensor:
    if zero is None:
        return torch.zeros((), device=x.device)
    if isinstance(zero, Tensor):
        return zero.float()
    return torch.tensor(zero, dtype=torch.float32, device=x.device)


def _code_type(held: Any, output_dtype: int) -> str:
    """Return the name of the type of codes, by what has it."""
    if output_dtype:
        return _CODES.get(output_dtype, f"type {output_dtype}")
    if held is None:
        return "uint8"
    return _NAMES.get(held.dtype, "int32") if isinstance(held, Tensor) else "int32"


TABLE: Table = {"QuantizeLinear": quantize_linear, "DequantizeLinear": dequantize_linear}
"""Of the standard domain and of ORT's own, which has them for types that the standard got later."""

_EACH_RUN = "its ranges are those of each run, which cannot be learned"
_INTEGERS = "it computes on stored integers, which have no gradient"
_FROM_FLOAT = "train the float model, then quantize it: `graphopt quantize` makes QuantizeLinear and DequantizeLinear"

_DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulIntegerToFloat")
_ON_INTEGERS = (
    "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearSigmoid",
    "QLinearLeakyRelu", "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearConcat", "QLinearSoftmax",
    "QLinearReduceMean", "QLinearWhere", "QGemm", "QAttention", "QEmbedLayerNormalization", "MatMulNBits",
    "MatMulBnb4", "GatherBlockQuantized", "QMoE",
)  # fmt: skip

REFUSED: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(_DYNAMIC, (_EACH_RUN, _FROM_FLOAT)),
    **dict.fromkeys(_ON_INTEGERS, (_INTEGERS, _FROM_FLOAT)),
}
"""Quantized operators that are not trained: why, and what helps."""
