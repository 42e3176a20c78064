"""Noise at the output, layer by layer: known noise is found, powers add up, what is not finite is left out."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from graphopt import sensitivity
from graphopt.errors import DataError
from graphopt.model import Model, load
from graphopt.sensitivity import Sensitivity, decibels, measure, noise_of, power

LAYERS = ["a", "b", "c"]
GAINS = {"a": 0.01, "b": 0.1, "c": 0.03}


def network(noisy: frozenset[str] = frozenset(), *, broken: str = "") -> Model:
    """x, with an independent pattern of known power added for each noisy layer."""
    rng = np.random.default_rng(0)
    nodes, tensors, last = [], [], "x"
    for name in LAYERS:
        pattern = (GAINS[name] * rng.standard_normal(4096)).astype(np.float32)
        values = pattern * (name in noisy)
        if name == broken and name in noisy:
            values = np.full(4096, np.inf, np.float32)
        tensors.append(onnx.numpy_helper.from_array(values.astype(np.float32), f"{name}_noise"))
        nodes.append(onnx.helper.make_node("Add", [last, f"{name}_noise"], [f"{name}_out"], name))
        last = f"{name}_out"
    graph = onnx.helper.make_graph(
        nodes, "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4096])],
        [onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, ["n", 4096])],
        tensors,
    )  # fmt: skip
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    proto.ir_version = 8
    return load(proto)


def feeds(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 4096)).astype(np.float32)} for _ in range(count)]


def test_known_noise_is_found_and_adds_up() -> None:
    found = measure(network(), network, LAYERS, feeds())
    for name in LAYERS:
        assert found[name] == pytest.approx(GAINS[name] ** 2, rel=0.1)  # 4096 draws: 2 % off, and the signal's 1 %
        assert found.sqnr(name) == pytest.approx(-20 * math.log10(GAINS[name]), abs=0.5)
    assert found.additivity == pytest.approx(1.0, abs=0.1)  # the patterns are nearly orthogonal
    assert found.samples == 3
    assert [row["layer"] for row in found.table()] == ["b", "c", "a"]
    assert sum(row["share"] for row in found.table()) == pytest.approx(1.0)


def test_it_is_a_mapping_of_all_layers() -> None:
    found = measure(network(), network, LAYERS, feeds())
    assert list(found) == LAYERS
    assert len(found) == 3
    assert dict(found) == dict(found.noise)
    assert found.to_dict()["broken"] == []


def test_layers_that_break_the_output_are_left_out() -> None:
    found = measure(network(), lambda int8: network(int8, broken="b"), LAYERS, feeds())
    assert set(found) == {"a", "c"}
    assert found.broken == ("b",)
    assert not math.isfinite(found.together)


def test_neighbours_share_where_time_is_short() -> None:
    made: list[frozenset[str]] = []

    def make(int8: frozenset[str]) -> Model:
        made.append(int8)
        return network(int8)

    found = measure(network(), make, LAYERS, feeds(), budget=0.0)
    assert made == [frozenset(LAYERS), {"a"}, {"b", "c"}]
    assert found.groups == (("b", "c"),)
    assert found["b"] == found["c"] == pytest.approx((GAINS["b"] ** 2 + GAINS["c"] ** 2) / 2, rel=0.1)


@pytest.mark.parametrize(
    ("layers", "left", "done", "size"),
    [(5, 10.0, 0, 1), (9, 9.0, 1, 1), (9, 4.5, 11, 1), (9, 5.0, 5, 2), (9, -1.0, 3, 9), (1, 0.0, 3, 1)],
)
def test_groups_fill_the_budget(layers: int, left: float, done: int, size: int) -> None:
    assert sensitivity._group_size(layers, left, done, budget=10.0) == size


def test_limit_of_samples() -> None:
    assert measure(network(), network, LAYERS, feeds(5), limit=2).samples == 2


def test_equal_models_have_no_noise() -> None:
    assert noise_of(network(), network(), feeds()) == 0.0


def test_outputs_weigh_the_same_whatever_their_size() -> None:
    proto, noisy = network().emit(), network(frozenset("b")).emit()
    for one in (proto, noisy):
        one.graph.node.append(onnx.helper.make_node("Identity", ["x"], ["copy"], "copy"))
        one.graph.output.append(onnx.helper.make_tensor_value_info("copy", onnx.TensorProto.FLOAT, ["n", 4096]))
    alone = noise_of(network(), network(frozenset("b")), feeds())
    assert noise_of(load(proto), load(noisy), feeds()) == pytest.approx(alone / 2)


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no samples"):
        measure(network(), network, LAYERS, [])


def test_no_float_outputs() -> None:
    proto = network().emit()
    proto.graph.node.append(onnx.helper.make_node("ArgMax", ["c_out"], ["best"], "best", axis=1))
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("best", onnx.TensorProto.INT64, None))
    with pytest.raises(DataError, match="float outputs"):
        measure(load(proto), lambda _: load(proto), LAYERS, feeds())


def test_no_layers() -> None:
    found = measure(network(), network, [], feeds())
    assert dict(found) == {}
    assert math.isnan(found.additivity)


def test_decibels() -> None:
    assert decibels(0.01) == pytest.approx(20.0)
    assert power(30.0) == pytest.approx(0.001)
    assert decibels(0.0) == math.inf
    assert math.isnan(Sensitivity({"a": 0.1}).additivity)
