"""Comparison of outputs, gates, own difference, signatures, task metric, providers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.compare import Comparison, Tolerance, compare_outputs, floor_tolerance, looks_like_logits
from graphopt.data import load_samples
from graphopt.errors import DataError, GraphoptError, ProviderError, SpecError
from graphopt.metric import Drop, evaluate_pair
from graphopt.model import load
from graphopt.models import zoo
from graphopt.models.digits import demo_data, demo_model
from graphopt.validate import EXACT, Reference, own_difference, validate

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Array = np.ndarray[Any, Any]


def row(a: Any, b: Any, **options: Any) -> dict[str, Any]:
    (found,) = compare_outputs({"y": a}, {"y": b}, **options)
    return found


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class TestCompare:
    def test_relative_error_is_against_the_largest_value(self) -> None:
        """Float64 arithmetic on exact numbers: equal to 1e-12."""
        found = row(np.array([1.0, -4.0]), np.array([1.0, -3.0]), rtol=0.2)
        assert found["relative"] == pytest.approx(0.25, rel=1e-12)
        assert found["max_rel"] == pytest.approx(0.25, rel=1e-12)
        assert found["tolerance"] == 0.2
        assert not found["ok"]
        assert "2.50e-01 of the largest value, 2.00e-01 allowed, worst in sample 0 at [1]" in found["failures"][0]
        assert (found["worst_reference"], found["worst_candidate"]) == (-4.0, -3.0)

    def test_cosine_and_sqnr(self) -> None:
        """Noise of a hundredth of the amplitude is 40 dB; the definition is exact, so 1e-6 is room enough."""
        a = noise(1000).astype(np.float64)
        found = row(a, a * 1.01)
        assert found["cosine"] == pytest.approx(1.0, abs=1e-6)
        assert found["sqnr_db"] == pytest.approx(40.0, abs=1e-6)
        assert row(a, a)["sqnr_db"] is None

    def test_a_small_channel_beside_a_large_one(self) -> None:
        a = np.concatenate([500 * noise(100, 4), noise(100, 1)], axis=1)
        b = a.copy()
        b[:, 4] *= 0.9
        found = row(a, b, rtol=1e-3)
        assert found["relative"] < 1e-3
        assert "in a slice" in found["failures"][0]

    def test_probabilities_are_compared_by_logarithm(self) -> None:
        a = np.array([[0.9999, 1e-4, 1e-9]])
        b = np.array([[0.9999, 1e-4, 2e-9]])
        assert row(a, b)["ok"]
        assert not row(a, b, probabilities={"y": "softmax"})["ok"]
        assert row(a, b, probabilities={"y": "sigmoid"})["ok"]  # below what ORT's sigmoids are exact to

    def test_a_sigmoid_near_one_is_compared_by_its_complement(self) -> None:
        found = row(np.array([0.990]), np.array([0.991]), rtol=5e-3, probabilities={"y": "sigmoid"})
        assert found["relative"] < 5e-3
        assert not found["ok"]

    @pytest.mark.parametrize(
        ("a", "b", "ok"),
        [
            ([0.0, 0.0], [0.0, 0.0], True),
            ([0.0, 0.0], [1e-8, 0.0], True),
            ([0.0, 0.0], [1e-3, 0.0], False),
            ([np.nan, 1.0], [np.nan, 1.0], True),
            ([np.nan, 1.0], [1.0, 1.0], False),
            ([np.inf, 1.0], [np.inf, 1.0], True),
            ([np.inf, 1.0], [-np.inf, 1.0], False),
            ([1.0, 1.0], [1.0, np.nan], False),
            ([], [], True),
        ],
    )
    def test_zero_nan_infinity_and_nothing(self, a: list[float], b: list[float], ok: bool) -> None:
        found = row(np.array(a, np.float32), np.array(b, np.float32))
        assert found["ok"] is ok
        json.dumps(found, allow_nan=False)

    def test_shape_and_type(self) -> None:
        assert "shape [1, 2] instead of [2]" in row(np.ones(2), np.ones((1, 2)))["failures"][0]
        assert "type float32 instead of float64" in row(np.ones(2), np.ones(2, np.float32))["failures"][0]

    def test_exact_types(self) -> None:
        found = row(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
        assert found["mismatch"] == 0.25
        assert "1 of 4 values differ, none allowed" in found["failures"][0]
        assert row(np.array(["a"], object), np.array(["a"], object))["ok"]
        assert not row(np.array([True]), np.array([False]))["ok"]

    def test_sequences_maps_and_none(self) -> None:
        a = {"s": [np.ones(2), np.ones(3)], "m": [{1: 0.5, 2: 0.25}], "n": None}
        assert all(r["ok"] for r in compare_outputs(a, a))
        b = {"s": [np.ones(2)], "m": [{1: 0.5, 3: 0.25}], "n": np.ones(1)}
        wrong = {r["output"] for r in compare_outputs(a, b) if not r["ok"]}
        assert wrong == {"s.length", "s[1]", "m[0].keys", "m[0][2]", "m[0][3]", "n"}

    def test_top1(self) -> None:
        a = np.array([[1.0, 2.0], [3.0, 3.0], [5.0, 4.0]])
        b = np.array([[2.0, 1.0], [3.0, 4.0], [5.0, 4.0]])
        assert row(a, b)["top1"] == pytest.approx(2 / 3)  # the tie in the second row is no error
        assert looks_like_logits(np.ones((1, 1000, 1, 1)))
        assert not looks_like_logits(np.ones((1, 3, 8, 8)))
        assert row(a[:, :, None, None], b[:, :, None, None])["top1"] == pytest.approx(2 / 3)

    def test_the_worst_sample_is_kept(self) -> None:
        comparison = Comparison(["y"])
        for sample, error in enumerate((0.0, 0.5, 0.1)):
            comparison.add(sample, {"y": np.ones((2, 2))}, {"y": np.array([[1, 1], [1 + error, 1]])})
        (found,) = comparison.rows(Tolerance(1e-3))
        assert (found["samples"], found["worst_sample"], found["worst_index"]) == (3, 1, [1, 0])

    def test_no_gate(self) -> None:
        comparison = Comparison(["y"])
        comparison.add(0, {"y": np.ones(2)}, {"y": -np.ones(2)})
        assert comparison.rows(Tolerance(None))[0]["ok"]

    def test_atol(self) -> None:
        a, b = np.array([1e-6]), np.array([2e-6])
        assert not row(a, b)["ok"]
        assert row(a, b, atol=1e-5)["ok"]


def linear(weight: Array, *, op: str = "", name: str = "y", batch: Any = "N") -> onnx.ModelProto:
    """Return x @ weight, an operator after it where given."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t" if op else name], name="matmul")]
    if op:
        nodes.append(helper.make_node(op, ["t"], [name], name="last"))
    kind = INT64 if op == "ArgMax" else FLOAT
    graph = helper.make_graph(
        nodes, "test", [helper.make_tensor_value_info("x", FLOAT, [batch, weight.shape[0]])],
        [helper.make_tensor_value_info(name, kind, None)], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


WEIGHT = noise(16, 8, seed=1)


class TestValidate:
    def test_equal(self) -> None:
        result = validate(linear(WEIGHT), linear(WEIGHT))
        assert result.ok
        assert result.random
        assert result.count == 2
        assert {r["optimization"] for r in result.rows} == {"off", "all"}
        assert result.worst == 0
        json.dumps(result.to_dict(), allow_nan=False)
        assert [set(line) >= {"output", "relative", "tolerance"} for line in result.table()] == [True, True]

    @pytest.mark.parametrize(("error", "ok"), [(1e-7, True), (5e-5, False), (1e-2, False)])
    def test_default_tolerance(self, error: float, ok: bool) -> None:
        """MatMul is the same with optimisations off and on, so the tolerance is the least: 1e-5."""
        other = (WEIGHT * (1 + error)).astype(np.float32)
        result = validate(linear(WEIGHT), linear(other))
        assert result.ok is ok
        assert {r["tolerance"] for r in result.rows} == {EXACT}

    def test_tolerances_that_are_given_hold(self) -> None:
        other = (WEIGHT * 1.01).astype(np.float32)
        assert validate(linear(WEIGHT), linear(other), rtol=0.02).ok
        assert not validate(linear(WEIGHT), linear(other), rtol=0.005).ok
        assert validate(linear(WEIGHT), linear(other), atol=10.0).ok
        assert validate(linear(WEIGHT), linear(-WEIGHT), exactness="lossy").ok

    def test_half_precision_widens_the_tolerance(self) -> None:
        def half(weight: Array) -> onnx.ModelProto:
            proto = linear(weight.astype(np.float16))
            for info in (proto.graph.input[0], proto.graph.output[0]):
                info.type.tensor_type.elem_type = TensorProto.FLOAT16
            return proto

        result = validate(half(WEIGHT), half(WEIGHT * np.float32(1.0005)))
        assert result.ok
        assert min(r["tolerance"] for r in result.rows) > 1e-3
        assert not validate(half(WEIGHT), half(WEIGHT * np.float32(1.05))).ok

    def test_indices_must_be_equal(self) -> None:
        assert validate(linear(WEIGHT, op="ArgMax"), linear(WEIGHT, op="ArgMax")).ok
        result = validate(linear(WEIGHT, op="ArgMax"), linear(WEIGHT[:, ::-1].copy(), op="ArgMax"))
        assert "values differ, none allowed" in result.failures[0]

    @pytest.mark.parametrize(
        ("other", "what"),
        [
            (linear(WEIGHT, name="z"), "output 'y' is missing"),
            (linear(noise(15, 8)), "input is x: float32[N,15] instead of x: float32[N,16]"),
            (linear(WEIGHT, batch=1), "input is x: float32[1,16] instead of x: float32[N,16]"),
        ],
    )
    def test_signatures(self, other: onnx.ModelProto, what: str) -> None:
        result = validate(linear(WEIGHT), other)
        assert not result.ok
        assert what in result.failures

    def test_a_candidate_that_fails_on_a_sample(self) -> None:
        """The second random feed has another number of rows, which a fixed reshape inside does not take."""
        nodes = [helper.make_node("Reshape", ["x", "s"], ["t"]), helper.make_node("MatMul", ["t", "w"], ["y"])]
        other = linear(WEIGHT)
        del other.graph.node[:]
        other.graph.node.extend(nodes)
        other.graph.initializer.append(numpy_helper.from_array(np.array([1, 16]), "s"))
        result = validate(linear(WEIGHT), other)
        assert any(f.startswith("sample 1, optimisation off: the candidate fails") for f in result.failures)

    def test_samples_that_the_original_cannot_take(self) -> None:
        with pytest.raises(DataError, match="shape"):
            validate(linear(WEIGHT), linear(WEIGHT), [{"x": noise(2, 7)}])

    def test_nothing_finite_is_said(self) -> None:
        samples = [{"x": np.full((1, 16), np.nan, np.float32)}]
        result = validate(linear(WEIGHT), linear(WEIGHT), samples)
        assert result.failures == ["no output has a finite value on these samples: nothing was compared"]
        assert result.notes == ["output 'y' has no finite value on these samples: nothing was compared"]

    def test_location(self) -> None:
        other = WEIGHT.copy()
        other[3] = 0
        result = validate(linear(WEIGHT, op="Tanh"), linear(other, op="Tanh"), locate=True)
        assert result.location is not None
        assert result.location.node == "matmul"
        assert result.to_dict()["location"]["node"] == "matmul"
        assert validate(linear(WEIGHT), linear(WEIGHT), locate=True).location is None

    @pytest.mark.zoo
    def test_own_difference_widens_the_gate(self) -> None:
        """PP-OCR's detector differs from itself; a change of that size passes, one a hundred times larger does not."""
        original = load(zoo.fetch("ppocr-det"))
        samples = load_samples(None, original, shapes={"x": (1, 3, 64, 64)})
        own = max(own_difference(original, samples).values())
        result = Reference(original, samples).check(original)
        assert result.ok
        assert all(r["tolerance"] == max(EXACT, 3 * own) for r in result.rows)

    @pytest.mark.zoo
    @pytest.mark.parametrize("name", ["ppocr-rec", "ppocr-cls", "silero-vad", "magika", "squeezenet"])
    def test_models_equal_themselves(self, name: str) -> None:
        path = zoo.fetch(name)
        result = validate(path, path)
        assert result.ok
        assert result.worst == 0


class TestReference:
    def test_checks_many_candidates_with_one_run_of_the_original(self) -> None:
        reference = Reference(linear(WEIGHT))
        assert reference.check(linear(WEIGHT)).ok
        reference._sessions.clear()
        reference.session = None  # type: ignore[assignment,method-assign]
        assert not reference.check(linear(-WEIGHT)).ok
        assert reference.check(linear(-WEIGHT), "lossy").ok
        assert reference.count == 2

    def test_a_candidate_that_does_not_load(self) -> None:
        broken = linear(WEIGHT)
        broken.graph.node[0].domain = "nowhere"
        broken.opset_import.append(helper.make_opsetid("nowhere", 1))
        result = Reference(linear(WEIGHT)).check(broken)
        assert "does not load" in result.failures[0]

    def test_limit(self) -> None:
        samples = load_samples([{"x": noise(1, 16)}] * 5, load(linear(WEIGHT)))
        assert Reference(linear(WEIGHT), samples, limit=3).check(linear(WEIGHT)).count == 3


def accuracy(predict: Any) -> Array:
    with np.load(demo_data()) as data:
        logits = predict({"image": data["image"]})["logits"]
        return np.asarray(logits.argmax(1) == data["label"], np.float64)


class TestMetric:
    def test_the_same_model_drops_nothing(self) -> None:
        result = validate(demo_model(), demo_model(), evaluate=accuracy, max_drop=0)
        assert result.ok
        assert result.evaluation is not None
        assert (result.evaluation.drop, result.evaluation.items) == (0.0, 600)
        assert result.evaluation.interval == (0.0, 0.0)
        assert result.evaluation.reference > 0.9

    def test_the_metric_judges_in_place_of_the_outputs(self) -> None:
        """All scale factors of the last layer doubled: other logits, the same classes."""
        other = onnx.load(demo_model())
        last = next(n for n in reversed(other.graph.node) if n.op_type == "Gemm")
        last.attribute.append(helper.make_attribute("beta", 1.0)) if not last.attribute else None
        for attribute in last.attribute:
            if attribute.name in ("alpha", "beta"):
                attribute.f = 2.0
        assert not validate(demo_model(), other).ok
        assert validate(demo_model(), other, evaluate=accuracy, max_drop="1%").ok
        assert not validate(demo_model(), other, evaluate=accuracy).ok
        assert not validate(demo_model(), other, evaluate=accuracy, max_drop="1%", rtol=1e-3).ok

    def test_a_drop_fails(self) -> None:
        other = onnx.load(demo_model())
        weight = next(i for i in other.graph.initializer if i.name == "classifier.3.weight")
        values = numpy_helper.to_array(weight).copy()
        values[0] = 0
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        result = validate(demo_model(), other, evaluate=accuracy, max_drop=0.01)
        assert not result.ok
        assert "the metric falls from" in result.failures[0]
        assert result.evaluation is not None
        low, high = result.evaluation.interval or (0, 0)
        assert 0.01 < low < result.evaluation.drop < high < 0.2

    @pytest.mark.parametrize(
        ("text", "reference", "allowed"), [("0.01", 0.5, 0.01), ("1%", 0.5, 0.005), (2, 0.5, 2.0), ("10 %", -3.0, 0.3)]
    )
    def test_drops(self, text: str | float, reference: float, allowed: float) -> None:
        assert Drop.parse(text).allowed(reference) == pytest.approx(allowed, rel=1e-12)

    @pytest.mark.parametrize("text", ["much", "-1", "nan", "%"])
    def test_drops_that_are_none(self, text: str) -> None:
        with pytest.raises(SpecError):
            Drop.parse(text)

    def test_a_single_number(self) -> None:
        found = evaluate_pair(lambda p: p({})["v"], "f", lambda _: {"v": 0.9}, lambda _: {"v": 0.8}, max_drop=0.1)
        assert found.ok
        assert found.items is None
        assert found.interval is None
        assert math.isclose(found.drop, 0.1)

    @pytest.mark.parametrize("value", ["text", np.ones((2, 2)), np.nan, [], None])
    def test_functions_that_return_something_else(self, value: Any) -> None:
        with pytest.raises(DataError):
            evaluate_pair(lambda _: value, "f", dict, dict)

    def test_from_a_file_with_the_error_located(self, tmp_path: Path) -> None:
        (tmp_path / "task.py").write_text("def f(predict):\n    return predict({})['nothing']\n")
        with pytest.raises(GraphoptError) as error:
            validate(linear(WEIGHT), linear(WEIGHT), evaluate=f"{tmp_path}/task.py:f")
        assert "input 'x' is not fed" in str(error.value)


class TestProviders:
    def test_a_missing_provider(self) -> None:
        with pytest.raises(ProviderError, match="not in the installed"):
            validate(linear(WEIGHT), linear(WEIGHT), other_provider="cuda")

    def test_which_provider_ran_what(self) -> None:
        result = validate(linear(WEIGHT, op="Tanh"), linear(WEIGHT, op="Tanh"), other_provider="cpu")
        assert result.ok
        assert result.providers == {"a": {"CPUExecutionProvider": 2}, "b": {"CPUExecutionProvider": 2}}
        assert set(result.node_providers["a"]) == {"matmul", "last"}


def test_floor_tolerance() -> None:
    assert floor_tolerance(1e-5) == Tolerance(1e-5, slices=30 * 1e-5, log=1e-4)


def test_empty_outputs_agree() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }
    """)
    assert validate(model, model, [{"x": np.zeros((0, 4), np.float32)}]).ok


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(SpecError, match="negative"):
        validate(demo_model(), demo_model(), rtol=-1.0)
