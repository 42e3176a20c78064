"""Codebook weights: what comes back, that ONNX Runtime decodes it when it loads the model, and sizes on disk."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.codes import codebook_code
from graphopt.errors import GraphoptError
from graphopt.model import load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session, evaluate

Array = np.ndarray[Any, Any]
LEVELS = ["kmeans", "nf4", "power-of-two"]
ERROR = {("kmeans", 4): 0.13, ("nf4", 4): 0.13, ("power-of-two", 4): 0.22, ("kmeans", 8): 0.012}
"""Relative error of Gaussian weights: 0.098 is the least of 16 levels for all of a tensor (Max 1960)."""


def weight(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * 0.1).astype(np.float32)


def model_of(
    op: str, values: Array, rank: int, attrs: Mapping[str, Any] | None = None, *, opset: int = 11,
    dims: Sequence[Any] = (), kind: int = TensorProto.FLOAT, node_constant: bool = False,
) -> onnx.ModelProto:  # fmt: skip
    inputs = ["w", "x"] if op == "Gather" else ["x", "w"]
    nodes = [helper.make_node(op, inputs, ["y"], name="layer", **(attrs or {}))]
    held = numpy_helper.from_array(np.ascontiguousarray(values), "w")
    if node_constant:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=held))
    given = TensorProto.INT64 if op == "Gather" else kind
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", given, dims or [None] * rank)],
        [helper.make_tensor_value_info("y", kind, [None] * (rank + (op == "Gather")))],
        [] if node_constant else [held],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


MODELS = {
    "MatMul": (model_of("MatMul", weight(96, 64), 2), (5, 96)),
    "Gemm": (model_of("Gemm", weight(64, 96), 2, {"transB": 1}), (5, 96)),
    "Conv": (model_of("Conv", weight(32, 16, 3, 3), 4, {"pads": [1, 1, 1, 1]}), (2, 16, 6, 6)),
    "grouped": (model_of("Conv", weight(64, 8, 5, 5), 4, {"group": 4}), (2, 32, 7, 7)),
    "ConvTranspose": (model_of("ConvTranspose", weight(16, 32, 3, 3), 4), (2, 16, 5, 5)),
    "Gather": (model_of("Gather", weight(200, 40), 1), (7,)),
    "Constant": (model_of("MatMul", weight(96, 64), 2, node_constant=True), (5, 96)),
    "odd": (model_of("MatMul", weight(85, 75), 2), (5, 85)),
}


def compressed(model: onnx.ModelProto, **options: Any) -> Result:
    given = ",".join(f"{k}={v}" for k, v in options.items())
    settings = Settings(verify="off", on_failure="stop")
    found = Pipeline(f"compress-weights{{{given}}}").run(model, settings=settings)
    onnx.checker.check_model(found.proto, full_check=True)
    return found


def feed_of(shape: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {"x": rng.integers(0, 200, shape) if len(shape) == 1 else rng.normal(size=shape).astype(np.float32)}


def relative(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def compiled_ops(model: onnx.ModelProto, path: Path) -> Counter[str]:
    Session(model, optimized_path=path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("block", [0, 32])
def test_four_bits(name: str, levels: str, block: int) -> None:
    model, shape = MODELS[name]
    result = compressed(model, levels=f'"{levels}"', bits=4, block=block)
    assert result.report.passes[0].changes == 1
    found, expected = (evaluate(m, feed_of(shape))["y"] for m in (result.proto, model))
    assert 0.005 < relative(found, expected) < ERROR[levels, 4]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 32)])
def test_what_runs_is_the_float_model(name: str, bits: int, block: int, tmp_path: Path) -> None:
    model, shape = MODELS[name]
    result = compressed(model, bits=bits, block=block).proto
    assert compiled_ops(result, tmp_path / "a.onnx") == compiled_ops(model, tmp_path / "b.onnx")
    found, expected = (evaluate(m, feed_of(shape), optimization="all")["y"] for m in (result, model))
    assert relative(found, expected) < ERROR["kmeans", bits]
    assert len(result.SerializeToString()) < len(model.SerializeToString()) * (bits / 32 + 0.25)


def test_values_are_those_of_the_codebook() -> None:
    values = weight(32, 16, 3, 3)
    result = compressed(model_of("Conv", values, 4), bits=4).proto
    made = next(node.input[1] for node in result.graph.node if node.op_type == "Conv")
    found = evaluate(result, feed_of((1, 16, 3, 3)), [made])[made]
    expected = codebook_code(values.reshape(32, -1), 0, 4).approximate(values.reshape(32, -1)).reshape(values.shape)
    assert relative(found, expected) < 0.01  # a scale of float16 may move a code or two to the next level
    assert relative(found, values) > 0.05


def test_sizes_on_disk(tmp_path: Path) -> None:
    values = weight(1024, 512)
    for bits, block, limit in ((8, 0, 0.255), (4, 0, 0.13), (4, 32, 0.145)):
        compressed(model_of("MatMul", values, 2), bits=bits, block=block).save(tmp_path / "small.onnx")
        assert (tmp_path / "small.onnx").stat().st_size < limit * values.nbytes


@pytest.mark.parametrize("bits", [8, 4])
def test_again_does_nothing(bits: int) -> None:
    once = compressed(model_of("MatMul", weight(512, 512), 2), bits=bits, block=16)
    assert once.report.passes[0].changes == 1
    assert compressed(once.proto, bits=4, block=16).report.passes[0].changes == 0


def test_half_precision() -> None:
    values = weight(96, 64).astype(np.float16)
    model = model_of("MatMul", values, 2, kind=TensorProto.FLOAT16)
    feed = {"x": np.random.default_rng(1).normal(size=(5, 96)).astype(np.float16)}
    found = evaluate(compressed(model).proto, feed)["y"]
    assert found.dtype == np.float16
    assert relative(found.astype(float), evaluate(model, feed)["y"].astype(float)) < ERROR["kmeans", 8]


def test_one_code_for_all_that_read_a_weight(tmp_path: Path) -> None:
    model = model_of("Gather", weight(200, 40), 1)
    model.graph.node.append(helper.make_node("Gemm", ["y", "w"], ["z"], transB=1))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, None]))
    result = compressed(model).proto
    assert len(result.SerializeToString()) < 0.35 * len(model.SerializeToString())
    assert compiled_ops(result, tmp_path / "a.onnx") == compiled_ops(model, tmp_path / "b.onnx")


def test_subgraphs(tmp_path: Path) -> None:
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", name], [f"{name}/y"])], name, [],
            [helper.make_tensor_value_info(f"{name}/y", TensorProto.FLOAT, [None, 64])],
            [numpy_helper.from_array(weight(96, 64, seed=seed), name)],
        )
        for seed, name in enumerate("ab")
    ]  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    model = model_of("MatMul", weight(96, 64), 2)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.append(node)
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    result = compressed(model)
    assert result.report.passes[0].changes == 2
    for choice in (True, False):
        feed = {**feed_of((5, 96)), "c": np.array(choice)}
        assert relative(evaluate(result.proto, feed)["y"], evaluate(model, feed)["y"]) < ERROR["kmeans", 8]


def test_near_misses() -> None:
    model = model_of("MatMul", weight(96, 64), 2)
    model.graph.node.append(helper.make_node("Neg", ["w"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, None]))
    assert [b["why"] for b in compressed(model).report.passes[0].blocked] == ["Neg 'z' reads it, too"]
    values = weight(96, 64)
    values[1, 1] = np.inf
    broken = compressed(model_of("MatMul", values, 2))
    assert [b["why"] for b in broken.report.passes[0].blocked] == ["the weight has NaN or infinite elements"]
    assert compressed(model_of("MatMul", weight(16, 16), 2)).report.passes[0].changes == 0


def test_quantized_weights_are_left_alone() -> None:
    model = model_of("MatMul", weight(512, 256), 2, opset=21)
    model.ir_version = 10
    settings = Settings(verify="off", on_failure="stop")
    for spec in ("quantize-weights{bits=4,block=16}", "compress-weights{bits=4,block=16}"):
        other = "compress-weights" if spec.startswith("quantize") else "quantize-weights"
        result = Pipeline(f"{spec},{other}").run(model, settings=settings)
        assert [record.changes for record in result.report.passes] == [1, 0]


@pytest.mark.parametrize("spec", ["quantize-weights{bits=4,block=32}", "compress-weights{bits=4,block=32}"])
@pytest.mark.parametrize("name", ["MatMul", "Gather"])
def test_folding_does_not_undo_it(spec: str, name: str) -> None:
    model, shape = MODELS[name]
    settings = Settings(verify="off", on_failure="stop")
    result = Pipeline(f"upgrade-opset{{to=21}},{spec},fold-constants{{max_growth=1e9}},eliminate-dead").run(
        model, settings=settings
    )
    stored = sum(numpy_helper.to_array(t).size for t in result.proto.graph.initializer if t.data_type == 1)
    assert stored < 1000
    assert relative(evaluate(result.proto, feed_of(shape))["y"], evaluate(model, feed_of(shape))["y"]) < 0.13


def test_light_weights_keep_eight_bits() -> None:
    """A small layer before a large one: nearly all bytes are the large one's, much of the error the small one's."""
    shapes = {"small": (64, 64), "large": (64, 1024)}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "small"], ["h"]), helper.make_node("MatMul", ["h", "large"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1024])],
        [numpy_helper.from_array(weight(*shape), name) for name, shape in shapes.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    for light, small, large in ((0.0, 4, 4), (0.1, 8, 4), (1.0, 8, 8)):
        result = compressed(model, bits=4, light=light).proto
        codes = {t.name: numpy_helper.to_array(t).size for t in result.graph.initializer}
        found = [8 * codes[f"{name}/codes"] // np.prod(shape) for name, shape in shapes.items()]
        assert found == [small, large]


def test_layers_by_name() -> None:
    model = MODELS["MatMul"][0]
    assert compressed(model, only='["other*"]').report.passes[0].changes == 0
    assert compressed(model, skip='["lay*"]').report.passes[0].changes == 0
    assert compressed(model, only='["lay*"]').report.passes[0].changes == 1


@pytest.mark.parametrize(("options", "message"), [({"bits": 3}, "bits is one"), ({"block": 3}, "even"),
                                                   ({"levels": '"best"'}, "levels is one")])  # fmt: skip
def test_settings_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        compressed(MODELS["MatMul"][0], **options)


def test_time_is_near_linear_in_the_number_of_weights() -> None:
    def seconds(count: int) -> float:
        names = [f"w{i}" for i in range(count)]
        nodes = [
            helper.make_node("MatMul", ["x" if i == 0 else f"y{i - 1}", n], [f"y{i}"]) for i, n in enumerate(names)
        ]
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 50])],
            [helper.make_tensor_value_info(f"y{count - 1}", TensorProto.FLOAT, ["n", 50])],
            [numpy_helper.from_array(weight(50, 50, seed=i), n) for i, n in enumerate(names)],
        )  # fmt: skip
        model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7))
        started = time.process_time()
        Pipeline("compress-weights{levels='nf4',bits=4}").run(model, settings=Settings(verify="off", on_failure="stop"))
        return time.process_time() - started

    seconds(10)
    assert seconds(400) < 16 * max(seconds(50), 0.05)  # eight times as many; quadratic would be 64
