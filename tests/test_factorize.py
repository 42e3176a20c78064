"""`factorize` end to end: ranks within the bound, on a trained classifier; and one clear error for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import factorizer
from graphopt.errors import DataError, GateMissedError, GraphoptError, ModelError, SpecError
from graphopt.factor_choice import FactorChoice
from graphopt.factorizer import Factorized, factorize
from graphopt.judge import Comparison
from graphopt.model import Model
from graphopt.optimizer import optimize
from graphopt.quality import Bound
from graphopt.ratio import Ratio
from graphopt.runtime import Session
from tests.test_factorize_layers import RNG, B, W, error, feeds_of, model_of, of_rank, parsed, run

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def digits() -> tuple[onnx.ModelProto, Array, Array, Array]:
    """A trained classifier of digits with wide hidden layers, images to choose on, and labelled ones to judge on."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    images = np.asarray(images / 16, np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1000], order[1000:]
    trained = MLPClassifier((256, 256), max_iter=8, random_state=0, batch_size=50, tol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged: it need not
        trained.fit(images[train], labels[train])
    weights = {f"w{i}": np.asarray(w, np.float32) for i, w in enumerate(trained.coefs_)}
    weights |= {f"b{i}": np.asarray(b, np.float32) for i, b in enumerate(trained.intercepts_)}
    lines = ["Gemm x w0 b0 h0", "Relu h0 r0", "Gemm r0 w1 b1 h1", "Relu h1 r1", "Gemm r1 w2 b2 y"]
    return model_of(parsed(lines), weights, ("N", 64)), images[train], images[test], labels[test]


def batches(images: Array) -> list[dict[str, Array]]:
    return [{"x": images[i : i + 25]} for i in range(0, len(images), 25)]


def accuracy(images: Array, labels: Array) -> Any:
    return lambda predict: (predict({"x": images})["y"].argmax(axis=1) == labels).astype(np.float64)


def quick(model: Any, **asked: Any) -> Factorized:
    """Factorize by counted work: what is timed is no test."""
    return factorize(model, measure=False, **asked)


@pytest.mark.parametrize("max_error", [0.02, 0.1])
def test_the_outputs_stay_within_the_error_asked_for(digits: Any, max_error: float) -> None:
    model, train, test, labels = digits
    result = quick(model, data=batches(train), max_error=max_error)
    report = result.report
    assert report.decision == "factorized", report.reason
    assert report.error is not None
    assert report.error <= max_error
    assert error(model, result.model, batches(test)) <= 1.5 * max_error  # other images than those that judged
    assert report.macs_after is not None
    assert report.macs_before is not None
    assert report.macs_after < 0.5 * report.macs_before
    assert report.bytes_after < 0.5 * report.bytes_before
    found = accuracy(test, labels)
    drop = found(Session(model).run).mean() - found(Session(result.model).run).mean()
    assert drop <= max_error / 4
    json.dumps(report.to_dict(), default=str)


def test_a_tighter_bound_takes_more_work(digits: Any) -> None:
    model, train, *_ = digits
    work = [quick(model, data=batches(train), max_error=e).report.macs_after or 0 for e in (0.3, 0.03, 0.003)]
    assert work[0] < work[1] < work[2]


@pytest.mark.parametrize("sampled", [True, False])
def test_a_metric_decides(digits: Any, sampled: bool) -> None:
    model, train, test, labels = digits
    bound = Bound(metric=accuracy(test, labels), max_drop=0.01)
    report = quick(model, data=batches(train) if sampled else None, bound=bound).report
    assert report.decision == "factorized", report.reason
    assert report.quality is not None
    assert report.quality.evaluation is not None
    assert report.quality.ok
    assert report.quality.evaluation.drop <= 0.01


def test_without_samples_each_weight_stays_within_the_error(digits: Any) -> None:
    model = digits[0]
    report = quick(model, max_error=0.6).report
    assert report.decision == "factorized", report.reason
    assert all(row.error is not None and row.error <= 0.6 for row in report.layers if row.form != "whole")
    assert any("not judged" in note for note in report.notes)


@pytest.mark.parametrize("asked", [{"rank": 16}, {"energy": 0.98}])
def test_ranks_asked_for_are_what_comes(digits: Any, asked: dict[str, Any]) -> None:
    model, train, *_ = digits
    report = quick(model, data=batches(train), **asked).report
    made = {row.layer: row for row in report.layers if row.form != "whole"}
    assert "h1" in made
    if "rank" in asked:
        assert {row.form for row in made.values()} == {"product:16"}
    else:
        assert all(row.error is not None and row.error**2 <= 0.02 for row in made.values())
    with pytest.raises(GateMissedError, match="these ranks miss the bound"):
        quick(model, data=batches(train), bound=Bound(min_sqnr=90.0), **asked)


def test_a_bound_that_nothing_keeps_gives_the_lossless_model_and_why(digits: Any) -> None:
    model, train, *_ = digits
    result = quick(model, data=batches(train), max_error=1e-6)
    assert result.report.decision == "lossless"
    assert "no layer gets factors" in result.report.reason
    assert all(row.why for row in result.report.layers)
    assert error(model, result.model, batches(train[:50])) < 1e-6


def test_a_replay_writes_the_same_bytes(digits: Any, tmp_path: Path) -> None:
    from graphopt.decisions import save_decisions

    model, train, *_ = digits
    result = quick(model, data=batches(train), max_error=0.05)
    save_decisions(tmp_path / "decisions.json", result.report.decisions or {})
    again = quick(model, data=batches(train), max_error=0.05, decisions=tmp_path / "decisions.json")
    result.save(tmp_path / "a.onnx")
    again.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_twice_is_refused_with_the_reason(digits: Any) -> None:
    model, train, *_ = digits
    once = quick(model, data=batches(train), rank=16).model
    report = quick(once, data=batches(train), rank=16).report
    assert report.decision == "lossless"
    assert "it is a factor already" in report.reason


def test_nothing_to_factorize_is_no_error() -> None:
    model = model_of(parsed(["Relu x y"]), {}, ("N", 8))
    report = quick(model, rank=4).report
    assert report.decision == "lossless"
    assert report.reason == "no layer has a weight"
    grouped = model_of(parsed(["Conv x w y group=4"]), {"w": np.ones((8, 2, 3, 3), np.float32)}, (1, 8, 6, 6))
    assert "it has 4 groups" in quick(grouped, data=feeds_of((1, 8, 6, 6), 20)).report.reason


BAD: list[tuple[dict[str, Any], type[GraphoptError], str]] = [
    ({}, SpecError, "nothing says how much may be lost"),
    ({"max_error": 0.0, "data": True}, SpecError, "lies between 0 and 1"),
    ({"max_error": 1.5, "data": True}, SpecError, "lies between 0 and 1"),
    ({"max_error": float("nan"), "data": True}, SpecError, "lies between 0 and 1"),
    ({"energy": 1.0}, SpecError, "lies between 0 and 1"),
    ({"rank": 0}, SpecError, "1 or more"),
    ({"rank": 4, "energy": 0.9}, SpecError, "both say how much"),
    ({"max_error": 0.1, "rank": 4}, SpecError, "both say how much"),
    ({"target_latency": 1.2, "data": True}, SpecError, "part of the time"),
    ({"target_latency": 0.5, "data": True}, SpecError, "reached by measuring"),
    ({"rank": 4, "only": ("nothing*",)}, SpecError, "no layer has a name like that"),
    ({"bound": Bound(min_sqnr=30.0), "rank": 4}, DataError, "there are none"),
]


@pytest.mark.parametrize(("asked", "kind", "message"), BAD)
def test_bad_requests_get_one_clear_error(asked: dict[str, Any], kind: type[GraphoptError], message: str) -> None:
    model = model_of(parsed(["Gemm x w b y"]), {"w": W, "b": B}, ("N", 40))
    if asked.get("data"):
        asked = {**asked, "data": feeds_of((4, 40), 20)}
    with pytest.raises(kind, match=message):
        quick(model, **asked)


def test_a_quantized_model_is_refused() -> None:
    model = model_of(parsed(["Gemm x w b y"]), {"w": W, "b": B}, ("N", 40))
    coded = run("quantize-weights", model).model
    with pytest.raises(ModelError, match="quantized already"):
        quick(coded, rank=3)


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graphopt", "factorize", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_from_the_command_line(digits: Any, tmp_path: Path) -> None:
    model, train, *_ = digits
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=train)
    done = command(
        "m.onnx", "--data", "x.npz", "--batch", "25", "--max-error", "0.05", "--no-measure", "--json", "-o", "out.onnx",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["decision"] == "factorized"
    assert told["error"] <= 0.05
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)
    refused = command("m.onnx", "--max-error", "7", cwd=tmp_path)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "lies between 0 and 1" in refused.stderr


@pytest.mark.slow
def test_a_large_gemm_gets_faster(digits: Any) -> None:
    model, train, test, labels = digits
    bound = Bound(metric=accuracy(test, labels), max_drop=0.005)
    report = factorize(model, data=batches(train), bound=bound, budget=8.0).report
    assert report.decision == "factorized", report.reason
    assert report.timing is not None
    assert report.timing.overall.high < 1.0


def test_tables_take_what_the_layers_leave_of_the_bound() -> None:
    table = of_rank(5, 400, 40) + 1e-4 * of_rank(30, 400, 40)
    constants = {"t": table, "w": W, "b": B}
    nodes = [helper.make_node("Gather", ["t", "x"], ["e"], "table"), *parsed(["MatMul e w p", "Add p b y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.INT64, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, 30])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = [{"x": RNG.integers(0, 400, (4, 6))} for _ in range(20)]
    for embeddings in (False, True):
        report = quick(model, data=feeds, max_error=0.05, embeddings=embeddings, bound=Bound()).report
        assert any(row.form.startswith("table:") for row in report.layers) == embeddings, report.reason
        assert report.error is not None or not embeddings
        assert (report.error or 0.0) <= 0.05
        assert (report.bytes_after < 0.6 * report.bytes_before) == embeddings


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let work stand for time, at the places where time is measured."""

    def macs(model: Model, task: factorizer._Task) -> float:
        return float(task.macs(model) or 0)

    def compare(task: factorizer._Task, candidates: Sequence[tuple[str, Model]]) -> list[Comparison]:
        base = macs(task.canonical(), task)
        ratios = [0.02 + macs(model, task) / base for _, model in candidates]  # what is measured is not what adds up
        return [Comparison({"1 thread": Ratio(r, r, r, 0.95, 10, 5)}) for r in ratios]

    monkeypatch.setattr(factorizer._Task, "compare", compare)
    monkeypatch.setattr(factorizer._Task, "_seconds", lambda task: macs(task.canonical(), task))
    monkeypatch.setattr(FactorChoice, "_measured", FactorChoice._counted)
    monkeypatch.setattr(factorizer._Task, "lossless", lambda task: optimize(task.original, measure=False, verify="off"))


@pytest.mark.usefixtures("counted")
def test_a_latency_is_aimed_at_until_it_is_reached(digits: Any) -> None:
    model, train, *_ = digits
    errors = []
    for target in (0.7, 0.4):
        report = factorize(model, data=batches(train), target_latency=target).report
        assert report.timing is not None
        assert 0.5 * target < report.timing.overall.median <= target
        errors.append(report.error or 0.0)
    assert errors[0] < errors[1]
    with pytest.raises(GateMissedError, match="the best reached is"):
        factorize(model, data=batches(train), target_latency=0.06)
    with pytest.raises(GateMissedError, match=r"cannot be reached|not within the bound"):
        factorize(model, data=batches(train), target_latency=0.4, bound=Bound(min_sqnr=80.0))


@pytest.mark.usefixtures("counted")
def test_what_is_not_faster_is_not_returned(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, *_ = digits
    slower = [Comparison({"1 thread": Ratio(1.2, 1.1, 1.3, 0.95, 10, 5)})]
    monkeypatch.setattr(factorizer._Task, "compare", lambda *_: slower)
    result = factorize(model, data=batches(train), max_error=0.1)
    assert result.report.decision == "lossless"
    assert "not faster than the lossless model: 1.200 of its time" in result.report.reason
    assert error(model, result.model, batches(train[:50])) < 1e-6
