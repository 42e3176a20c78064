"""What `quantize` says to input that gives it trouble: one clear answer each, and never a broken model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphopt import layer_choice, quantizer
from graphopt.data import load_samples
from graphopt.errors import DataError, GateMissedError, GraphoptError, SpecError
from graphopt.model import load
from graphopt.optimizer import parse_pipeline
from graphopt.quality import Bound
from graphopt.quantizer import Quantized, quantize
from graphopt.runtime import Session
from graphopt.search import assign

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
LOOSE = Bound(min_sqnr=10.0)


def weights(*shape: int) -> Array:
    return np.asarray(RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:])), np.float32)


CONVS = {"w1": weights(16, 4, 3, 3), "b1": weights(16), "w2": weights(16, 16, 3, 3), "b2": weights(16)}
SMALL = (2, 4, 12, 12)


def convs(
    constants: Mapping[str, Array] | None = None,
    *,
    shape: Any = SMALL,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    before: str = "",
) -> ModelProto:
    """Two convolutions with a Relu between them; `before` is an operator in front of them."""
    held = {**CONVS, **(constants or {})}
    if kind == TensorProto.FLOAT16:
        held = {name: values.astype(np.float16) for name, values in held.items()}
    first = [helper.make_node(before, ["x"], ["x0"], "front")] if before else []
    nodes = [
        *first,
        helper.make_node("Conv", ["x0" if before else "x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["y"], "conv2", pads=[1, 1, 1, 1]),
    ]
    return model(nodes, held, shape, [shape[0], 16, *shape[2:]], opset=opset, kind=kind)


def model(
    nodes: list[onnx.NodeProto], held: Mapping[str, Array], shape: Any, result: Any, *, opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, result)],
        [numpy_helper.from_array(values, name) for name, values in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def samples(count: int = 20, shape: tuple[int, ...] = SMALL, dtype: Any = np.float32) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal(shape).astype(dtype)} for _ in range(count)]


def filled(value: float, count: int = 20) -> list[dict[str, Array]]:
    return [{"x": np.full(SMALL, value, np.float32)} for _ in range(count)]


def all_that_the_noise_allows(costs: Any, noise: Mapping[str, float], limit: float = math.inf) -> Any:
    """Choose layers as `assign` does, but whatever they cost: the quietest first."""
    chosen: set[str] = set()
    total = 0.0
    for name in sorted(noise, key=lambda name: noise[name]):
        if total + noise[name] <= limit:
            total += noise[name]
            chosen.add(name)
    return replace(assign(costs, {}), int8=frozenset(chosen), noise=total)


@pytest.fixture(autouse=True)
def _whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such small models are rarely faster: what can be made is made all the same, or nothing would be looked at."""
    monkeypatch.setattr(quantizer, "faster", lambda _: True)
    monkeypatch.setattr(layer_choice, "assign", all_that_the_noise_allows)


def quantized(source: Any, data: Any, **options: Any) -> Quantized:
    """Return the result, which the checker and ORT accept, and which keeps the signature."""
    result = quantize(source, data=data, **{"bound": LOOSE, "budget": 0.5, **options})
    proto = result.model.proto
    onnx.checker.check_model(proto, full_check=True)
    session = Session(result.model)
    assert session.input_names == ["x"]
    assert session.output_names == ["y"]
    return result


def ops(result: Quantized) -> list[str]:
    return [node.op for node in result.model.nodes()]


def integer_layers(result: Quantized) -> int:
    return sum(row.precision == "int8" for row in result.report.layers)


def reasons(result: Quantized) -> str:
    return " ".join([result.report.reason, *(row.why for row in result.report.layers)])


def sqnr(source: Any, result: Quantized, feed: Mapping[str, Array]) -> float:
    a, b = (Session(m).run(feed)["y"].astype(np.float64) for m in (source, result.model))
    return float(10 * np.log10(np.square(a).sum() / max(np.square(a - b).sum(), 1e-30)))


def test_the_good_model_of_these_tests_is_quantized() -> None:
    result = quantized(convs(), samples())
    assert result.report.decision == "quantized"
    assert integer_layers(result) == 2
    assert sqnr(convs(), result, samples(1)[0]) > 25


def test_no_samples() -> None:
    with pytest.raises(DataError, match="int8 needs samples") as found:
        quantize(convs())
    assert found.value.hint is not None
    assert "--weight-only" in found.value.hint


def test_a_bound_without_samples_is_refused_and_no_bound_said_to_be_unjudged() -> None:
    source = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights(64, 64)}, [2, 64], [2, 64])
    with pytest.raises(DataError, match="judged on samples"):
        quantize(source, weight_only="int8", bound=Bound(min_sqnr=200.0))
    result = quantize(source, weight_only="int8")
    assert result.report.quality is None
    assert any("was not judged" in note for note in result.report.notes)
    with pytest.raises(GateMissedError, match="misses the bound"):
        quantize(source, data=samples(shape=(2, 64)), weight_only="int8", bound=Bound(min_sqnr=200.0))


def test_a_metric_needs_no_samples_and_is_asked_at_once() -> None:
    source = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights(64, 64)}, [2, 64], [2, 64])
    scores = iter([1.0, 0.5])
    with pytest.raises(GateMissedError, match="the metric falls"):
        quantize(source, weight_only="int8", bound=Bound(metric=lambda _: next(scores), max_drop=0.1))
    asked = []

    def leaves(predict: object) -> float:
        asked.append(predict)
        raise SystemExit(0)

    with pytest.raises(DataError, match="SystemExit"):
        quantize(convs(), data=samples(), bound=Bound(metric=leaves, max_drop=0.1))
    assert len(asked) == 1


def test_a_form_beside_what_settles_it_is_refused() -> None:
    for options in ({"objective": "size", "weight_only": "int8"}, {"weight_only": "int8", "block": 7},
                    {"precision": "fp16", "provider": "fop"}, {"weight_only": "int8", "isa": "avx2"}):  # fmt: skip
        with pytest.raises(SpecError):
            quantize(convs(), data=samples(), **options)


def test_empty_samples() -> None:
    with pytest.raises(DataError, match="empty"):
        quantize(convs(), data=[])


@pytest.mark.parametrize("value", [0.0, -3.5, 3e30])
def test_constant_activations(value: float) -> None:
    result = quantized(convs(), filled(value))
    (feed,) = filled(value, 1)
    assert np.isfinite(Session(result.model).run(feed)["y"]).all()
    assert sqnr(convs(), result, feed) > 10


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(value: float) -> None:
    spoiled = samples()
    spoiled[3]["x"][0, 0, 0, 0] = value
    try:
        result = quantized(convs(), spoiled)
    except GraphoptError as error:
        assert any(word in str(error) for word in ("NaN", "infinit", "finite"))  # noqa: PT017 (either answer is one)
        return
    if integer_layers(result) < 2:
        assert any(word in reasons(result) for word in ("NaN", "infinit", "finite"))
    assert sqnr(convs(), result, samples(1)[0]) > 10


def test_a_tensor_that_is_never_finite_stays_float_and_is_named() -> None:
    source = convs(before="Log")  # NaN wherever x < 0
    negative = [{"x": -np.abs(feed["x"]) - 0.1} for feed in samples()]
    try:
        result = quantized(source, negative)
    except GraphoptError as error:
        assert "NaN" in str(error) or "finite" in str(error)  # noqa: PT017
        return
    assert any(word in reasons(result) for word in ("NaN", "finite"))


@pytest.mark.parametrize("names", [("w1", "b1"), ("w1", "b1", "w2", "b2")], ids="-".join)
def test_weights_that_are_all_zero(names: tuple[str, ...]) -> None:
    source = convs({name: np.zeros_like(CONVS[name]) for name in names})
    result = quantized(source, samples())
    feed = samples(1)[0]
    expected, found = Session(source).run(feed)["y"], Session(result.model).run(feed)["y"]
    assert np.abs(expected - found).max() <= 0.02 * max(np.abs(expected).max(), 1e-6)


def test_channels_that_are_zero_stay_zero() -> None:
    w2, b2 = CONVS["w2"].copy(), CONVS["b2"].copy()
    w2[3], b2[3], w2[5, :], b2[5] = 0, 0, 1e-40, 0  # a denormal scale would be as bad as none
    source = convs({"w2": w2, "b2": b2})
    result = quantized(source, samples())
    out = Session(result.model).run(samples(1)[0])["y"]
    assert np.abs(out[:, [3, 5]]).max() < 1e-3
    assert sqnr(source, result, samples(1)[0]) > 25


def test_weights_that_are_not_finite() -> None:
    w1 = CONVS["w1"].copy()
    w1[0, 0, 0, 0] = np.nan
    try:
        result = quantized(convs({"w1": w1}), samples())
    except GraphoptError as error:
        assert "NaN" in str(error) or "finite" in str(error)  # noqa: PT017
        return
    assert any(word in reasons(result) for word in ("NaN", "finite"))


def test_half_precision_is_left_alone_and_said() -> None:
    source = convs(kind=TensorProto.FLOAT16)
    result = quantized(source, samples(dtype=np.float16))
    assert integer_layers(result) == 0
    assert "float16" in reasons(result)
    assert "QuantizeLinear" not in ops(result)


def test_what_is_quantized_already_is_left_alone() -> None:
    once = quantized(convs(), samples())
    twice = quantized(once.model.proto, samples())
    assert ops(twice).count("QuantizeLinear") == ops(once).count("QuantizeLinear")
    assert ops(twice).count("DequantizeLinear") == ops(once).count("DequantizeLinear")
    assert "quantized already" in reasons(twice)
    assert sqnr(once.model.proto, twice, samples(1)[0]) > 60


def test_what_is_quantized_in_part_is_extended_and_not_doubled() -> None:
    part = half_quantized()
    result = quantized(part, samples())
    assert sqnr(part, result, samples(1)[0]) > 20
    for node in result.model.graph.nodes:
        if node.op == "QuantizeLinear":
            makers = [maker.op for maker in node.inputs[0].inputs]
            assert makers != ["DequantizeLinear"], f"{node.name} quantizes what was dequantized just before"
    assert ops(result).count("DequantizeLinear") >= 2


def half_quantized() -> ModelProto:
    """The convolutions with the first one in QDQ form."""
    scale, zero = np.float32(0.03), np.uint8(128)
    w_scale = np.abs(CONVS["w1"]).max(axis=(1, 2, 3)) / 127
    codes = np.round(CONVS["w1"] / w_scale[:, None, None, None]).astype(np.int8)
    held = {
        "s": np.asarray(scale), "z": np.asarray(zero), "ws": w_scale.astype(np.float32), "wz": np.zeros(16, np.int8),
        "wq": codes, "b1": CONVS["b1"], "w2": CONVS["w2"], "b2": CONVS["b2"],
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], "dq"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], "dqw", axis=0),
        helper.make_node("Conv", ["xd", "wd", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["y"], "conv2", pads=[1, 1, 1, 1]),
    ]
    return model(nodes, held, SMALL, [2, 16, 12, 12])


@pytest.mark.parametrize("opset", [7, 12])
def test_old_opsets_are_raised(opset: int) -> None:
    result = quantized(convs(opset=opset), samples())
    assert result.model.opset >= 13
    assert integer_layers(result) == 2


def test_open_dimensions_and_ragged_samples() -> None:
    source = convs(shape=["n", 4, "h", "w"])
    ragged = [samples(1, (1 + i % 3, 4, 8 + i % 5, 9 + i % 7))[0] for i in range(20)]
    result = quantized(source, ragged)
    assert integer_layers(result) == 2
    for feed in ragged[:4]:
        assert sqnr(source, result, feed) > 20


def test_layers_in_subgraphs_stay_float() -> None:
    branches = {}
    for name, inner in (("then_branch", "Relu"), ("else_branch", "Neg")):
        nodes = [
            helper.make_node("Conv", ["c0", "w2", "b2"], [f"{inner}1"], f"conv_{inner}", pads=[1, 1, 1, 1]),
            helper.make_node(inner, [f"{inner}1"], [f"{inner}2"]),
        ]
        branches[name] = helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(f"{inner}2", TensorProto.FLOAT, None)]
        )
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c0"], "conv0", pads=[1, 1, 1, 1]),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], "either", **branches),
    ]
    source = model(nodes, {**CONVS, "zero": np.zeros((), np.float32)}, SMALL, [2, 16, 12, 12])
    result = quantized(source, samples())
    for feed in samples(4):
        assert sqnr(source, result, feed) > 20
    assert integer_layers(result) == 1  # the one outside
    within = [node.op for graph in result.model.graphs() if graph is not result.model.graph for node in graph.nodes]
    assert within.count("Conv") == 2
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(within)
    made = parse_pipeline("quantize-static").run(load(source), samples=load_samples(samples(), load(source)))
    blocked = {miss["where"]: miss["why"] for miss in made.report.passes[0].blocked}
    assert {blocked["conv_Relu"], blocked["conv_Neg"]} == {"it stands in a subgraph"}


def test_nothing_to_quantize_is_said() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], "relu")]
    result = quantized(model(nodes, {}, SMALL, SMALL), samples())
    assert result.report.decision == "lossless"
    assert "no layer" in result.report.reason


def test_a_bound_that_nothing_keeps_gives_the_lossless_model_and_the_reason() -> None:
    result = quantized(convs(), samples(), bound=Bound(min_sqnr=200.0))
    assert result.report.decision == "lossless"
    assert "SQNR" in result.report.reason
    assert sqnr(convs(), result, samples(1)[0]) > 90


def test_a_provider_without_integer_kernels_keeps_the_model() -> None:
    with pytest.raises(GraphoptError) as found:
        quantize(convs(), data=samples(), provider="cuda", budget=0.5)
    assert "cuda" in str(found.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int3"}, "precision is one of"),
        ({"objective": "speed"}, "objective is one of"),
        ({"weight_only": "int5"}, "weight-only is one of"),
        ({"block": 32}, "a block is of weight-only forms"),
        ({"weight_only": "int4", "precision": "fp16"}, "exclude each other"),
        ({"shapes": {"x": (1, 4, 8, 8)}}, "shapes are for random feeds"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        quantize(convs(), data=samples(), **options)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"z": np.zeros(SMALL, np.float32)}], "no input 'z'"),
        ([{"x": np.zeros(SMALL, np.float64)}], "float64"),
        ([{"x": np.zeros((1, 3, 4, 4), np.float32)}], "shape"),
        ("no-such-file.npz", "do not exist"),
    ],
)
def test_samples_that_do_not_fit(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        quantize(convs(), data=data, budget=0.5)


def test_a_metric_that_fails_is_named(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text("def right(predict):\n    raise ValueError('labels are missing')\n")
    with pytest.raises(DataError, match="labels are missing"):
        quantize(convs(), data=samples(), bound=Bound(metric=f"{file}:right"), budget=0.5)


@pytest.mark.slow
def test_more_than_protobuf_holds(tmp_path: Path) -> None:
    """2.2 GB of weights in external data, weight-only int8: a quarter of the size, and near the original."""
    from graphopt.models.benchmarks import scale

    width, layers = 4096, 33  # 64 MiB each
    held, nodes, before = [], [], "x"
    with (tmp_path / "large.data").open("wb") as data:
        for i in range(layers):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": "large.data", "offset": data.tell(), "length": 4 * width**2}.items():
                tensor.external_data.add(key=key, value=str(value))
            data.write((np.random.default_rng(i).standard_normal((width, width), np.float32) / 64).tobytes())
            held.append(tensor)
            nodes.append(helper.make_node("MatMul", [before, f"w{i}"], [f"h{i}"], f"layer{i}"))
            before = f"h{i}"
    graph = helper.make_graph(
        nodes, "large", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info(before, TensorProto.FLOAT, ["n", width])], held,
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    source = tmp_path / "large.onnx"
    source.write_bytes(proto.SerializeToString())
    size = (tmp_path / "large.data").stat().st_size
    assert size > scale.GIGABYTE * 2
    result = quantize(source, weight_only="int8")
    result.save(tmp_path / "small.onnx")
    onnx.checker.check_model(str(tmp_path / "small.onnx"))
    assert sum(path.stat().st_size for path in tmp_path.glob("small.onnx*")) < 0.27 * size
    feed = {"x": np.random.default_rng(0).standard_normal((1, width)).astype(np.float32)}
    expected = Session(source).run(feed)[before].astype(np.float64)
    found = Session(tmp_path / "small.onnx").run(feed)[before].astype(np.float64)
    assert 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum()) > 20
