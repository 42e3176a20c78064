"""store-fp16: half the bytes, the same graph in ORT, weights rounded once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from graphopt.models import zoo
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

EPSILON = 2.0**-11
"""Half a unit in the last place of float16, relative."""


def run(model: onnx.ModelProto, spec: str = "store-fp16") -> Result:
    return Pipeline(spec).run(model, settings=Settings(verify="off", on_failure="stop"))


def parsed(text: str, **weights: Any) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items())
    return model


def compiled(model: onnx.ModelProto, path: Path) -> Counter[str]:
    Session(model, optimized_path=path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


CONV = "g (float[1, 16, 8, 8] x) => (float[1, 16, 6, 6] y) { a = Conv (x, w, b)  y = Relu (a) }"


def test_weights_are_rounded_once_and_ort_runs_the_same_graph(tmp_path: Path) -> None:
    w, b = normal(16, 16, 3, 3), normal(16)
    model = parsed(CONV, w=w, b=b)
    result = run(model)
    assert {i.name: i.data_type for i in result.proto.graph.initializer} == {
        "b": TensorProto.FLOAT, "w/float16": TensorProto.FLOAT16,
    }  # fmt: skip
    assert compiled(model, tmp_path / "a.onnx") == compiled(result.proto, tmp_path / "b.onnx")
    rounded = parsed(CONV, w=w.astype(np.float16), b=b)
    x = normal(1, 16, 8, 8)
    np.testing.assert_array_equal(Session(rounded).run({"x": x})["y"], Session(result.proto).run({"x": x})["y"])
    assert run(result.proto).report.passes[0].status == "unchanged"


def test_subgraphs_read_the_same_weight() -> None:
    text = """g (bool c, float[300] x) => (float[300] y) {
        y = If (c) <then_branch = t () => (float[300] p) { p = Mul (x, w) },
                    else_branch = e () => (float[300] q) { q = Add (x, w) }> }"""
    w = normal(300)
    result = run(parsed(text, w=w))
    assert [i.name for i in result.proto.graph.initializer] == ["w/float16"]
    onnx.checker.check_model(result.proto, full_check=True)
    for flag, wanted in ((True, w.astype(np.float16)), (False, 1 + w.astype(np.float16).astype(np.float32))):
        found = Session(result.proto).run({"c": np.array(flag), "x": np.ones(300, np.float32)})["y"]
        np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize(("scale", "why"), [(1e6, "beyond 65504"), (1e-8, "keeps few digits")])
def test_weights_that_float16_does_not_hold(scale: float, why: str) -> None:
    result = run(parsed(CONV, w=normal(16, 16, 3, 3) * scale, b=normal(16)))
    assert result.report.passes[0].status == "unchanged"
    assert why in result.report.passes[0].blocked[0]["why"]


def test_options() -> None:
    model = parsed(CONV, w=normal(16, 16, 3, 3), b=normal(16))
    for spec, names in (
        ("store-fp16{least=1}", ["b/float16", "w/float16"]),
        ('store-fp16{least=1, only=["b"]}', ["b/float16", "w"]),
        ('store-fp16{least=1, skip=["b*"]}', ["b", "w/float16"]),
    ):
        assert sorted(i.name for i in run(model, spec).proto.graph.initializer) == names


@pytest.mark.parametrize("name", ["ppocr-cls", "silero-vad", "squeezenet", "minilm-dynamo"])
def test_zoo(name: str) -> None:
    path = zoo.fetch(name)
    result = run(onnx.load(path), "store-fp16")
    onnx.checker.check_model(result.proto, full_check=True)
    assert len(result.proto.SerializeToString()) < 0.62 * path.stat().st_size
    feeds = next(iter(zoo.feeds(name, 0)))
    for (key, wanted), found in zip(
        Session(path).run(feeds).items(), Session(result.proto).run(feeds).values(), strict=True
    ):
        # one rounding of each weight, through a deep model
        assert np.abs(wanted - found).max() <= 20 * EPSILON * np.abs(wanted).max(), key
