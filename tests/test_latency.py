"""Predicted latency: what is learned from made-up times, where kernels are put down, and what a run brings back."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import kernel_times, latency
from graphopt.errors import DataError
from graphopt.kernel_places import NEAREST, Places, assign_kernels
from graphopt.latency import Cell, LatencyModel, Measured, corrected, designs
from graphopt.model import Model, load
from graphopt.pipeline import Pipeline
from graphopt.samples import Samples
from graphopt.search import solve

RNG = np.random.default_rng(0)


def network(depth: int = 4, channels: int = 16, *, residual: bool = True) -> Model:
    """Convolutions with HardSwish between them, and a sum over every second one."""
    nodes, weights, last = [], [], "x"
    for n in range(depth):
        weight = RNG.standard_normal((channels, channels, 3, 3)).astype(np.float32) / 12
        weights.append(onnx.numpy_helper.from_array(weight, f"w{n}"))
        nodes.append(onnx.helper.make_node("Conv", [last, f"w{n}"], [f"c{n}"], f"conv{n}", pads=[1, 1, 1, 1]))
        nodes.append(onnx.helper.make_node("HardSwish", [f"c{n}"], [f"h{n}"], f"swish{n}"))
        before, last = last, f"h{n}"
        if residual and n % 2:
            nodes.append(onnx.helper.make_node("Add", [last, before], [f"s{n}"], f"add{n}"))
            last = f"s{n}"
    shape = [1, channels, 12, 12]
    graph = onnx.helper.make_graph(
        nodes, "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, shape)],
        weights,
    )  # fmt: skip
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    proto.ir_version = 8
    return load(proto)


def feeds(count: int = 2) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 16, 12, 12)).astype(np.float32)} for _ in range(count)]


def quantized(model: Model, int8: frozenset[str]) -> Model:
    samples = Samples(lambda: iter(feeds()), "random")
    if not int8:
        return model.copy()
    return Pipeline(f"quantize-static{{only=[{', '.join(sorted(int8))}]}}").run(model, samples=samples).model


LAYERS = [f"conv{n}" for n in range(4)]


def test_places_are_the_nearest_layers_up_and_down() -> None:
    places = Places(network(), LAYERS)
    assert places.at("x") == ("conv0",)
    assert places.at("c0") == ("conv0", "conv1", "conv2")  # h0 leads to conv1, and over the sum to conv2
    assert places.at("h0")[:2] == ("conv1", "conv0")
    assert set(places.at("s1")) == {"conv2", "conv1", "conv0"}
    assert all(len(group) <= NEAREST for group in places.all())


def test_layers_are_not_near_through_shapes() -> None:
    proto = network(depth=2, residual=False).emit()
    proto.graph.node.extend(
        [
            onnx.helper.make_node("Shape", ["h1"], ["size"], "shape"),
            onnx.helper.make_node("Reshape", ["x", "size"], ["again"], "reshape"),
        ]
    )
    proto.graph.output.append(onnx.helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, [1, 16, 12, 12]))
    places = Places(load(proto), LAYERS[:2])
    assert places.at("again") == ()
    assert places.at("h1") == ("conv1",)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4))
def test_designs_show_neighbours_in_all_combinations(count: int, reach: int) -> None:
    layers = [f"l{n}" for n in range(count)]
    groups = [tuple(layers[n : n + reach]) for n in range(count)]
    found = designs(layers, groups)
    assert found[0] == frozenset()
    assert found[-1] == set(layers)
    assert len(found) in ({1} if not layers else {2, 4, 8, 16})
    for group in groups:
        for some in itertools.combinations(group, min(len(group), 3)):
            seen = {tuple(layer in int8 for layer in some) for int8 in found}
            assert len(seen) == 2 ** len(some)
    for layer in layers:
        assert sum(layer in int8 for int8 in found) * 2 == len(found)


def test_designs_of_nothing() -> None:
    assert designs([], []) == [frozenset()]


TABLES = (
    Cell(("a",), {("float",): 5.0, ("int8",): 2.0}),
    Cell(("b",), {("float",): 4.0, ("int8",): 3.0}),
    Cell(
        ("a", "b"),
        {("float", "float"): 1.0, ("float", "int8"): 2.5, ("int8", "float"): 2.0, ("int8", "int8"): 0.5},
    ),
)
MODEL = LatencyModel(("a", "b"), TABLES, constant=1.0)


def test_prediction_is_the_sum_of_the_tables() -> None:
    assert MODEL.predict(()) == 11.0
    assert MODEL.predict({"a"}) == 1.0 + 2.0 + 4.0 + 2.0
    assert MODEL.predict(["a", "b"]) == 1.0 + 2.0 + 3.0 + 0.5
    with pytest.raises(DataError, match="layer 'z'"):
        MODEL.predict({"z"})


def test_the_problem_costs_what_the_model_predicts() -> None:
    problem = MODEL.problem({"a": 0.1, "b": 0.2})
    for int8 in (set(), {"a"}, {"b"}, {"a", "b"}):
        picks = {layer: latency.PRECISIONS[layer in int8] for layer in MODEL.layers}
        assert problem.cost(picks) == pytest.approx(MODEL.predict(int8) + len(int8) * 1e-4 * 11.0)
    assert solve(problem, 0.15).having("int8") == {"a"}


def test_a_layer_that_saves_nothing_stays_float() -> None:
    idle = LatencyModel(("a",), (Cell(("a",), {("float",): 5.0, ("int8",): 5.0 - 1e-4}),))
    assert solve(idle.problem({"a": 0.1})).having("int8") == set()


def test_layers_without_noise_stay_float() -> None:
    problem = MODEL.problem({"a": 0.1})
    assert list(problem.items["b"]) == ["float"]
    assert solve(problem).having("int8") == {"a"}


def test_explained() -> None:
    a, b = MODEL.explain({"a"}, {"a": 0.1, "b": 0.2})
    assert (a.layer, a.precision, a.float_us, a.int8_us, a.noise) == ("a", "int8", 5e6, 2e6, 0.1)
    assert a.border_us == b.border_us == pytest.approx((2.0 - 0.5) / 2 * 1e6)
    assert a.why == "float would cost 2000000 µs more"
    assert b.why.startswith("int8 would save 2500000 µs; its noise")
    assert MODEL.explain({"a"}, {"a": 0.1})[1].why == "not to be quantized"
    assert set(a.to_dict()) == {"layer", "precision", "float_us", "int8_us", "border_us", "noise", "why"}


def test_correction_moves_tables_towards_whole_runs_and_no_further_than_it_must() -> None:
    measured = tuple(Measured(frozenset(s), MODEL.predict(s) * 1.1, 3) for s in ("", "a", "b", "ab"))
    found = corrected(LatencyModel(MODEL.layers, TABLES, 1.0, measured))
    before = max(abs(MODEL.predict(m.int8) / m.seconds - 1) for m in measured)
    assert found.errors()["largest"] < before / 5  # times are trusted to 1 %, tables to 20 %
    same = tuple(Measured(frozenset(s), MODEL.predict(s), 3) for s in ("", "a"))
    untouched = corrected(LatencyModel(MODEL.layers, TABLES, 1.0, same))
    assert untouched.predict({"b"}) == pytest.approx(MODEL.predict({"b"}))


def test_one_more_measured_choice_refines() -> None:
    start = corrected(LatencyModel(MODEL.layers, TABLES, 1.0, (Measured(frozenset(), 11.0, 3),)))
    found = start.refined({"a", "b"}, 0.8)
    assert abs(found.predict({"a", "b"}) / 8.8 - 1) < abs(start.predict({"a", "b"}) / 8.8 - 1) / 2


def test_whole_runs_alone_give_a_model() -> None:
    layers = ("a", "b", "c")
    measured = tuple(
        Measured(frozenset(s), 10.0 - 2.0 * ("a" in s) - 1.0 * ("b" in s) + 1.0 * ("c" in s), 0)
        for s in ("", "a", "ab", "abc")
    )
    found = latency._from_totals(layers, measured)
    assert found.source == "totals"
    assert found.predict({"b"}) == pytest.approx(9.0)


def test_tables_are_means_of_what_was_seen() -> None:
    chosen = [frozenset(), frozenset("a"), frozenset("b"), frozenset("a")]
    cell = latency._cell(("a", "b"), [1.0, 3.0, 2.0, 5.0], chosen)
    assert cell.seconds["int8", "float"] == 4.0
    assert cell.seconds["float", "int8"] == 2.0
    assert cell.seconds["int8", "int8"] == pytest.approx(4.0)  # additive: 1 + 3 + 1, at most what was seen


def subjects_of(model: Model, chosen: list[frozenset[str]]) -> list[kernel_times.Subject]:
    found = [kernel_times.Subject(quantized(model, int8), int8) for int8 in chosen]
    kernel_times.run_all(found, feeds(1), budget=0.1, rounds=1)
    return found


def test_kernels_are_put_down_to_the_layers_around_them() -> None:
    model = network()
    places = Places(model, LAYERS)
    known = {*places.all(), *((layer,) for layer in LAYERS)}
    for subject in subjects_of(model, [frozenset(), frozenset(LAYERS), frozenset(LAYERS[:2])]):
        assert subject.matches is not None
        assert subject.optimized is not None
        groups = assign_kernels(places, LAYERS, subject.model, subject.matches, subject.optimized)
        kernels = [kernel.node.op_type for kernel in subject.matches.kernels]
        own = {group[0] for group, op in zip(groups, kernels, strict=True) if len(group) == 1 and "Conv" in op}
        assert own == set(LAYERS)
        assert all(group in known for group in groups), dict(zip(kernels, groups, strict=True))
        assert sum("Conv" in op for op in kernels) == 4


def test_all_kernel_time_is_told_of() -> None:
    model = network()
    places = Places(model, LAYERS)
    (subject,) = subjects_of(model, [frozenset(LAYERS[:2])])
    by_place = latency._by_place(places, LAYERS, subject)
    assert sum(s for s, _ in by_place.values()) == pytest.approx(sum(subject.kernels.values()))
    assert sum(n for _, n in by_place.values()) == len(subject.kernels)


def test_measured_model() -> None:
    model = network()
    made: list[frozenset[str]] = []

    def make(int8: frozenset[str]) -> Model:
        made.append(int8)
        return quantized(model, int8)

    said: list[str] = []
    found = latency.measure(model, make, LAYERS, feeds(), budget=0.5, progress=said.append)
    assert made[0] == frozenset()
    assert made[-1] == set(LAYERS)
    assert [m.int8 for m in found.measured] == made
    assert found.source == "kernels"
    assert {cell.layers for cell in found.cells} >= {(layer,) for layer in LAYERS}
    assert all(len(cell.seconds) == 2 ** len(cell.layers) for cell in found.cells)
    # the tables explain what they were learned from; noise of a busy machine is far below a factor of two
    assert found.errors()["mean"] < 0.5
    assert found.predict(()) > 0.0
    assert said


def test_no_feeds() -> None:
    with pytest.raises(DataError, match="no samples"):
        latency.measure(network(), lambda _: network(), LAYERS, [])


def test_no_layers() -> None:
    model = network(depth=1)
    found = latency.measure(model, lambda int8: quantized(model, int8), [], feeds(1), budget=0.1)
    assert found.predict(()) > 0.0
    assert solve(found.problem({})).picks == {}


def test_layers_that_become_several_nodes_are_found() -> None:
    weights = {f"w{n}": (RNG.standard_normal((64, 64)) / 8).astype(np.float32) for n in range(3)}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        onnx.helper.make_node("Relu", ["a"], ["b"], "relu"),
        onnx.helper.make_node("MatMul", ["b", "w1"], ["c"], "second"),
        onnx.helper.make_node("MatMul", ["b", "w2"], ["d"], "third"),
        onnx.helper.make_node("Add", ["c", "d"], ["y"], "sum"),
    ]
    shape = [8, 64]
    graph = onnx.helper.make_graph(
        nodes, "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    proto.ir_version = 8
    model = load(proto)
    names = ["first", "second", "third"]
    subject = kernel_times.Subject(Pipeline("quantize-dynamic").run(model).model, frozenset(names))
    kernel_times.run_all([subject], [{"x": np.ones(shape, np.float32)}], budget=0.05, rounds=1)
    assert subject.matches is not None
    assert subject.optimized is not None
    groups = assign_kernels(Places(model, names), names, subject.model, subject.matches, subject.optimized)
    found = dict(zip((k.node.op_type + k.node.name for k in subject.matches.kernels), groups, strict=True))
    assert {group[0] for kernel, group in found.items() if "MatMul" in kernel and len(group) == 1} == set(names), found
