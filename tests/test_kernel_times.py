"""Models timed side by side: which laps count, how models are grouped, and what a run notes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from graphopt import kernel_times
from graphopt.kernel_times import Subject, run_all
from graphopt.model import Model, load
from graphopt.runtime import Session


def network(size: int = 64) -> Model:
    weight = np.ones((size, size), np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["a"], "dense"),
            onnx.helper.make_node("Erf", ["a"], ["y"], "erf"),
        ],
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", size])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", size])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    proto.ir_version = 8
    return load(proto)


def feeds(rows: int = 8) -> list[dict[str, np.ndarray]]:
    return [{"x": np.ones((rows, 64), np.float32)}]


def test_quiet_laps_are_those_in_which_all_models_are_fast() -> None:
    times = np.array([[1.0, 2.0, 1.1, 0.9, 1.0, 3.0, 1.0, 1.2], [10.0, 9.0, 20.0, 9.0, 10.0, 30.0, 25.0, 10.0]])
    (laps,) = kernel_times._quiet(times, 1)
    assert set(laps) == {0, 3}  # a quarter of eight; lap 1 is fast for one model only
    even, odd = kernel_times._quiet(times, 2)
    assert set(even) == {0, 4}
    assert set(odd) == {3, 7}


def test_a_machine_that_slows_down_meets_all_models_alike() -> None:
    laps = kernel_times._Laps(
        [Subject(network(), frozenset()), Subject(network(), frozenset())], feeds(), lambda: 0.0, profile=False
    )
    rng = np.random.default_rng(0)
    speed = np.where(np.arange(60) % 3 == 0, 1.0, 1.7) * rng.uniform(0.98, 1.02, 60)
    laps.wholes = [list(2.0 * speed), list(3.0 * speed * rng.uniform(0.98, 1.02, 60))]
    laps.finish()
    a, b = laps.subjects
    assert b.seconds / a.seconds == pytest.approx(1.5, abs=0.03)
    assert a.seconds == pytest.approx(2.0, abs=0.06)


def test_models_that_are_too_large_together_are_timed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [Subject(network(), frozenset()) for _ in range(5)]
    assert [len(g) for g in kernel_times._groups(subjects)] == [5]
    monkeypatch.setattr(kernel_times, "AT_ONCE", 2 * network().weight_bytes())
    assert [len(g) for g in kernel_times._groups(subjects)] == [2, 2, 1]
    monkeypatch.setattr(kernel_times, "AT_ONCE", 1)
    assert [len(g) for g in kernel_times._groups(subjects)] == [1] * 5
    assert list(kernel_times._groups([])) == []


def test_kernels_and_whole_runs_are_noted() -> None:
    subject = Subject(network(), frozenset())
    run_all([subject], [*feeds(2), *feeds(4)], budget=0.1, rounds=2)
    assert set(subject.ops.values()) == {"MatMul", "Erf"}
    assert set(subject.kernels) == set(subject.ops)
    assert subject.seconds > 0.0
    assert subject.matches is not None
    assert subject.optimized is not None
    assert not any(tensor.raw_data for tensor in subject.optimized.graph.initializer)


def test_without_profiles_whole_runs_only() -> None:
    subject = Subject(network(), frozenset())
    run_all([subject], feeds(), budget=0.05, rounds=1, profile=False)
    assert subject.seconds > 0.0
    assert subject.kernels == {}
    assert subject.matches is None


def test_fast_halves() -> None:
    assert kernel_times._middle([1.0, 2.0, 9.0, 3.0]) == 1.5
    assert kernel_times._middle([4.0]) == 4.0


@pytest.mark.parametrize(("seconds", "warm", "timed"), [(0.1, 0, 1), (0.01, 1, 2), (0.0013, 1, 3), (1e-5, 1, 5)])
def test_slow_models_are_visited_once(seconds: float, warm: int, timed: int) -> None:
    visit = kernel_times._Visit.lasting(seconds)
    assert (visit.warm, visit.timed, visit.runs) == (warm, timed, warm + timed)


def test_rounds_end_when_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[bool] = []
    session = kernel_times._session

    def counted(subject: Subject, provider: str, threads: int, *, profile: bool) -> Session:
        rounds.append(profile)
        return session(subject, provider, threads, profile=profile)

    monkeypatch.setattr(kernel_times, "_session", counted)
    run_all([Subject(network(), frozenset())], feeds(), budget=0.0, rounds=3, profile=False)
    assert rounds == [False]
