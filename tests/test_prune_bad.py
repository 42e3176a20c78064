"""What `prune` says to input that gives it trouble: one clear answer each, and never a broken model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from graphopt.data import load_samples
from graphopt.errors import DataError, GateMissedError, GraphoptError, ModelError, SpecError
from graphopt.gradients import save_gradients
from graphopt.model import load
from graphopt.models.digits import demo_model
from graphopt.models.digits.task import calibration
from graphopt.optimizer import parse_pipeline
from graphopt.pruner import Pruned, explain, prune
from graphopt.quality import Bound
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def two_convs(middle: str = "r = Relu(a)", *, opset: int = 17, seed: int = 0) -> ModelProto:
    """Conv, something, Conv: 32 channels between them."""
    text = f"""
        <ir_version: 8, opset_import: ["": {opset}]>
        net (float[2, 4, 8, 8] x) => (float[2, 8, 8, 8] y)
        <float[32, 4, 3, 3] w1 = {{0}}, float[32] b1 = {{0}}, float[8, 32, 1, 1] w2 = {{0}}>
        {{ a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  {middle}  y = Conv (r, w2) }}
    """
    # the parser wants all values: initializers are put in by hand
    text = text.replace("<float[32, 4, 3, 3] w1 = {0}, float[32] b1 = {0}, float[8, 32, 1, 1] w2 = {0}>", "")
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    for name, shape in {"w1": (32, 4, 3, 3), "b1": (32,), "w2": (8, 32, 1, 1)}.items():
        values = np.asarray(rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])), np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def samples(count: int = 20) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 4, 8, 8)).astype(np.float32)} for _ in range(count)]


def pruned(source: Any, data: Any = None, **asked: Any) -> Pruned:
    """Return the result, which the checker and ORT accept, and which keeps the signature."""
    result = prune(source, data=data, **{"measure": False, **asked})
    proto = result.model.proto
    onnx.checker.check_model(proto, full_check=True)
    session = Session(result.model)
    original = load(source)
    assert session.input_names == [t.name for t in original.inputs]
    assert session.output_names == [t.name for t in original.outputs]
    return result


def test_the_good_model_of_these_tests_is_pruned() -> None:
    result = pruned(two_convs(), ratio=0.5)
    assert result.report.decision == "pruned"
    assert [(row.before, row.after) for row in result.report.groups if not row.why] == [(32, 16)]
    assert result.report.parameters_after < 0.6 * result.report.parameters_before


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ratio": -0.1}, "above 0 and up to 0.95"),
        ({"ratio": 1.0}, "above 0 and up to 0.95"),
        ({"ratio": float("nan")}, "above 0 and up to 0.95"),
        ({"target_macs": 0.0}, "the part that stays"),
        ({"target_macs": 1.2}, "the part that stays"),
        ({"target_params": 70.0}, "the part that stays"),
        ({"ratio": 0.3, "target_macs": 0.7}, "the same thing twice"),
        ({"ratio": 0.3, "criterion": "l3"}, "l3"),
        ({"ratio": 0.3, "scope": "everywhere"}, "scope"),
        ({"ratio": 0.3, "aggregate": "median"}, "median"),
        ({"ratio": 0.3, "reconstruct": "adam"}, "reconstruct"),
        ({"ratio": 0.3, "schedule": "cosine"}, "schedule"),
        ({"ratio": 0.3, "steps": 0}, "--steps"),
        ({"ratio": 0.3, "least": 0}, "--least"),
        ({"ratio": 0.3, "round_to": -4}, "--round-to"),
        ({"ratio": 0.3, "drop_blocks": -1}, "--drop-blocks"),
        ({"ratio": 0.3, "provider": "gpu"}, "unknown provider"),
        ({"target_latency": 0.7}, "measuring"),
        ({"ratio": 0.3, "criterion": "taylor"}, "needs gradients"),
        ({"ratio": 0.3, "gradients": "g.npz"}, "gradients rank channels by taylor"),
        ({"ratio": 0.3, "criterion": "random", "aggregate": "max"}, "as a whole"),
        ({"target_latency": 0.7, "measure": True, "steps": 3}, "one cut"),
        ({"target_latency": 0.7, "measure": True, "drop_blocks": 1}, "one cut"),
        ({"ratio": 0.3, "decisions": "d.json"}, "decisions say how much"),
    ],
)
def test_options_that_make_no_sense(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        prune(two_convs(), **{"measure": False, **asked})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "how much to cut was not said"),
        ({"ratio": 0.3, "reconstruct": "least-squares"}, "fitted on samples"),
        ({"ratio": 0.3, "criterion": "obs"}, "samples"),
        ({"ratio": 0.3, "bound": Bound(min_sqnr=20.0)}, "judged on samples"),
    ],
)
def test_samples_are_asked_for_where_they_are_needed(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        prune(two_convs(), **{"measure": False, **asked})


def test_a_target_that_cannot_be_reached_names_the_best_that_can() -> None:
    with pytest.raises(GateMissedError, match="can") as caught:
        prune(two_convs(), target_macs=0.06, round_to=16, measure=False)
    assert "%" in str(caught.value)


def test_a_cut_that_misses_its_bound_gives_nothing() -> None:
    with pytest.raises(GateMissedError, match="so much cannot be cut within the bound"):
        prune(two_convs(), data=samples(), target_macs=0.5, bound=Bound(min_sqnr=60.0), measure=False)


def test_a_bound_that_no_cut_keeps_gives_the_lossless_model_and_the_reason() -> None:
    result = pruned(two_convs(), samples(), bound=Bound(min_sqnr=100.0))
    assert result.report.decision == "lossless"
    assert "SQNR" in result.report.reason


def test_without_an_amount_the_most_is_cut_that_keeps_the_bound() -> None:
    result = pruned(two_convs(), samples(), bound=Bound(min_sqnr=12.0), round_to=1)
    assert result.report.decision == "pruned"
    assert result.report.quality is not None
    assert result.report.quality.score >= 12.0
    assert any(not tried.quality.ok for tried in result.report.tried if tried.quality)


def test_pruned_twice_does_nothing_more(tmp_path: Path) -> None:
    pruned(two_convs(), ratio=0.5).save(tmp_path / "once.onnx")
    again = pruned(tmp_path / "once.onnx", ratio=0.5, round_to=1)
    assert again.report.parameters_after == again.report.parameters_before
    assert "pruned before" in again.report.reason
    further = pruned(tmp_path / "once.onnx", ratio=0.75, round_to=1)
    assert [(row.before, row.after) for row in further.report.groups if not row.why] == [(16, 8)]


def test_a_model_with_nothing_to_cut_says_why() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        net (float[2, 8] x) => (float[2, 8] y) { a = Softmax(x)  y = Relu(a) }
    """
    result = pruned(onnx.parser.parse_model(text), ratio=0.5)
    assert result.report.decision == "lossless"
    assert "nothing can be cut" in result.report.reason


def test_a_quantized_model_is_refused() -> None:
    model = load(two_convs())
    int8 = parse_pipeline("quantize-static").run(model, samples=load_samples(samples(), model)).model
    with pytest.raises(ModelError, match="quantized already"):
        prune(int8, ratio=0.5, measure=False)


def test_samples_that_give_nothing_finite_are_refused() -> None:
    data = [{"x": np.full((2, 4, 8, 8), np.nan, np.float32)}] * 20
    with pytest.raises(DataError, match="no finite value"):
        prune(two_convs(), data=data, ratio=0.5, measure=False)


def test_names_that_are_none_and_options_that_are_none() -> None:
    with pytest.raises(SpecError, match="no channel group has such a name"):
        prune(two_convs(), ratio=0.5, only=("nothing*",), measure=False)
    with pytest.raises(SpecError, match="has no option 'ratoi'"):
        prune(two_convs(), ratoi=0.5)


def test_blocks_are_dropped_by_number_and_named() -> None:
    result = pruned(demo_model(), list(calibration()), drop_blocks=1)
    assert result.report.decision == "pruned"
    assert len(result.report.blocks) == 1
    assert (result.report.macs_after or 0) < (result.report.macs_before or 0)


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(GateMissedError, match="blocks cannot be dropped"):
        prune(demo_model(), data=list(calibration()), drop_blocks=99, measure=False)


def test_gradients_of_another_model_are_refused(tmp_path: Path) -> None:
    one, other = load(two_convs()), load(two_convs(seed=1))
    gradients = {name: np.ones(shape, np.float32) for name, shape in {"w1": (32, 4, 3, 3), "w2": (8, 32, 1, 1)}.items()}
    save_gradients(tmp_path / "g.npz", one, gradients)
    assert pruned(two_convs(), ratio=0.5, criterion="taylor", gradients=tmp_path / "g.npz").report.decision == "pruned"
    with pytest.raises(DataError, match="another model"):
        prune(other, ratio=0.5, criterion="taylor", gradients=tmp_path / "g.npz", measure=False)
    (tmp_path / "no.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        prune(one, ratio=0.5, criterion="taylor", gradients=tmp_path / "no.npz", measure=False)
    with pytest.raises(DataError, match="cannot be read"):
        prune(one, ratio=0.5, criterion="taylor", gradients=tmp_path / "missing.npz", measure=False)


def test_layers_in_branches_are_left_and_said() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        net (bool c, float[2, 4, 8, 8] x) => (float[2, 8, 8, 8] y) {
            y = If (c) <
                then_branch = one () => (float[2, 8, 8, 8] p) { a = Conv(x, w)  p = Relu(a) },
                else_branch = two () => (float[2, 8, 8, 8] q) { b = Conv(x, w)  q = Sigmoid(b) }
            >
        }
    """
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(RNG.standard_normal((8, 4, 1, 1)).astype(np.float32), "w")
    )
    result = pruned(proto, ratio=0.5)
    assert result.report.decision == "lossless"
    assert explain(proto).frozen


def test_unknown_operators_freeze_and_are_named() -> None:
    proto = two_convs("s = Softmax <axis = 1> (a)  r = Relu(s)")
    report = explain(proto)
    assert [row for row in report.groups if "Softmax" in row.why]


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pruned(demo_model(), list(calibration()), target_macs=0.7, seed=3).save(tmp_path / f"{name}.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_decisions_give_the_same_bytes_again(tmp_path: Path) -> None:
    data = list(calibration())
    first = pruned(demo_model(), data, target_macs=0.7)
    first.save(tmp_path / "first.onnx")
    from graphopt.decisions import save_decisions

    save_decisions(tmp_path / "d.json", first.report.decisions or {})
    pruned(demo_model(), data, decisions=tmp_path / "d.json").save(tmp_path / "second.onnx")
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_samples_that_do_not_fit() -> None:
    with pytest.raises(GraphoptError):
        prune(two_convs(), data=[{"z": np.zeros((2, 4, 8, 8), np.float32)}], ratio=0.5, measure=False)
