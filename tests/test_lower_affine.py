"""lower-affine: its forms are in golden/; here its options, its target, and that ORT keeps the blocked layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt.base import Target
from graphopt.errors import SpecError
from graphopt.pipeline import Pipeline, Settings

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[1,16,8,8] x) => (float[1,16,8,8] y)
<float shift = {{0.5}}, float[16,16,1,1] w = {{{w}}}, float[16,1,3,3] d = {{{d}}}>
{{
  a = Conv(x, w)
  b = HardSwish(a)
  c = Add(b, shift)
  y = Conv<group = 16, pads = [1, 1, 1, 1]>(c, d)
}}
"""


def model() -> onnx.ModelProto:
    def numbers(count: int) -> str:
        return ", ".join(f"{(i * 7 % 19) / 10 - 0.9:.1f}" for i in range(count))

    return onnx.parser.parse_model(MODEL.format(w=numbers(256), d=numbers(144)))


def lowered(form: str, target: Target | None = None) -> onnx.ModelProto:
    settings = Settings(verify="off", on_failure="stop", target=target or Target())
    return Pipeline(f"lower-affine{{form={form}}}").run(model(), settings=settings).proto


def kinds(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("batchnorm", ["Conv", "HardSwish", "BatchNormalization", "Conv"]),
        ("depthwise", ["Conv", "HardSwish", "Conv", "Conv"]),
        ("pad", ["Conv", "HardSwish", "Pad", "Conv"]),
    ],
)
def test_forms(form: str, wanted: list[str]) -> None:
    assert kinds(lowered(form)) == wanted


def test_other_providers_keep_the_plain_form() -> None:
    assert kinds(lowered("batchnorm", Target(provider="cuda"))) == ["Conv", "HardSwish", "Add", "Conv"]


def test_unknown_form_is_refused() -> None:
    with pytest.raises(SpecError, match="form is one of"):
        lowered("magic")


@pytest.mark.parametrize("form", ["batchnorm", "depthwise"])
def test_ort_stays_in_its_blocked_layout(form: str, tmp_path: Path) -> None:
    """As exported: into the layout and out of it once more in the middle.  Lowered: at the ends alone."""

    def reorders(proto: onnx.ModelProto) -> int:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        made = onnx.load(tmp_path / "optimized.onnx").graph.node
        return sum(n for kind, n in Counter(node.op_type for node in made).items() if kind.startswith("Reorder"))

    before = reorders(model())
    if before == 0:
        pytest.skip("this machine has no blocked layout")
    assert reorders(lowered(form)) < before


def test_nodes_without_names_stay_without() -> None:
    """ORT refuses two nodes of one name; a node that has lost its outputs must not be called by its operator."""
    rng = np.random.default_rng(0)
    nodes, x = [], "x"
    for i in range(2):
        nodes.append(onnx.helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], pads=[1] * 4))
        nodes.append(onnx.helper.make_node("Sigmoid", [f"c{i}"], [f"r{i}"]))
        nodes.append(onnx.helper.make_node("Add", [f"r{i}", "shift"], [f"a{i}"]))
        x = f"a{i}"
    nodes.append(onnx.helper.make_node("Conv", [x, "w0"], ["y"], pads=[1] * 4))
    constants = {f"w{i}": rng.normal(size=(16, 16, 3, 3)) for i in range(2)} | {"shift": np.array([0.5])}
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info("x", 1, [1, 16, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 16, 8, 8])],
        [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    result = Pipeline("lower-affine").run(model)
    assert [n.op for n in result.model.graph.nodes].count("BatchNormalization") == 2
    assert all(not n.name for n in result.model.graph.nodes)
