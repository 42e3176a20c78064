"""Quantized models in torch: operators as ONNX Runtime has them, codes and scales trained and written back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("torch")
import torch

from graphopt.bridge import ops_quant
from graphopt.errors import ModelError
from graphopt.runtime import Session

torch.set_num_threads(1)

Array = np.ndarray[Any, Any]


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Array], opset: int) -> Any:
    tensors = [onnx.numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset > 20 else 8)


def _ort(model: Any, feeds: dict[str, Array], optimize: bool = False) -> list[Array]:
    return list(Session(model, optimization="all" if optimize else "off", threads=1).run(feeds).values())


CASES = [
    # opset, type of codes, shape of x, shape of scale, axis, block
    (10, "uint8", (3, 5), (), None, 0),
    (10, "int8", (3, 5), (), None, 0),
    (13, "int8", (4, 3, 2), (3,), 1, 0),
    (13, "uint8", (4, 3, 2), (2,), -1, 0),
    (19, "uint8", (2, 6), (), None, 0),
    (21, "int4", (5, 8), (5,), 0, 0),
    (21, "uint4", (8, 6), (2, 6), 0, 4),
    (21, "int8", (3, 7), (3, 2), 1, 4),
    (21, "int16", (3, 4), (), None, 0),
    (21, "uint16", (3, 4), (4,), 1, 0),
    (23, "int4", (6, 4), (3, 4), 0, 2),
    (23, "uint8", (2, 3, 4), (3,), 1, 0),
]


@pytest.mark.parametrize(("opset", "kind", "shape", "scales", "axis", "block"), CASES)
def test_codes_and_values_are_those_of_ort(
    opset: int, kind: str, shape: tuple[int, ...], scales: tuple[int, ...], axis: int | None, block: int
) -> None:
    """Bit for bit: both divide in float32, round half to even and cut off."""
    rng = np.random.default_rng(opset)
    dtype = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    low, high = ops_quant.limits_of(kind)
    scale = np.asarray(2.0 ** rng.integers(-6, 1, scales), np.float32)  # x / scale is exact, so ties are ties
    zero = np.asarray(rng.integers(low, high + 1, scales)).astype(dtype)
    x = (rng.integers(-3 * high, 3 * high, shape) / 2 * 0.25).astype(np.float32)
    attrs: dict[str, Any] = {"axis": axis} if axis is not None else {}
    attrs |= {"block_size": block} if block else {}
    model = _model(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attrs),
         helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attrs)],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", 1, shape)],
        {"s": scale, "z": zero}, opset,
    )  # fmt: skip
    (values,) = _ort(model, {"x": x})
    s, z = torch.tensor(scale), torch.tensor(zero.astype(np.int32))
    codes = ops_quant.quantize_linear(torch.tensor(x), s, z, code=kind, **attrs)
    assert low <= codes.min() <= codes.max() <= high
    assert np.array_equal(ops_quant.dequantize_linear(codes, s, z, code=kind, **attrs), values)


def test_scales_get_the_gradient_of_lsq() -> None:
    """Inside round(v) - v, beyond the codes the code itself; x passes inside only."""
    x = torch.tensor([0.26, -0.4, 3.0, -5.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    zero = torch.tensor(0, dtype=torch.int8)
    codes = ops_quant.quantize_linear(x, scale, zero, code="int4")
    ops_quant.dequantize_linear(codes, scale, zero, code="int4").sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])
    wanted = (3 - 2.6) + (-4 - -4.0) + 7 - 8
    assert float(scale.grad) == pytest.approx(wanted / np.sqrt(4 * 7), abs=1e-5)


def test_eight_bit_floats_are_refused() -> None:
    x, scale = torch.ones(2), torch.ones(())
    with pytest.raises(ModelError, match="integer codes"):
        ops_quant.quantize_linear(x, scale, output_dtype=TensorProto.FLOAT8E4M3FN)
