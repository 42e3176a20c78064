"""Timing: its statistics on made-up noise, its structure on a small model.  Timings themselves are benchmarks."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import environment, memory
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.model import load
from graphopt.ratio import Ratio, paired
from graphopt.samples import Samples
from graphopt.timing import Plan, _Record, _seconds, _Timer, bench, quick_ratio

Rows = list[npt.NDArray[np.float64]]


def noise(rng: np.random.Generator, size: int, correlation: float, scale: float) -> npt.NDArray[np.float64]:
    """Heavy-tailed noise in which neighbours resemble each other."""
    steps = scale * rng.standard_t(3, size)
    found = np.empty(size)
    found[0] = steps[0]
    for i in range(1, size):
        found[i] = correlation * found[i - 1] + np.sqrt(1 - correlation**2) * steps[i]
    return found


def timings(
    rng: np.random.Generator, ratio: float, *, rounds: int, pairs: int, session: float, correlation: float, scale: float
) -> tuple[Rows, Rows]:
    """Interleaved AB BA timings whose sessions differ by `session` (standard deviation of the logarithm)."""
    rows_a, rows_b = [], []
    for _ in range(rounds):
        drift = noise(rng, 2 * pairs, correlation, scale)
        shift = np.log(ratio) + rng.normal(0, session)
        first, second = drift[0::2], drift[1::2]
        swapped = np.arange(pairs) % 2 == 1
        rows_a.append(0.02 * np.exp(np.where(swapped, second, first)))
        rows_b.append(0.02 * np.exp(np.where(swapped, first, second) + shift))
    return rows_a, rows_b


@pytest.mark.parametrize(
    ("rounds", "pairs", "session", "correlation", "scale"),
    [
        (10, 6, 0.006, 0.0, 0.02),  # a model of 60 ms on a quiet machine
        (10, 40, 0.02, 0.8, 0.05),  # sessions that differ, noise in bursts
        (6, 4, 0.006, 0.8, 0.05),  # the quick measurement
        (6, 2, 0.0, 0.0, 0.02),
        (1, 60, 0.0, 0.8, 0.05),  # no rounds: blocks alone must do
    ],
)
@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_interval_holds_the_true_ratio(
    ratio: float, rounds: int, pairs: int, session: float, correlation: float, scale: float
) -> None:
    rng = np.random.default_rng(0)
    runs, held = 100, 0
    for seed in range(runs):
        a, b = timings(rng, ratio, rounds=rounds, pairs=pairs, session=session, correlation=correlation, scale=scale)
        found = paired(a, b, seed=seed, resamples=400)
        held += found.low <= ratio <= found.high
    # a 95 % interval misses more than 11 of 100 times with probability 0.4 %
    assert held >= 89


def test_interval_shrinks_with_more_rounds() -> None:
    rng = np.random.default_rng(3)
    shape: dict[str, Any] = {"pairs": 20, "session": 0.01, "correlation": 0.3, "scale": 0.02}
    few = paired(*timings(rng, 1.0, rounds=5, **shape))
    many = paired(*timings(rng, 1.0, rounds=40, **shape))
    assert many.width < few.width / 2


def test_outliers_do_not_move_the_ratio() -> None:
    a = np.full(100, 0.01)
    b = np.full(100, 0.008)
    b[::10] = 1.0
    found = paired(a, b)
    assert found.median == pytest.approx(0.8, rel=1e-9)
    assert found.high == pytest.approx(0.8, rel=1e-9)
    assert found.faster
    assert not found.slower


def test_same_seed_same_interval() -> None:
    a, b = timings(np.random.default_rng(1), 0.9, rounds=4, pairs=10, session=0.0, correlation=0.0, scale=0.1)
    assert paired(a, b, seed=7) == paired(a, b, seed=7)
    assert paired(a, b, seed=7) != paired(a, b, seed=8)


def test_rows_may_differ_in_length() -> None:
    a = [np.full(n, 2.0) for n in (3, 8, 5)]
    b = [np.full(n, 3.0) for n in (3, 8, 5)]
    found = paired(a, b)
    assert (found.median, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert (found.pairs, found.rounds) == (16, 3)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "pair up"),
        ([], [], "no timings"),
        ([1.0, 0.0], [1.0, 1.0], "above zero"),
    ],
)
def test_unusable_timings_are_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        paired(a, b)


def test_confidence_is_a_probability() -> None:
    with pytest.raises(SpecError, match="between 0 and 1"):
        paired([1.0, 1.0], [1.0, 1.0], confidence=95)


def test_ratio_as_plain_values() -> None:
    found = Ratio(0.5, 0.4, 0.6, pairs=3, conditions={"threads": 2})
    assert found.to_dict() == {
        "ratio": 0.5, "interval": [0.4, 0.6], "confidence": 0.95, "pairs": 3, "rounds": 1, "threads": 2,
    }  # fmt: skip
    assert found.width == pytest.approx(0.4)


# --- on a model ---------------------------------------------------------------------------------------------


def matmul(size: int = 8, name: str = "x") -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", [name, "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    load(matmul()).save(tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


FEED = {"x": np.ones((2, 8), np.float32)}


def test_bench_reports_what_was_measured(path: Path) -> None:
    found = bench(path, matmul(), [FEED], rounds=2, min_time=1e-4, seed=3)
    assert found.a.name == "m.onnx"
    assert found.b.name == "b"
    assert found.runs_per_measurement > 1  # far below 0.1 ms
    assert found.paired.rounds == 2
    assert found.paired.pairs % 4 == 0  # an even number in each round: A first as often as B
    assert found.interval[0] <= found.ratio <= found.interval[1]
    for model in (found.a, found.b):
        assert 0 < model.median <= model.p90 <= model.p99
        assert model.load > 0
        assert model.peak_bytes is None
    assert "x[2,8]" in found.samples
    document = json.loads(json.dumps(found.to_dict()))
    assert document["environment"]["threads"] == 1
    assert document["a"]["median_ms"] == pytest.approx(found.a.median * 1e3)
    assert [row["name"] for row in found.table()] == ["m.onnx", "b"]
    assert document["wall"]["pairs"] == document["pairs"]


@pytest.mark.skipif(sys.platform == "win32", reason="its thread clock is too coarse")
def test_processor_time_decides_where_one_thread_does_the_work(path: Path) -> None:
    def clock(plan: Plan, threads: int = 1) -> str:
        timer = _Timer((path, path), [FEED], plan, 0, threads=threads, provider="cpu", custom_ops=())
        return str(timer.run(0.95).ratio(0.95, 0).to_dict()["clock"])

    short = Plan(rounds=1, round_seconds=0.01, precision=None)
    assert clock(short) == "cpu"
    assert clock(short, threads=2) == "wall"
    assert clock(replace(short, clock="wall")) == "wall"


def test_wall_time_decides_with_several_threads_unless_it_is_disturbed() -> None:
    rng = np.random.default_rng(0)
    calm = [np.full(8, 1.0) * np.exp(0.01 * rng.standard_normal(8)) for _ in range(6)]
    rough = [np.exp(0.5 * rng.standard_normal(8)) for _ in range(6)]
    halved = [row / 2 for row in calm]

    def clock(wall: Any, cpu: Any, kind: Any = "steady") -> Any:
        found = _Record(wall=(calm, wall), cpu=(calm, cpu), clock=kind).ratio(0.95, 0)
        return found.conditions["clock"], round(found.median, 1)

    assert clock(halved, calm) == ("wall", 0.5)
    assert clock(rough, halved) == ("cpu", 0.5)
    assert clock(rough, rough)[0] == "wall"  # as wide as the other: nothing is gained
    assert clock(rough, halved, "wall")[0] == "wall"


def test_waiting_is_not_processor_time() -> None:
    wall, cpu = _seconds(lambda: time.sleep(0.02), 2)
    assert wall >= 0.02
    assert cpu < 0.5 * wall


def test_work_on_other_threads_is_noticed(path: Path) -> None:
    def spread() -> None:
        def work() -> None:
            np.linalg.svd(np.ones((200, 200)))

        helpers = [threading.Thread(target=work) for _ in range(2)]
        for helper_thread in helpers:
            helper_thread.start()
        for helper_thread in helpers:
            helper_thread.join()

    timer = _Timer((path, path), [FEED], Plan(), 0, threads=1, provider="cpu", custom_ops=())
    assert timer._clock([[spread], [spread]]) == "wall"


def test_random_feeds_have_one_shape(path: Path) -> None:
    found = bench(path, path, rounds=1, warmup=0)
    assert "timed on 1" in found.samples


def test_threads_and_provider_stand_in_the_quick_ratio(path: Path) -> None:
    found = quick_ratio(path, load(path), [FEED], budget_s=0.05, threads=2)
    assert found.to_dict()["threads"] == 2
    assert found.to_dict()["provider"] == "cpu"
    assert 4 <= found.rounds <= 6  # fewer where loading takes long


def test_feeds_are_taken_in_turn_by_both(path: Path) -> None:
    plan = Plan(rounds=1, round_seconds=1e-9, precision=None, min_time=1e-6)
    feeds: list[Any] = [FEED, {"x": np.zeros((3, 8), np.float32)}]
    timer = _Timer((path, path), feeds, plan, 0, threads=1, provider="cpu", custom_ops=())
    ran: list[tuple[int, int]] = []
    calls = [[lambda m=m, f=f: ran.append((m, f)) for f in range(2)] for m in range(2)]
    record = _Record(repeat=1, pairs=8)
    assert timer._pairs(calls, record).shape == (2, 2, 8)  # model, clock, pair
    pairs = [ran[i : i + 2] for i in range(0, 16, 2)]
    assert all({m for m, _ in pair} == {0, 1} and pair[0][1] == pair[1][1] for pair in pairs)
    assert [pair[0][0] for pair in pairs] in ([0, 1] * 4, [1, 0] * 4)  # AB BA AB BA ...
    assert [pair[0][1] for pair in pairs] == [0, 0, 1, 1, 0, 0, 1, 1]  # a feed keeps both orders


def test_rounds_double_until_narrow_or_late(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def fake(self: _Timer, number: int, record: _Record) -> None:
        for row in record.wall:
            row.append(0.01 * np.exp(0.2 * rng.standard_normal(4)))

    monkeypatch.setattr(_Timer, "_round", fake)

    def rounds(plan: Plan) -> int:
        timer = _Timer((path, path), [FEED], plan, 0, threads=1, provider="cpu", custom_ops=())
        return len(timer.run(0.95).wall[0])

    assert rounds(Plan(rounds=5, precision=None)) == 5
    assert rounds(Plan(rounds=5, precision=9.0)) == 5
    assert rounds(Plan(rounds=5, precision=1e-9, max_seconds=0.0)) == 5
    assert rounds(Plan(rounds=5, precision=0.15)) in {10 * 2**k for k in range(6)}


def test_feeds_must_fit_both(path: Path) -> None:
    with pytest.raises(DataError, match="no input 'x'"):
        bench(path, matmul(name="other"), [FEED], rounds=1)


def test_samples_must_not_be_empty(path: Path) -> None:
    with pytest.raises(DataError):
        bench(path, path, Samples(lambda: iter(()), "nothing"), rounds=1)


def test_options_are_checked(path: Path) -> None:
    with pytest.raises(SpecError, match="rounds"):
        bench(path, path, [FEED], rounds=0)


def test_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        bench(tmp_path / "no.onnx", tmp_path / "no.onnx", [FEED], rounds=1)


# --- memory and environment ---------------------------------------------------------------------------------


def test_peak_memory_grows_with_the_weights(tmp_path: Path) -> None:
    peaks = []
    for size in (64, 3072):
        load(matmul(size)).save(tmp_path / f"{size}.onnx")
        feed = {"x": np.ones((1, size), np.float32)}
        peaks.append(memory.peak_memory(tmp_path / f"{size}.onnx", feed))
    small, large = peaks
    assert small is not None
    assert large is not None
    weights = 3072 * 3072 * 4
    assert large - small > 0.9 * weights
    assert small < weights  # the parent's memory, and the imports, are not counted


def test_environment_is_plain_and_complete() -> None:
    found = environment.describe(threads=1, provider="cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["numpy"] == np.__version__
    assert "cpu" in found["providers"]
    assert found["cores"] >= 1
    assert environment.summary(found).endswith(f"load {found['load_average'][0]:.2f}")
