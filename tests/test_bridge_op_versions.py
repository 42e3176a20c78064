"""Operators in the forms of each opset against ORT, and operators of ORT's own domain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from graphopt.bridge import ops_contrib  # noqa: E402  (torch may be missing)
from graphopt.bridge.ops import OPS  # noqa: E402

from .test_bridge_ops import TOLERANCE, Array, Case  # noqa: E402


def f(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def i(*values: int, shape: tuple[int, ...] | None = None, dtype: Any = np.int64) -> Array:
    return np.array(values, dtype).reshape(len(values) if shape is None else shape)


def one(value: float, dtype: Any = np.float32) -> Array:
    return np.array(value, dtype)


X = f(2, 3, 4, 5)
P = np.abs(X) + 0.1
PAIRS = {"kernel_shape": [2, 2], "strides": [2, 2]}
MASK = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
BOXES = np.array([[0, 0, 5, 6], [1.5, 2, 7, 9]], np.float32)

FORMS = [
    *(Case(op, [X], opset, {"axis": axis}) for op in ("Softmax", "LogSoftmax", "Hardmax")
      for opset, axis in ((9, 1), (11, 2), (11, -1), (11, 0), (13, 1), (13, -1))),
    Case("Clip", [X], 10, {"min": -0.5, "max": 0.5}), Case("Clip", [X], 10, {"max": 0.5}), Case("Clip", [X], 10),
    Case("Clip", [X, one(-0.3)], 12), Case("Clip", [X, None, one(0.3)], 13), Case("Clip", [X, one(0.5), one(-0.5)], 13),
    Case("Clip", [i(1, 5, 9), one(2, np.int64), one(6, np.int64)], 13),
    Case("Squeeze", [f(2, 1, 3, 1)], 11, {"axes": [1, -1]}), Case("Squeeze", [f(2, 1, 3, 1), i(3)], 13),
    Case("Squeeze", [f(2, 1, 3, 1)], 13), Case("Unsqueeze", [X], 11, {"axes": [0, 3]}),
    Case("Unsqueeze", [X, i(-1, 0)], 13), Case("Split", [X], 11, {"axis": 2, "split": [1, 3]}, 2),
    Case("Split", [X], 11, {"axis": 2}, 2), Case("Split", [X, i(2, 3)], 13, {"axis": 3}, 2),
    Case("Split", [X], 18, {"axis": 3, "num_outputs": 3}, 3), Case("Split", [X, i(5)], 13, {"axis": 3}),
    Case("Slice", [X], 9, {"starts": [1, -3], "ends": [9, -1], "axes": [2, 3]}),
    Case("Slice", [X], 9, {"starts": [0, 1], "ends": [1, 1000]}),
    Case("Slice", [X, i(4, -1), i(-(2**62), 0), i(3, 2), i(-2, -1)], 10),
    Case("Slice", [X, i(1), i(1), i(2)], 13), Case("Slice", [X, i(3), i(3), i(2), i(-1)], 13),
    Case("TopK", [X], 9, {"k": 2, "axis": 3}, 2), Case("TopK", [X, i(3)], 10, {"axis": 2}, 2),
    Case("TopK", [X, i(3)], 11, {"axis": 1, "largest": 0}, 2),
    Case("TopK", [i(3, 1, 3, 2, 3, dtype=np.int32), i(3)], 11, {}, 2),
    Case("ArgMax", [i(1, 3, 3, 2, shape=(2, 2), dtype=np.int32)], 13, {"axis": 1, "keepdims": 0}),
    Case("ArgMax", [i(7, 7, 7, shape=(1, 3)).astype(np.float32)], 13, {"axis": 1, "select_last_index": 1}),
    Case("ArgMin", [X], 11, {"axis": -2}), Case("Mod", [i(7, -7, 7, -7), i(3, 3, -3, -3)], 13),
    Case("Mod", [f(5), f(5, seed=1)], 13, {"fmod": 1}), Case("Mod", [i(7, -7), i(3, 3)], 13, {"fmod": 1}),
    Case("Div", [i(7, -7, 7, -7), i(2, 2, -2, -2)], 14), Case("Pow", [P, one(0.5)], 12),
    Case("Pow", [i(2, 3, dtype=np.int32), one(2.0)], 13), Case("Pow", [X, one(3, np.int64)], 15),
    Case("PRelu", [X, f(3, 1, 1)], 9), Case("PRelu", [X, f(1)], 16), Case("Sum", [X, f(5), f(4, 1)], 9),
    Case("Max", [X, f(5), f(4, 1)], 9), Case("Min", [X, f(5)], 13), Case("Mean", [X, f(5), f(4, 1)], 13),
    Case("Round", [np.array([0.5, 1.5, -0.5, -1.5, 2.4], np.float32)], 11), Case("Sign", [i(-3, 0, 4)], 13),
    Case("IsInf", [np.array([np.inf, -np.inf, np.nan, 1], np.float32)], 10, {"detect_negative": 0}),
    Case("Where", [np.array([True, False, True]), f(2, 3), f(3)], 9), Case("Xor", [X > 0, X > 1], 9),
    Case("Gemm", [f(4, 2), f(4, 3)], 11, {"transA": 1, "alpha": 0.5}),
    Case("Gemm", [f(2, 4), f(3, 4), f(3)], 9, {"transB": 1, "beta": 0.5}), Case("MatMul", [X, f(5)], 9),
    Case("MatMul", [f(4, 1, 2, 3), f(5, 3, 2)], 13),
    Case("Einsum", [X, f(5, 2)], 12, {"equation": "...ij, jk -> ...ki"}),
    Case("CumSum", [X, one(2, np.int64)], 11, {"exclusive": 1, "reverse": 1}),
    Case("CumSum", [i(1, 2, 3, dtype=np.int32), one(0, np.int64)], 14, {"reverse": 1}),
    Case("Gather", [X, i(-1, 0, shape=(2, 1))], 9, {"axis": 2}),
    Case("Gather", [X, one(-2, np.int64)], 13, {"axis": 1}),
    Case("GatherElements", [X, i(-1, 0, 2, 1, shape=(1, 1, 4, 1))], 11, {"axis": 3}),
    Case("GatherND", [X, i(0, 1, 1, -1, shape=(2, 2))], 12),
    Case("GatherND", [X, i(0, 1, shape=(2, 1))], 12, {"batch_dims": 1}),
    Case("Scatter", [f(3, 3), i(1, 0, 2, shape=(1, 3)), f(1, 3)], 9),
    Case("ScatterElements", [f(3, 3), i(1, -1, 2, shape=(1, 3)), f(1, 3)], 11, {"axis": 1}),
    *(Case("ScatterElements", [f(3, 3), i(1, 1, 2, shape=(1, 3)), f(1, 3)], 18, {"axis": 1, "reduction": r})
      for r in ("add", "mul", "max", "min")),
    *(Case("ScatterND", [X, i(0, 1, 0, 1, shape=(2, 2)), f(2, 4, 5)], 18, {"reduction": r})
      for r in ("add", "mul", "max", "min")),
    Case("ScatterND", [X, i(0, 1, 1, -1, shape=(2, 2)), f(2, 4, 5)], 11),
    Case("OneHot", [i(0, -1, 7, 2, shape=(2, 2)), one(4, np.int64), np.array([-1, 3], np.float32)], 11, {"axis": 0}),
    Case("OneHot", [i(0, 2), i(3), i(0, 1)], 9), Case("NonZero", [(X > 0.5).astype(np.float32)], 9),
    Case("Compress", [X, np.array([True, False, True])], 9, {"axis": 1}), Case("Compress", [X, X.ravel() > 1], 11),
    Case("ReverseSequence", [f(4, 3, 2), i(1, 4, 2)], 10),
    Case("Unique", [i(3, 1, 3, 2).astype(np.float32)], 11, {}, 4),
    Case("Unique", [i(3, 1, 3, 2).astype(np.float32)], 11, {"sorted": 0}, 4),
    Case("Unique", [i(1, 2, 1, 2, 0, 1, shape=(3, 2))], 11, {"axis": 0}, 4),
    Case("Expand", [f(3, 1), i(2, 1, 4)], 9), Case("Tile", [f(2, 3), i(2, 1)], 13), Case("Tile", [i(4, 5), i(3)], 13),
    Case("Trilu", [X, one(-1, np.int64)], 14, {"upper": 0}), Case("EyeLike", [f(2, 4)], 9, {"k": 1, "dtype": 7}),
    Case("DepthToSpace", [f(1, 8, 2, 3)], 11, {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [f(1, 2, 4, 6)], 13, {"blocksize": 2}),
    Case("Reshape", [X, i(0, -1, 5)], 9), Case("Reshape", [f(0, 3), i(3, 0)], 14, {"allowzero": 1}),
    Case("Flatten", [X], 9, {"axis": 0}), Case("Flatten", [X], 11, {"axis": -1}), Case("Transpose", [X], 9),
    Case("Shape", [X], 15, {"start": -2}), Case("Shape", [X], 15, {"start": 1, "end": -1}), Case("Size", [X], 13),
    Case("Concat", [X, f(2, 3, 4, 1)], 11, {"axis": -1}), Case("Cast", [X * 3], 13, {"to": 7}),
    Case("Cast", [X], 9, {"to": 9}),
    Case("Range", [one(1.5), one(4), one(0.7)], 11),
    Case("Range", [one(5, np.int64), one(0, np.int64), one(-2, np.int64)], 11),
    Case("LRN", [f(2, 7, 3, 1)], 9, {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 2.0}),
    Case("LRN", [f(2, 7, 3, 2)], 13, {"size": 3}),
    Case("LpNormalization", [X], 9, {"axis": 1, "p": 1}), Case("LpNormalization", [X], 9),
    Case("MeanVarianceNormalization", [X], 9), Case("MeanVarianceNormalization", [X], 13, {"axes": [0, 2]}),
    Case("InstanceNormalization", [f(2, 3, 6), f(3), f(3)], 9, {"epsilon": 1e-3}),
    Case("LayerNormalization", [X, f(5), f(5)], 17), Case("LayerNormalization", [X, f(4, 5)], 17, {"axis": 2}, 3),
    Case("GroupNormalization", [f(2, 6, 4), f(3), f(3)], 18, {"num_groups": 3}),
    Case("GroupNormalization", [f(2, 6, 4), f(6), f(6)], 21, {"num_groups": 3}),
    Case("RMSNormalization", [X, f(4, 5)], 23, {"axis": 2}),
    Case("GlobalLpPool", [X], 9, {"p": 3}), Case("GlobalMaxPool", [f(2, 3, 4)], 9),
    Case("GlobalAveragePool", [f(2, 3, 2, 2, 2)], 9),
    Case("MaxUnpool", [f(1, 1, 2, 2), i(5, 7, 13, 15, shape=(1, 1, 2, 2))], 11, PAIRS),
    *(Case("GridSample", [f(2, 2, 4, 5), f(2, 3, 3, 2)], opset, {"mode": mode, "padding_mode": p, "align_corners": a})
      for opset, mode in ((16, "bilinear"), (16, "nearest"), (20, "cubic"))
      for p, a in (("zeros", 0), ("border", 1), ("reflection", 0))),
    Case("RoiAlign", [f(2, 3, 8, 8), BOXES, i(1, 0)], 10, {"output_height": 2, "output_width": 3, "sampling_ratio": 2}),
    Case("RoiAlign", [f(2, 3, 8, 8), BOXES, i(1, 0)], 16, {"output_height": 2, "spatial_scale": 0.8}),
    Case("RoiAlign", [f(2, 3, 8, 8), BOXES, i(1, 0)], 16, {"output_width": 2, "mode": "max", "sampling_ratio": 1}),
    Case("DFT", [f(2, 6, 1)], 17, {"axis": 1, "onesided": 1}),
    Case("DFT", [f(2, 6, 2), i(4, shape=()), i(1, shape=())], 20),
    Case("STFT", [f(2, 16, 1), one(4, np.int64), np.hanning(8).astype(np.float32)], 17),
    Case("Attention", [f(2, 4, 3, 8), f(2, 2, 5, 8), f(2, 2, 5, 6), f(3, 5)], 23, {"softcap": 2.0}),
    Case("Attention", [f(2, 3, 8), f(2, 3, 4), f(2, 3, 4)], 23, {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}),
    Case("RotaryEmbedding", [f(2, 4, 3, 8), f(6, 4), f(6, 4), i(*range(6), shape=(2, 3))], 23, {"interleaved": 1}),
    *(Case(op, [X], 22) for op in ("Mish", "HardSwish", "Softplus", "Softsign", "Selu")),
    *(Case(op, [X], 22) for op in ("Erf", "Atan", "Sinh", "Asinh", "Cosh", "Tan")),
    *(Case(op, [X], 22, {"alpha": 0.7}) for op in ("Elu", "Celu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid")),
    Case("Gelu", [X], 20, {"approximate": "tanh"}), Case("Gelu", [X], 20),
    Case("Shrink", [X], 9, {"bias": 0.2, "lambd": 0.4}),
    Case("BitShift", [i(1, 4, dtype=np.uint8), i(2, 1, dtype=np.uint8)], 11, {"direction": "LEFT"}),
]  # fmt: skip

FUSED = [
    Case("Gelu", [X]), Case("FastGelu", [X, f(5)]), Case("BiasGelu", [X, f(5)]),
    Case("QuickGelu", [X], 17, {"alpha": 1.2}),
    Case("FusedConv", [f(1, 2, 5, 5), f(3, 2, 3, 3), f(3)], 17,
         {"activation": "LeakyRelu", "activation_params": [0.2], "pads": [1, 1, 1, 1]}),
    Case("FusedConv", [f(1, 2, 5, 5), f(3, 2, 3, 3), f(3), f(1, 3, 3, 3)], 17, {"activation": "Relu"}),
    Case("FusedGemm", [f(2, 3), f(3, 4), f(4)], 17, {"activation": "LeakyRelu", "activation_alpha": 0.3}),
    Case("FusedMatMul", [f(2, 3, 4), f(2, 5, 4)], 17, {"alpha": 0.5, "transB": 1}),
    Case("FusedMatMul", [f(4, 3, 2), f(3, 2, 5)], 17, {"transBatchA": 1}),
    Case("SkipLayerNormalization", [f(2, 3, 4), f(2, 3, 4, seed=1), f(4), f(4, seed=1), f(4, seed=2)], 17, {}, 4),
    Case("SkipSimplifiedLayerNormalization", [f(2, 3, 4), f(2, 3, 4, seed=1), f(4)], 17),
    *(Case("Attention", [f(2, 3, 8), f(8, 24), f(24), mask], 17, {"num_heads": 2, "unidirectional": u})
      for u in (0, 1) for mask in (None, MASK, i(2, 3, dtype=np.int32), i(2, 3, 0, 0, dtype=np.int32))),
    Case("Attention", [f(2, 3, 8), f(8, 20), f(20)], 17, {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 4], "scale": 0.3}),
    Case("Attention", [f(2, 1, 8), f(8, 24), f(24), None, f(2, 2, 2, 4, 4)], 17, {"num_heads": 2}, 2),
    Case("MultiHeadAttention", [f(2, 3, 8), f(2, 5, 8), f(2, 5, 4), f(20)], 17, {"num_heads": 2}),
    Case("MultiHeadAttention", [f(2, 3, 8), f(2, 3, 8), f(2, 3, 8), None, MASK], 17, {"num_heads": 4}),
    Case("EmbedLayerNormalization", [
        i(1, 0, 2, 3, 1, 1, shape=(2, 3), dtype=np.int32), i(0, 1, 1, 0, 0, 1, shape=(2, 3), dtype=np.int32),
        f(4, 6), f(5, 6), f(2, 6), f(6), f(6, seed=1), MASK], 17, {}, 2),
]  # fmt: skip


def _named(case: Case) -> str:
    return f"{case.op}-{case.opset}"


@pytest.mark.parametrize("case", FORMS, ids=_named)
def test_forms_of_the_opsets_equal_ort(case: Case) -> None:
    found = case.difference()
    assert found is not None, "ORT runs it"
    assert found < TOLERANCE


@pytest.mark.parametrize("case", FUSED, ids=_named)
def test_operators_of_ort_equal_ort(case: Case) -> None:
    case.domain = "com.microsoft"
    found = case.difference()
    assert found is not None, "ORT runs it"
    assert found < 1e-3 if "Gelu" in case.op else found < TOLERANCE  # ORT approximates its own


def test_every_operator_of_ort_is_tried() -> None:
    assert {op for domain, op in OPS if domain == "com.microsoft"} - {case.op for case in FUSED} == {
        "QuantizeLinear", "DequantizeLinear", "TransposeMatMul",
    }  # fmt: skip
    assert ops_contrib.STANDARD.keys() == {"SimplifiedLayerNormalization"}
