"""What a lossy result may cost: kinds of outputs, numbers against hand-made ones, bounds, reference kept and split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import quality
from graphopt.errors import DataError, SpecError
from graphopt.metric import Evaluation
from graphopt.model import Model, load
from graphopt.output_quality import LARGEST_SCORE, Limits, OutputQuality, output_kind
from graphopt.quality import DEFAULTS, Bound, QualityCheck, split
from graphopt.samples import Samples

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((8, 5)).astype(np.float32)


def model(ops: str, weight: Any = WEIGHT, shape: tuple[int | str, ...] = ("n", 8)) -> Model:
    """A chain of operators on `x`; MatMul reads `w`."""
    nodes, before = [], "x"
    for i, op in enumerate(ops.split()):
        inputs = [before, "w"] if op == "MatMul" else [before]
        nodes.append(helper.make_node(op, inputs, [f"t{i}"]))
        before = f"t{i}"
    kind = TensorProto.INT64 if ops.endswith("ArgMax") else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(before, kind, None)], [numpy_helper.from_array(np.asarray(weight), "w")],
    )  # fmt: skip
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def feeds(count: int, rows: int = 4, seed: int = 1) -> Samples:
    rng = np.random.default_rng(seed)
    made = [{"x": rng.standard_normal((rows, 8)).astype(np.float32)} for _ in range(count)]
    return Samples(lambda: iter(made), f"{count} feeds")


def noisy(part: float, seed: int = 2) -> Any:
    rng = np.random.default_rng(seed)
    return (WEIGHT * (1 + part * rng.standard_normal(WEIGHT.shape))).astype(np.float32)


@pytest.mark.parametrize(
    ("ops", "kind"),
    [
        ("MatMul", "classes"),
        ("MatMul Softmax", "classes"),
        ("MatMul Sigmoid", "mask"),
        ("MatMul LpNormalization", "embedding"),
        ("MatMul Tanh", "embedding"),
        ("MatMul ArgMax", "exact"),
    ],
)
def test_kinds_of_outputs(ops: str, kind: str) -> None:
    reference = model(ops)
    result = QualityCheck(reference, feeds(2)).of(reference)
    assert [output.kind for output in result.outputs] == [kind]
    assert result.ok
    assert result.score == LARGEST_SCORE
    assert result.samples == 2


def test_a_picture_is_values() -> None:
    assert output_kind(model("MatMul"), "t0", np.zeros((1, 3, 8, 8), np.float32)) == "values"


def test_numbers_are_those_of_their_definitions() -> None:
    reference, candidate, samples = model("MatMul"), model("MatMul", noisy(0.2)), feeds(3)
    a = np.concatenate([feed["x"] @ WEIGHT for feed in samples]).astype(float)
    b = np.concatenate([feed["x"] @ noisy(0.2) for feed in samples]).astype(float)
    (output,) = QualityCheck(reference, samples).of(candidate).outputs
    assert output.sqnr == pytest.approx(10 * math.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-3)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert output.cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert output.agreement == np.mean(a.argmax(1) == b.argmax(1))
    assert output.rows == output.decisions == 12


@pytest.mark.parametrize("ops", ["MatMul", "MatMul Softmax"])
def test_another_class_costs_its_probability(ops: str) -> None:
    reference, candidate, samples = model(ops), model(ops, noisy(0.5)), feeds(5)
    scores = np.concatenate([feed["x"] @ WEIGHT for feed in samples]).astype(float)
    others = np.concatenate([feed["x"] @ noisy(0.5) for feed in samples]).argmax(1)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    (output,) = QualityCheck(reference, samples).of(candidate).outputs
    lost = p.max(1) - p[np.arange(len(p)), others]
    assert lost.mean() > 0
    assert output.loss == pytest.approx(lost.mean(), rel=1e-4)
    limit = OutputQuality("y", "classes", Limits(loss=0.01))
    limit.add(np.array([[0.6, 0.4]], np.float32), np.array([[0.4, 0.6]], np.float32))
    assert limit.failures == ["output 'y': expected loss of accuracy 0.2, at most 0.01 accepted"]


def test_masks_overlap() -> None:
    output = OutputQuality("m", "mask", Limits(agreement=0.7))
    a, b = np.full((1, 1, 4, 4), 0.1, np.float32), np.full((1, 1, 4, 4), 0.2, np.float32)
    output.add(a, b)
    assert output.agreement is None  # nothing above 0.5 on either side decides nothing
    a[..., :2], b[..., 1:3] = 0.9, 0.8
    output.add(a, b)
    assert output.agreement == pytest.approx(4 / 12)
    assert "overlap" in output.failures[0]


def test_worse_candidates_score_less() -> None:
    check = QualityCheck(model("MatMul"), feeds(4))
    scores = [check.of(model("MatMul", noisy(part))).score for part in (0.001, 0.01, 0.1, 0.5)]
    assert scores == sorted(scores, reverse=True)
    assert scores[1] - scores[2] == pytest.approx(20, abs=1)  # ten times the noise is 20 dB
    assert check.of(model("MatMul", noisy(0.1))).error == pytest.approx(10 ** (-scores[2] / 10))


@pytest.mark.parametrize(
    ("bound", "failure"),
    [
        (Bound(), "SQNR"),
        (Bound(min_sqnr=30), "SQNR"),
        (Bound(min_cosine=0.999), "mean cosine"),
        (Bound(min_agreement=0.999), "largest score"),
        (Bound(min_sqnr=-50), None),
        (Bound(metric=lambda _: 1.0), None),
        (Bound(metric=lambda _: 1.0, min_sqnr=30), "SQNR"),
    ],
)
def test_bounds(bound: Bound, failure: str | None) -> None:
    result = QualityCheck(model("MatMul"), feeds(8), bound).of(model("MatMul", noisy(0.5)))
    assert result.ok == (failure is None)
    if failure:
        assert all("output 't0'" in what for what in result.failures)
        assert any(failure in what for what in result.failures)


def test_metric_is_paired_and_the_reference_runs_once() -> None:
    x = np.random.default_rng(3).standard_normal((200, 8)).astype(np.float32)
    labels = (x @ WEIGHT).argmax(1)
    calls = []

    def right(predict: Callable[..., Any]) -> Any:
        calls.append(predict)
        return predict({"x": x})["t0"].argmax(1) == labels

    check = QualityCheck(model("MatMul"), feeds(4), Bound(metric=right, max_drop=0.01))
    bad, good = check.of(model("MatMul", noisy(0.3))), check.of(model("MatMul", noisy(1e-4)))
    assert good.ok
    assert len(calls) == 3  # the reference and two candidates
    assert bad.evaluation is not None
    assert bad.evaluation.interval is not None
    assert bad.evaluation.interval[0] <= bad.evaluation.drop <= bad.evaluation.interval[1]
    assert bad.failures == [bad.evaluation.failure()]
    assert check.of(model("MatMul", noisy(0.3)), quick=True).evaluation is None
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("drop", "interval", "allowed", "sure"),
    [
        (0.004, (0.001, 0.007), 0.01, True),
        (0.009, (0.006, 0.012), 0.01, False),  # a standard error of 0.0015: 0.0085 at most
        (0.0, (-0.02, 0.02), 0.005, True),  # no more than no drop is asked
        (0.001, (-0.02, 0.02), 0.005, False),
        (-0.002, (-0.004, 0.0), -0.001, True),
    ],
)
def test_a_metric_keeps_a_standard_error_from_its_bound(
    drop: float, interval: tuple[float, float], allowed: float, sure: bool
) -> None:
    found = Evaluation(0.9, 0.9 - drop, drop, allowed, 500, interval, drop <= allowed)
    assert found.sure is sure
    assert Evaluation(0.9, 0.9 - drop, drop, allowed, None, None, drop <= allowed).sure


def test_quick_looks_run_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "QUICK", 3)
    check = QualityCheck(model("MatMul"), feeds(9), limit=7)
    assert check.of(model("MatMul"), quick=True).samples == 3
    assert check.of(model("MatMul")).samples == 7


@pytest.mark.parametrize(("memory", "disk"), [(1 << 20, 0), (200, 1 << 20), (200, 200), (0, 0)])
def test_reference_outputs_are_the_same_wherever_they_are_kept(
    memory: int, disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = QualityCheck(model("MatMul"), feeds(9)).of(model("MatMul", noisy(0.1))).to_dict()
    monkeypatch.setattr(quality, "MEMORY_BYTES", memory)
    monkeypatch.setattr(quality, "DISK_BYTES", disk)
    check = QualityCheck(model("MatMul"), feeds(9))
    for _ in range(2):
        assert check.of(model("MatMul", noisy(0.1))).to_dict() == expected
    kept = check._kept
    assert len(kept._memory) == min(9, memory // 80)  # 4 rows of 5 floats
    assert len(kept._disk) == min(9 - len(kept._memory), disk // 80)


def test_what_cannot_be_run_fails_in_words() -> None:
    check = QualityCheck(model("MatMul"), feeds(2))
    for candidate, words in (
        (model("MatMul Softmax"), "output 't0' is missing"),
        (model("MatMul", np.zeros((9, 5), np.float32)), "does not load"),
        (model("MatMul", np.zeros((9, 5), np.float32), ("n", "m")), "sample 0"),
        (model("MatMul", np.zeros((8, 6), np.float32)), "float32[4, 6] instead of float32[4, 5]"),
        (model("MatMul", np.full((8, 5), np.nan, np.float32)), "NaN or infinite on one side only"),
    ):
        result = check.of(candidate)
        assert not result.ok
        assert words in result.failures[0]
        assert result.score <= 0


def test_equal_infinities_are_no_failure() -> None:
    same = model("MatMul", np.full((8, 5), np.inf, np.float32))
    assert QualityCheck(same, feeds(2), Bound(min_sqnr=10)).of(same).ok


def test_no_samples() -> None:
    with pytest.raises(DataError, match="empty"):
        QualityCheck(model("MatMul"), feeds(0)).of(model("MatMul"))


@pytest.mark.parametrize(
    "wrong",
    [{"min_sqnr": math.nan}, {"min_cosine": 1.5}, {"min_agreement": -0.1}, {"max_loss": 2}, {"max_drop": 0.1},
     {"metric": len, "max_drop": "much"}],
)  # fmt: skip
def test_wrong_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        Bound(**wrong)


def test_defaults_give_way_to_what_is_named() -> None:
    assert Bound().limits("classes") == DEFAULTS["classes"]
    assert Bound(min_cosine=0.9).limits("classes") == Limits(cosine=0.9)
    assert Bound(metric=len).limits("values") == Limits()
    assert Bound(metric=len).to_dict()["metric"] == "len"


@pytest.mark.parametrize("count", [16, 17, 101])
def test_parts_are_disjoint_and_complete(count: int) -> None:
    samples = Samples(lambda: iter([{"i": i} for i in range(count)]), "numbers")
    parts = {part: [feed["i"] for feed in split(samples, part, seed=5)] for part in ("calibration", "judging")}
    assert sorted(parts["calibration"] + parts["judging"]) == list(range(count))
    assert abs(len(parts["calibration"]) - len(parts["judging"])) <= 1
    assert parts["calibration"] != [feed["i"] for feed in split(samples, "calibration", seed=6)]


def test_few_samples_do_both() -> None:
    samples = Samples(lambda: iter([{"i": i} for i in range(15)]), "numbers")
    for part in ("calibration", "judging"):
        both = split(samples, part)
        assert len(list(both)) == 15
        assert "too few" in both.description
