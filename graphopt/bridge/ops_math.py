"""Elementwise arithmetic, comparison and logic, and products of matrices, as functions of torch.

Host values (shape arithmetic) stay on the host where all operands are such.  Integers divide towards zero, as in C.
Gradients are torch's: that of `Max` and `Min` is shared by equal operands, steps (`Floor`, `Round`, `Sign`) have none.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch

from graphopt.bridge.host import as_tensor, is_host
from graphopt.bridge.operands import aligned, hosted, number
from graphopt.bridge.table import Op, Table

NO_BOUND = 3.4e38
"""Bounds of `Clip` beyond it are the schema's default, the end of float32."""


def add(a: Any, b: Any) -> Any:
    return hosted(operator.add, torch.add, a, b)


def sub(a: Any, b: Any) -> Any:
    return hosted(operator.sub, torch.sub, a, b)


def mul(a: Any, b: Any) -> Any:
    return hosted(operator.mul, torch.mul, a, b)


def div(a: Any, b: Any) -> Any:
    return hosted(_divided, _quotient, a, b)


def _divided(a: Any, b: Any) -> Any:
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    return -(-a // b) if (a < 0) != (b < 0) else a // b


def _quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_floating_point() or a.is_complex():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def mod(a: Any, b: Any, fmod: int = 0) -> Any:
    if fmod:
        return hosted(lambda x, y: x - y * math.trunc(x / y), torch.fmod, a, b)
    return hosted(operator.mod, torch.remainder, a, b)


def power(a: Any, b: Any) -> Any:
    return hosted(_raised, _power, a, b)


def _raised(a: Any, b: Any) -> Any:
    return int(a**b) if isinstance(a, int) else a**b


def _power(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.pow(a, b).to(a.dtype)


def maximum(*values: Any) -> Any:
    return functools.reduce(lambda a, b: hosted(max, torch.maximum, a, b), values)


def minimum(*values: Any) -> Any:
    return functools.reduce(lambda a, b: hosted(min, torch.minimum, a, b), values)


def summed(*values: Any) -> Any:
    return functools.reduce(add, values)


def mean(*values: Any) -> Any:
    return div(summed(*values), len(values))


def neg(x: Any) -> Any:
    return hosted(operator.neg, torch.neg, x)


def absolute(x: Any) -> Any:
    return hosted(abs, torch.abs, x)


def floor(x: Any) -> Any:
    return hosted(lambda v: float(math.floor(v)), torch.floor, x)


def ceil(x: Any) -> Any:
    return hosted(lambda v: float(math.ceil(v)), torch.ceil, x)


def rounded(x: Any) -> Any:
    return hosted(lambda v: float(round(v)), torch.round, x)


def sqrt(x: Any) -> Any:
    return hosted(math.sqrt, torch.sqrt, x)


def reciprocal(x: Any) -> Any:
    return hosted(lambda v: 1 / v, torch.reciprocal, x)


def clip(x: Any, min: Any = None, max: Any = None) -> Any:
    """Return x within [min, max]: inputs since opset 11, attributes before.

    Where the bounds cross, the upper one wins, as in ORT.  A bound at the end of float32 is none.
    """
    low, high = (None if isinstance(v, float) and abs(v) > NO_BOUND else v for v in (min, max))
    if not is_host(x):
        bounds = [None if v is None else aligned(x, v)[1] for v in (low, high)]
        return x if low is None and high is None else torch.clamp(x, *bounds)
    x = x if low is None else maximum(x, low)
    return x if high is None else minimum(x, high)


def equal(a: Any, b: Any) -> Any:
    return hosted(operator.eq, torch.eq, a, b)


def greater(a: Any, b: Any) -> Any:
    return hosted(operator.gt, torch.gt, a, b)


def greater_or_equal(a: Any, b: Any) -> Any:
    return hosted(operator.ge, torch.ge, a, b)


def less(a: Any, b: Any) -> Any:
    return hosted(operator.lt, torch.lt, a, b)


def less_or_equal(a: Any, b: Any) -> Any:
    return hosted(operator.le, torch.le, a, b)


def logical_and(a: Any, b: Any) -> Any:
    return hosted(lambda x, y: bool(x and y), torch.logical_and, a, b)


def logical_or(a: Any, b: Any) -> Any:
    return hosted(lambda x, y: bool(x or y), torch.logical_or, a, b)


def logical_xor(a: Any, b: Any) -> Any:
    return hosted(operator.ne, torch.logical_xor, a, b)


def logical_not(x: Any) -> Any:
    return hosted(operator.not_, torch.logical_not, x)


def where(condition: Any, a: Any, b: Any) -> Any:
    if all(map(is_host, (condition, a, b))):
        return hosted(lambda c, x, y: x if c else y, torch.where, condition, a, b)
    a, b = aligned(a, b)
    return torch.where(aligned(a, condition)[1].bool(), a, b)


def is_inf(x: torch.Tensor, detect_negative: int = 1, detect_positive: int = 1) -> torch.Tensor:
    found = torch.isinf(x)
    if not detect_negative:
        found = found & (x > 0)
    return found if detect_positive else found & (x < 0)


def bit_shift(a: torch.Tensor, b: torch.Tensor, direction: str) -> torch.Tensor:
    return torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)


def einsum(*values: torch.Tensor, equation: str) -> torch.Tensor:
    return torch.einsum(equation, *values)


def gemm(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None,
    alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
) -> torch.Tensor:  # fmt: skip
    out = (a.t() if transA else a) @ (b.t() if transB else b)
    out = out if alpha == 1 else (out * alpha).to(a.dtype)
    if c is None:
        return out
    return out + (c if beta == 1 else (c * beta).to(a.dtype))


def cumsum(x: Any, axis: Any, exclusive: int = 0, reverse: int = 0) -> torch.Tensor:
    return _scanned(torch.cumsum, x, axis, exclusive, reverse, 0)


def cumprod(x: Any, axis: Any, exclusive: int = 0, reverse: int = 0) -> torch.Tensor:
    return _scanned(torch.cumprod, x, axis, exclusive, reverse, 1)


def _scanned(scan: Any, x: Any, axis: Any, exclusive: int, reverse: int, start: int) -> torch.Tensor:
    x, axis = as_tensor(x), number(axis)
    x = x.flip(axis) if reverse else x
    if exclusive:
        first = torch.full_like(x.narrow(axis, 0, min(1, x.shape[axis])), start)
        x = torch.cat([first, x.narrow(axis, 0, max(x.shape[axis] - 1, 0))], axis)
    out = scan(x, axis, dtype=x.dtype)
    return out.flip(axis) if reverse else out


TABLE: Table = {
    **{
        name: Op(1, function, host=True)
        for name, function in {
            "Add": add, "Sub": sub, "Mul": mul, "Div": div, "Mod": mod, "Pow": power, "Max": maximum, "Min": minimum,
            "Sum": summed, "Mean": mean, "Neg": neg, "Abs": absolute, "Floor": floor, "Ceil": ceil, "Round": rounded,
            "Sqrt": sqrt, "Reciprocal": reciprocal, "Equal": equal, "Greater": greater,
            "GreaterOrEqual": greater_or_equal, "Less": less, "LessOrEqual": less_or_equal, "And": logical_and,
            "Or": logical_or, "Xor": logical_xor, "Not": logical_not, "Where": where,
        }.items()
    },
    "Exp": torch.exp, "Log": torch.log, "Erf": torch.erf, "Sign": torch.sign,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan,
    "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "IsNaN": torch.isnan, "IsInf": is_inf, "Clip": Op(1, clip, host=True),
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "BitwiseNot": torch.bitwise_not, "BitShift": bit_shift,
    "MatMul": torch.matmul, "Gemm": gemm, "Einsum": einsum, "Det": torch.linalg.det,
    "CumSum": Op(1, cumsum, host=True), "CumProd": Op(1, cumprod, host=True),
}  # fmt: skip
