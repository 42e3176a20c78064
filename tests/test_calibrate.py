"""Calibration: what it tells, that it can be split and resumed, that memory is bounded, what it says of bad data."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import graphopt.calibrate
import graphopt.calibration
import graphopt.runtime
from graphopt.calibrate import calibrate, chunks
from graphopt.calibration import Calibration, TensorStatistics
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.histogram import WAITING
from graphopt.ranges import METHODS, find_range
from graphopt.runtime import Session
from graphopt.samples import Samples

Feeds = dict[str, Any]

MODEL = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N, 8] x) => (float[N, 8] y, int64[K] s) {
        h = Tanh(x)
        z = Mul(h, x)
        y = Relu(z)
        s = Shape(y)
        pair = SequenceConstruct(x, h)
    }
"""
INNER = ["x", "h", "z", "y"]


def model() -> onnx.ModelProto:
    return onnx.parser.parse_model(MODEL)


def ragged(count: int, seed: int = 0, rows: int = 20) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(int(rng.integers(1, rows)), 8)).astype(np.float32)} for _ in range(count)]


def values(feeds: list[Feeds]) -> dict[str, np.ndarray[Any, Any]]:
    session = Session(model(), optimization="off", extra_outputs=["h", "z"])
    made = [session.run(f) for f in feeds]
    return {"x": np.concatenate([f["x"] for f in feeds]), **{n: np.concatenate([m[n] for m in made]) for n in "hzy"}}


def same(one: Calibration, other: Calibration, *, ordered: bool = True) -> None:
    """Both tell the same: exactly where counts decide, to rounding where sums do."""
    assert one.names == other.names
    assert one.samples == other.samples
    for name in one.names:
        assert one.problems(name) == other.problems(name)
        for method in METHODS:
            mine, its = one.range(name, method), other.range(name, method)
            if method != "moving-average":
                assert mine == its, (name, method)
            elif ordered:  # sums in another grouping
                np.testing.assert_allclose([mine.low, mine.high], [its.low, its.high], rtol=1e-9, atol=1e-12)
        for what in ("mean", "second_moment"):
            np.testing.assert_allclose(getattr(one, what)(name), getattr(other, what)(name), rtol=1e-9, atol=1e-9)
        if one.tensors[name].axis is not None:
            for what in ("low", "high", "mean", "second_moment"):
                mine, its = (getattr(c, f"channel_{what}")(name) for c in (one, other))
                np.testing.assert_allclose(mine, its, rtol=1e-9, atol=1e-9)


# --- what it tells


def test_statistics_are_those_of_all_values() -> None:
    feeds = ragged(30)
    found = calibrate(model(), feeds, channels={"z": 1, "x": -1})
    assert found.names == INNER
    assert found.samples == 30
    for name, expected in values(feeds).items():
        least, most = float(expected.min()), float(expected.max())
        # ORT's Tanh differs by a rounding between its optimisation levels
        np.testing.assert_allclose([found.range(name).low, found.range(name).high], [least, most], rtol=1e-6)
        np.testing.assert_allclose(found.mean(name), expected.mean(dtype=np.float64), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.second_moment(name), np.square(expected, dtype=np.float64).mean(), rtol=1e-5)
        if name in ("z", "x"):
            np.testing.assert_allclose(found.channel_low(name), expected.min(axis=0), rtol=1e-6)
            np.testing.assert_allclose(found.channel_high(name), expected.max(axis=0), rtol=1e-6)
            np.testing.assert_allclose(found.channel_mean(name), expected.mean(axis=0), rtol=1e-4, atol=1e-6)
            squares = np.square(expected, dtype=np.float64).mean(axis=0)
            np.testing.assert_allclose(found.channel_second_moment(name), squares, rtol=1e-5)


def test_only_the_tensors_asked_for_are_there() -> None:
    found = calibrate(model(), ragged(3), ["h"], channels={"x": 1})
    assert found.names == ["h", "x"]
    with pytest.raises(DataError, match="'z' was not calibrated"):
        found.range("z")
    with pytest.raises(DataError, match="channels of tensor 'h' were not asked for"):
        found.channel_low("h")


def test_what_is_no_float_is_skipped_with_the_reason() -> None:
    found = calibrate(model(), ragged(3), ["s", "h", "pair"])
    assert found.names == ["h"]
    assert found.problems("s") == "not floats but int64"
    assert found.problems("pair") == "not a tensor but a seq(tensor(float))"
    with pytest.raises(DataError) as caught:
        found.range("s")
    assert "not floats but int64" in str(caught.value)


@pytest.mark.parametrize("name", ["float16", "float64", "bfloat16"])
def test_other_floats_are_counted_as_float32(name: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, name, None) or name)
    one = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(kind), [None])
    two = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(kind), [None])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [one], [two])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": np.array([-2, 0.5, 3], kind)}
    found = calibrate(made, [feeds], ["x"] if name == "bfloat16" else None)
    for tensor in found.names:
        assert (found.range(tensor).low, found.range(tensor).high) == (-2, 3)


def test_large_values_are_thinned_for_the_histogram_only() -> None:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(20_000, 8)).astype(np.float32)} for _ in range(3)]
    full, thin = (calibrate(model(), feeds, channels={"z": 1}, limit=limit) for limit in (None, 10_000))
    for name in full.names:
        assert full.range(name) == thin.range(name)
        assert full.mean(name) == thin.mean(name)
        mine, its = full.range(name, "percentile", percent=99), thin.range(name, "percentile", percent=99)
        # 30,000 values: 150 in each tail, so that its end is known to some percent
        np.testing.assert_allclose([mine.low, mine.high], [its.low, its.high], rtol=0.1, atol=0.01)
    again = calibrate(model(), feeds, limit=10_000)
    other = calibrate(model(), feeds, limit=10_000, seed=5)
    assert again.range("z", "percentile") == thin.range("z", "percentile")
    assert again.range("z", "percentile") != other.range("z", "percentile")


# --- splits


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=0, max_size=5), st.integers(0, 2**32 - 1), st.booleans())
def test_merged_parts_equal_one_run(cuts: list[int], seed: int, reverse: bool) -> None:
    rng = np.random.default_rng(seed)
    samples = [np.asarray(rng.standard_t(2, size=(int(rng.integers(0, 9)), 3)), np.float32) for _ in range(40)]
    for sample in samples[::7]:
        sample[:1, :1] = rng.choice([np.nan, np.inf, 0.0])
    whole = Calibration()
    for sample in samples:
        whole.add("t", sample, 1)
    ends = [0, *sorted(cuts), 40]
    parts = []
    for start, end in itertools.pairwise(ends):
        part = Calibration()
        for sample in samples[start:end]:
            part.add("t", sample, 1)
        parts.append(part)
    left = parts[0]
    for part in parts[1:]:
        left = part.merge(left) if reverse else left.merge(part)
    same(whole, left, ordered=not reverse)
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = part.merge(right)
    same(whole, right)


def test_merging_changes_neither() -> None:
    one, two = calibrate(model(), ragged(5)), calibrate(model(), ragged(5, seed=1))
    before = one.mean("h"), two.mean("h"), one.range("h", "percentile")
    one.merge(two)
    assert (one.mean("h"), two.mean("h"), one.range("h", "percentile")) == before


def test_small_budgets_take_more_sweeps_and_tell_the_same() -> None:
    feeds = ragged(25)
    reads = 0

    def counted() -> Iterator[Feeds]:
        nonlocal reads
        reads += 1
        yield from feeds

    samples = Samples(counted, "counted")
    whole = calibrate(model(), samples, channels={"z": 1})
    assert reads == 2  # the sizes of the first, then one sweep
    same(whole, calibrate(model(), samples, channels={"z": 1}, budget=1))
    assert reads == 2 + 1 + 4


def test_a_sample_above_the_budget_halves_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = ragged(20, rows=3) + ragged(1, rows=2000) + ragged(20, rows=3)
    sessions: list[list[str]] = []

    class Watched(Session):
        def __init__(self, source: Any, **options: Any) -> None:
            sessions.append(list(options.get("extra_outputs", ())))
            super().__init__(source, **options)

    whole = calibrate(model(), feeds)
    monkeypatch.setattr(graphopt.calibrate, "Session", Watched)
    same(whole, calibrate(model(), feeds, budget=4 * 8 * 4 * 3))
    assert ["h", "z", "y"] in sessions
    assert ["h"] in sessions
    assert ["z", "y"] in sessions


@pytest.mark.parametrize("limit", [None, 50])
def test_several_processes_tell_the_same(limit: int | None) -> None:
    feeds = ragged(70)
    one, two = (calibrate(model(), feeds, channels={"z": 1}, jobs=jobs, limit=limit) for jobs in (1, 2))
    same(one, two)


def test_chunks_keep_every_sample_and_are_bounded() -> None:
    feeds = ragged(100)
    made = list(chunks(iter(feeds), 7))
    assert [index for index, _ in made] == [7, 39, 71, 103]
    assert [f for _, part in made for f in part] == feeds
    large = [{"x": np.zeros((1 << 20, 5), np.float32)}] * 4
    assert [len(part) for _, part in chunks(large, 0)] == [2, 2]


@pytest.mark.parametrize("jobs", [1, 2])
def test_models_beyond_one_message_are_calibrated_from_a_file(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    whole = calibrate(model(), ragged(3))
    monkeypatch.setattr(graphopt.runtime, "INLINE_LIMIT", -1)
    monkeypatch.setattr(graphopt.calibrate, "INLINE_LIMIT", -1)
    same(whole, calibrate(model(), ragged(3), jobs=jobs))


def test_errors_of_other_processes_are_ours() -> None:
    feeds = [*ragged(5), {"x": np.zeros((2, 9), np.float32)}]
    with pytest.raises(DataError, match="ONNX Runtime fails on these feeds"):
        calibrate(model(), feeds, jobs=2)


# --- files


class BrokenOffError(Exception):
    """Stands for Ctrl-C."""


class Breaking:
    """Samples that break off."""

    def __init__(self, feeds: list[Feeds], at: int) -> None:
        self.feeds, self.at = feeds, at

    def __iter__(self) -> Iterator[Feeds]:
        yield from self.feeds[: self.at]
        raise BrokenOffError


@pytest.mark.parametrize("budget", [1 << 20, 900])
def test_a_calibration_resumes_where_it_broke_off(tmp_path: Path, budget: int) -> None:
    feeds = ragged(60)
    state = tmp_path / "state.npz"
    for at in (1, 17, 40):
        with pytest.raises(BrokenOffError):
            calibrate(model(), Breaking(feeds, at), channels={"z": 1}, resume=state, budget=budget)
        assert Calibration.load(state).samples == at
    done = calibrate(model(), feeds, channels={"z": 1}, resume=state, budget=budget)
    same(calibrate(model(), feeds, channels={"z": 1}), done)
    same(done, calibrate(model(), feeds, channels={"z": 1}, resume=state))


def test_a_saved_calibration_is_the_same_and_holds_no_objects(tmp_path: Path) -> None:
    found = calibrate(model(), ragged(30), ["h", "z", "s"], channels={"z": 1})
    path = tmp_path / "state.npz"
    found.save(path)
    again = Calibration.load(path)
    same(found, again)
    assert again.problems("s") == found.problems("s")
    with np.load(path, allow_pickle=False) as file:
        assert all(file[key].dtype.kind in "fiu" for key in file.files)
    same(found.merge(found), again.merge(again))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    with pytest.raises(DataError, match="no such calibration"):
        Calibration.load(path)
    for content in (b"", b"PK\x03\x04 broken", b"plain text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a saved calibration"):
            Calibration.load(path)
    np.savez(path, calibration=np.zeros(3))
    with pytest.raises(DataError, match="not a saved calibration"):
        Calibration.load(path)
    path.unlink()
    calibrate(model(), ragged(3), resume=path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a saved calibration"):
        Calibration.load(path)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    calibrate(model(), ragged(3), resume=state)
    other = onnx.parser.parse_model(MODEL.replace("Relu", "Sigmoid"))
    with pytest.raises(DataError, match="of another model"):
        calibrate(other, ragged(3), resume=state)
    with pytest.raises(DataError, match="different models"):
        Calibration.load(state).merge(calibrate(other, ragged(3)))


# --- bad data


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no samples"):
        calibrate(model(), [])
    with pytest.raises(DataError, match="once only"):
        calibrate(model(), iter(ragged(3)))


@pytest.mark.parametrize("options", [{"jobs": 0}, {"limit": 0}])
def test_nothing_to_work_with(options: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="processes and values"):
        calibrate(model(), ragged(1), **options)  # type: ignore[arg-type]


def test_unknown_tensors() -> None:
    with pytest.raises(ModelError, match="computes no such tensor") as caught:
        calibrate(model(), ragged(1), ["hh"])
    assert caught.value.at == "hh"


def test_values_that_are_not_finite_are_told_and_left_out() -> None:
    feeds = ragged(4)
    feeds[1]["x"][0, 0] = np.nan
    feeds[2]["x"][0, 1] = -np.inf
    feeds.append({"x": np.full((2, 8), np.nan, np.float32)})
    found = calibrate(model(), feeds, channels={"x": 1})
    clean = np.concatenate([f["x"] for f in feeds])
    finite = np.isfinite(clean)
    assert found.problems("x") == f"17 NaN and 1 infinite of {clean.size} values, left out"
    assert found.range("x").low == float(clean[finite].min())
    np.testing.assert_allclose(found.mean("x"), clean[finite].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.channel_mean("x"), np.nanmean(np.where(finite, clean, np.nan), axis=0), rtol=1e-5)
    assert found.problems("z") is not None


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((3, 2), 0.5, np.float32), "constant: always 0.5"),
        (np.zeros((3, 2), np.float32), "constant: always 0"),
        (np.zeros((0, 2), np.float32), "no values: empty in every sample"),
        (np.full((3, 2), np.nan, np.float32), "no finite values: 6 NaN"),
        (np.array([[1e-41, -2e-41]], np.float32), "all values are denormal: none is larger than 2e-41"),
        (np.array([[1e300, 1.0]]), "1 infinite of 2 values, left out"),
    ],
)
def test_odd_tensors_are_told(array: np.ndarray[Any, Any], said: str) -> None:
    found = Calibration()
    found.add("t", array, 1)
    assert found.problems("t") == said
    assert found.samples == 1
    assert np.isfinite([found.mean("t"), found.second_moment("t")]).all()
    if said.startswith("no "):
        for method in METHODS:
            with pytest.raises(DataError, match="no finite values") as caught:
                found.range("t", method)
            assert said in str(caught.value)
    else:
        assert np.isfinite([found.range("t").low, found.range("t").high]).all()
    if array.size:
        assert np.isfinite(found.channel_low("t")).all()
        assert np.isfinite(found.channel_second_moment("t")).all()


def test_a_channel_without_values_or_of_zeros() -> None:
    found = Calibration()
    found.add("t", np.array([[0, np.nan, 1], [0, np.inf, -3]], np.float32), 1)
    assert found.channel_low("t").tolist() == [0, 0, -3]
    assert found.channel_high("t").tolist() == [0, 0, 1]
    assert found.channel_mean("t").tolist() == [0, 0, -1]


def test_channels_that_change_or_are_not_there() -> None:
    found = Calibration()
    found.add("t", np.ones((2, 3), np.float32), 1)
    with pytest.raises(DataError, match="3 long in one sample and 4 in another"):
        found.add("t", np.ones((2, 4), np.float32), 1)
    with pytest.raises(DataError, match="axis 2 of a tensor of rank 2") as caught:
        found.add("u", np.ones((2, 3), np.float32), 2)
    assert caught.value.at == "tensor 'u'"


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_moments_hold_for_any_scale(scale: float) -> None:
    drawn = (np.random.default_rng(0).normal(size=5000) * scale).astype(np.float32)
    held = TensorStatistics()
    held.add(drawn)
    np.testing.assert_allclose(held.total, drawn.astype(np.float64).sum(), rtol=1e-3, atol=1e-4 * scale * 5000)
    np.testing.assert_allclose(held.squares, np.square(drawn, dtype=np.float64).sum(), rtol=1e-5)


# --- memory


GROWTH = """
import resource, sys
import numpy as np, onnx
from graphopt.calibrate import calibrate
from graphopt.samples import Samples

def feeds():
    rng = np.random.default_rng(0)
    for _ in range(int(sys.argv[1])):
        yield {"x": rng.normal(size=(int(rng.integers(1, 400)), 8)).astype(np.float32)}

calibrate(onnx.parser.parse_model(sys.argv[2]), Samples(feeds, "ragged"), channels={"z": 1})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs elsewhere")
def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    peaks = []
    for count in (500, 4000):
        ran = subprocess.run(
            [sys.executable, "-c", GROWTH, str(count), MODEL], capture_output=True, text=True, check=True
        )
        peaks.append(int(ran.stdout) / 1024)
    # 4,000 samples of four tensors are 98 MB; what waits to be counted is half a MB
    assert peaks[1] - peaks[0] < 10, peaks


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_what_waits_to_be_counted_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, WAITING // 2, 9).tolist()
    arrays = [rng.standard_t(2, size).astype(np.float32) for size in sizes]
    one, other = Calibration(), Calibration()
    for array in arrays:
        one.add("t", array)
        other.add("t", array)
        other.range("t", "percentile")  # counts what waits
    same(one, other)


MINILM = """
import resource, sys
import numpy as np
from graphopt.calibrate import calibrate
from graphopt.model import load
from graphopt.models import zoo
from graphopt.samples import Samples

def feeds():
    rng = np.random.default_rng(0)
    for _ in range(int(sys.argv[1])):
        ids = rng.integers(1000, 20000, (1, int(rng.integers(4, 65))))
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}

model = load(zoo.fetch("minilm-torchscript"))
calibrate(model, Samples(feeds, "ragged"), [n.inputs[0].name for n in model.graph.nodes if n.op == "MatMul"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs elsewhere")
def test_ten_thousand_sentences_need_no_more_memory_than_a_thousand() -> None:
    peaks = []
    for count in (1000, 10_000):
        ran = subprocess.run([sys.executable, "-c", MINILM, str(count)], capture_output=True, text=True, check=True)
        peaks.append(int(ran.stdout) / 1024)
    # the second makes 7.4 billion values, 30 GB; allocators keep some pages of each new shape
    assert peaks[1] - peaks[0] < 40, peaks


def test_a_range_is_searched_for_once_and_anew_after_more_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(*given: Any, **named: Any) -> Any:
        calls.append("range")
        return find_range(*given, **named)

    monkeypatch.setattr(graphopt.calibration, "find_range", counted)
    known, later = Calibration(), Calibration()
    for held, end in ((known, 1.0), (later, 3.0)):
        held.add("x", np.linspace(-1.0, end, 100, dtype=np.float32))
    first = [known.range("x", "mse"), known.range("x", "mse"), known.range("x", "mse", symmetric=True)]
    assert len(calls) == 2
    assert first[0] == first[1]
    assert known.merge(later).range("x").high == 3.0
    known.absorb(later)
    assert known.range("x", "mse").high > first[0].high
    known.add("x", np.full(4, 7.0, np.float32))
    assert known.range("x").high == 7.0


def test_a_tensor_has_one_range_whatever_others_are_measured_with_it() -> None:
    """ORT makes one Gelu of all nodes where no tensor between them is asked for, which changes last digits."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[64, 64] x) => (float[64, 64] y) <float root = {1.4142135}, float one = {1.0}, float half = {0.5}> {
            a = Div(x, root)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }
    """)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((64, 64)).astype(np.float32)} for _ in range(2)]
    samples = Samples(lambda: iter(feeds), "noise")
    whole = calibrate(proto, samples, ["a", "b", "c", "d", "y"])
    for name in whole.names:
        alone = calibrate(proto, samples, [name])
        assert (alone.range(name), alone.mean(name)) == (whole.range(name), whole.mean(name)), name
