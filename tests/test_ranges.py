"""Range methods against plain NumPy on the raw values, as published, and against ONNX Runtime's own calibrators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.codes import activation_code
from graphopt.errors import DataError, SpecError
from graphopt.histogram import Histogram, stride
from graphopt.ranges import METHODS, Range, find_range, least_divergence, magnitudes

Array = np.ndarray[Any, Any]
BIN = 2.0**-10
"""Width of a bin, relative to where it is."""


def histogram(*samples: Array) -> Histogram:
    out = Histogram()
    for values in samples:
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        out.add(flat, float(flat.min()), float(flat.max()))
    return out


def drawn(name: str, size: int = 200_000, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    makers: dict[str, Any] = {
        "normal": lambda: rng.normal(size=size),
        "relu": lambda: np.maximum(rng.normal(size=size), 0),
        "laplace": lambda: rng.laplace(size=size),
        "student": lambda: rng.standard_t(3, size),
        "shifted": lambda: rng.normal(size=size) + 3,
        "uniform": lambda: rng.uniform(-1, 3, size),
        "outlier": lambda: np.append(rng.normal(size=size), 60.0),
        "negative": lambda: -np.square(rng.normal(size=size)),
        "huge": lambda: rng.normal(size=size) * 1e30,
        "small": lambda: rng.normal(size=size) * 1e-30,
        "steps": lambda: rng.integers(-4, 5, size) / 4,
    }
    return np.asarray(makers[name](), np.float32)


SHAPES = ("normal", "relu", "laplace", "student", "shifted", "uniform", "outlier", "negative", "huge", "small", "steps")


# --- the histogram itself


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), min_size=1, max_size=6),
    st.integers(0, 6),
    st.randoms(use_true_random=False),
)
def test_histograms_add_up_in_any_order(samples: list[list[float]], cut: int, random: Any) -> None:
    arrays = [np.array(s, np.float32) for s in samples]
    together = histogram(*arrays)
    shuffled = list(arrays)
    random.shuffle(shuffled)
    left, right = histogram(*shuffled[:cut]), histogram(*shuffled[cut:])
    left.merge(right)
    one = histogram(np.concatenate(arrays))
    for other in (left, one):
        mine, its = together.bins(), other.bins()
        for field in ("low", "high", "counts"):
            np.testing.assert_array_equal(getattr(mine, field), getattr(its, field))
        assert (together.low, together.high, together.count) == (other.low, other.high, other.count)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_counting_where_the_last_sample_was_counted_changes_nothing(seed: int, spread: int, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    together, merged = Histogram(), Histogram()
    for phase in range(12):
        scale = 2.0 ** rng.uniform(-spread, spread) if phase % 3 else 1.0
        values = np.asarray(rng.normal(size=60) * 2.0 ** rng.uniform(-spread / 2, spread / 2, 60) * scale, np.float32)
        values = values if signed and phase > 4 else np.abs(values)
        one = Histogram()
        for held in (together, one):
            held.add(values, float(values.min()), float(values.max()), limit=25, phase=phase)  # counted at once
        merged.merge(one)
    mine, its = together.bins(), merged.bins()
    for field in ("low", "high", "counts"):
        np.testing.assert_array_equal(getattr(mine, field), getattr(its, field))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200))
def test_every_value_is_counted_in_a_bin_that_holds_it(values: list[float]) -> None:
    array = np.array(values, np.float32)
    bins = histogram(array).bins()
    assert bins.counts.sum() == len(values)
    assert np.all(bins.low[1:] >= bins.high[:-1])
    tiny = float(np.finfo(np.float32).tiny)
    inside = (array[:, None] >= bins.low - tiny) & (array[:, None] <= bins.high + tiny)
    assert inside.any(axis=1).all()
    assert np.all(bins.high - bins.low <= 2.0**-5 * np.maximum(np.abs(bins.low), np.abs(bins.high)) + tiny)


def test_the_highest_octaves_are_fine_whatever_an_outlier_does() -> None:
    values = drawn("normal")
    for extra in ([], [-3.4e38] * 3):
        bins = histogram(np.append(values, np.array(extra, np.float32))).bins()
        upper = (bins.high > 0.05) & (bins.high < 5)
        assert np.all((bins.high - bins.low)[upper] <= BIN * bins.high[upper])


@pytest.mark.parametrize("size", [1000, 65_536, 100_000, 786_432])
def test_thinned_counts_stand_for_all_values(size: int) -> None:
    channels = np.arange(size) % 8  # a step of 8 would see one channel only
    values = (channels + np.random.default_rng(0).uniform(0, 1, size)).astype(np.float32)
    out = Histogram()
    out.add(values, float(values.min()), float(values.max()), limit=2000, phase=3)
    bins = out.bins()
    assert out.count == size
    assert abs(int(bins.counts.sum()) - size) <= stride(size, 2000)
    for channel in range(8):
        share = bins.counts[(bins.low >= channel) & (bins.low < channel + 1)].sum() / size
        assert abs(share - 1 / 8) < 0.02
    assert (out.low, out.high) == (float(values.min()), float(values.max()))


def test_a_file_keeps_everything() -> None:
    held = histogram(drawn("student", 5000), drawn("normal", 100))
    again = Histogram.from_arrays(held.to_arrays())
    for method in METHODS:
        assert find_range(again, method) == find_range(held, method)


# --- methods on raw values


@pytest.mark.parametrize("shape", SHAPES)
def test_extremes(shape: str) -> None:
    values = drawn(shape, 5000)
    held = histogram(*np.array_split(values, 7))
    assert find_range(held, "min-max") == Range(float(values.min()), float(values.max()))
    peak = float(np.abs(values).max())
    assert find_range(held, "abs-max") == Range(-peak, peak)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percent", [50.0, 90.0, 99.9, 99.99, 100.0])
def test_percentiles_are_within_a_bin_of_the_sorted_values(shape: str, percent: float) -> None:
    values = np.sort(drawn(shape, 50_000)).astype(np.float64)
    found = find_range(histogram(values), "percentile", percent=percent)
    for fraction, value in (((100 - percent) / 200, found.low), (1 - (100 - percent) / 200, found.high)):
        rank = fraction * (len(values) - 1)
        low, high = values[max(int(rank) - 1, 0)], values[min(int(rank) + 2, len(values) - 1)]
        slack = 2 * BIN * max(abs(low), abs(high)) + BIN * np.abs(values).max() / 2**7  # coarse octaves near zero
        assert low - slack <= value <= high + slack


def test_moving_averages_weigh_samples_as_defined() -> None:
    samples = [np.random.default_rng(i).normal(size=20).astype(np.float32) for i in range(30)]
    lows, highs = [float(s.min()) for s in samples], [float(s.max()) for s in samples]
    weights = np.array([0.99 ** (29 - i) for i in range(30)])
    found = find_range(histogram(*samples), "moving-average")
    expected = [float(np.dot(weights, ends) / weights.sum()) for ends in (lows, highs)]
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    plain = find_range(histogram(*samples), "moving-average", smoothing=0.0)
    np.testing.assert_allclose([plain.low, plain.high], [np.mean(lows), np.mean(highs)], rtol=1e-12)
    left, right = histogram(*samples[:11]), histogram(*samples[11:])
    left.merge(right)
    merged = find_range(left, "moving-average")
    np.testing.assert_allclose([merged.low, merged.high], expected, rtol=1e-12)


def divergence(counts: Array, beyond: float, levels: int, kept: int) -> float:
    """KL divergence of the counts clipped to `kept` bins from what `levels` codes make of them, step by step."""
    reference = counts[:kept].astype(np.float64)
    outside = counts[kept:].sum() + beyond
    reference[-1] += outside
    quantized = np.zeros(kept)
    for level in range(levels):
        part = slice(level * kept // levels, (level + 1) * kept // levels)
        filled = reference[part] > 0
        held = counts[part].sum()
        if level == levels - 1 and held == 0 and outside > 0:
            held = 1.0
        if filled.any():
            quantized[part] = np.where(filled, held / filled.sum(), 0.0)
    inside = counts[:kept].sum()
    if inside == 0:
        return np.inf
    p, q = reference / reference.sum(), quantized / inside
    some = p > 0
    if (q[some] == 0).any():
        return np.inf
    return float((p[some] * np.log(p[some] / q[some])).sum())


@given(st.integers(0, 2**32 - 1), st.integers(2, 16), st.booleans())
def test_the_divergence_of_all_thresholds_at_once_is_that_of_each(seed: int, levels: int, sparse: bool) -> None:
    rng = np.random.default_rng(seed)
    counts = np.sort(rng.poisson(rng.exponential(5, 64)))[::-1].astype(np.float64)
    counts *= rng.random(64) < (0.5 if sparse else 1.0)
    beyond = float(rng.integers(0, 5))
    if counts.sum() == 0:
        return
    best = least_divergence(counts, beyond, levels)
    each = {kept: divergence(counts, beyond, levels, kept) for kept in range(levels, 65)}
    least = min(each.values())
    assert each[best] <= least + 1e-9 * max(1.0, abs(least))


@pytest.mark.parametrize("shape", ["normal", "laplace", "student", "relu", "uniform", "shifted"])
def test_entropy_is_as_good_as_on_a_histogram_of_the_raw_values(shape: str) -> None:
    values = drawn(shape)
    found = find_range(histogram(values), "entropy")
    raw = np.abs(values[values != 0])
    counts, edges = np.histogram(raw, 2048, (0, float(raw.max())))
    levels = 128 if values.min() < 0 < values.max() else 256
    top = max(-found.low, found.high)
    kept = int(np.clip(np.searchsorted(edges, top * (1 - 1e-6)), levels, 2048))
    reached = divergence(counts, 0, levels, kept)
    least = min(divergence(counts, 0, levels, k) for k in range(levels, 2049, 16))
    # the bins differ by a tenth of a level, so the noise of single counts does too
    assert reached <= 1.1 * least + 1e-4


def test_entropy_is_not_led_astray_by_one_outlier() -> None:
    found = find_range(histogram(drawn("outlier")), "entropy")
    assert 3 < found.high < 10
    assert 3 < -found.low < 10
    far = np.append(drawn("normal"), np.float32(1e6))
    assert 3 < find_range(histogram(far), "entropy").high < 10


def test_entropy_does_not_mind_zeros() -> None:
    values = drawn("normal")
    some = find_range(histogram(np.append(values, np.zeros(300_000, np.float32))), "entropy")
    assert some == find_range(histogram(values), "entropy")


def raw_error(values: Array, low: float, high: float, dtype: Any, symmetric: bool) -> float:
    back = activation_code(low, high, dtype, symmetric).approximate(values)
    return float(np.mean(np.square(back.astype(np.float64) - values)))


@pytest.mark.parametrize("shape", ["normal", "relu", "laplace", "student", "shifted", "uniform", "outlier", "negative"])
@pytest.mark.parametrize(("dtype", "symmetric"), [(np.uint8, False), (np.int8, True), (np.uint8, True)])
def test_least_error_is_near_the_best_of_a_grid_on_raw_values(shape: str, dtype: Any, symmetric: bool) -> None:
    values = drawn(shape, 20_000)
    found = find_range(histogram(values), "mse", dtype=dtype, symmetric=symmetric)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    cuts = np.geomspace(1.0, 0.03, 30)
    if symmetric:
        peak = max(-low, high)
        grid = [(max(low, -peak * c), min(high, peak * c)) for c in cuts]
    else:
        grid = [(low * a, high * b) for a in cuts for b in cuts]
    best = min(raw_error(values, a, b, dtype, symmetric) for a, b in grid)
    # a bin is a quarter of a step at most, so its middle stands for its values but for 1/16 of a step's error
    assert raw_error(values, found.low, found.high, dtype, symmetric) <= 1.03 * best


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_is_within_the_values(method: str, shape: str) -> None:
    values = drawn(shape, 3000)
    found = find_range(histogram(values), method)
    assert np.isfinite([found.low, found.high]).all()
    assert found.low <= found.high
    peak = float(np.abs(values).max()) * (1 + 1e-6)
    assert -peak <= found.low
    assert found.high <= peak


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-45, 3.4e38, -3.4e38])
@pytest.mark.parametrize("method", METHODS)
def test_constants_have_a_range(method: str, value: float) -> None:
    found = find_range(histogram(np.full(10, value, np.float32)), method)
    code = activation_code(found.low, found.high)
    assert np.isfinite(code.scale)
    if abs(value) < 1e38:
        np.testing.assert_allclose(code.approximate(np.array([value], np.float32)), value, rtol=0.01, atol=1e-38)


def test_masks_do_not_hide_the_rest_from_percentiles() -> None:
    values = np.append(drawn("normal"), np.full(5, -3.4e38, np.float32))
    found = find_range(histogram(values), "percentile", percent=99.9)
    assert -4 < found.low < -3
    assert 3 < found.high < 4


def test_wrong_requests_are_refused() -> None:
    held = histogram(np.ones(3))
    with pytest.raises(SpecError, match="no calibration method 'entropi'") as caught:
        find_range(held, "entropi")
    assert "did you mean 'entropy'?" in str(caught.value)
    with pytest.raises(SpecError, match="percent"):
        find_range(held, "min-max", percent=3)
    with pytest.raises(SpecError, match="from 50 to 100"):
        find_range(held, "percentile", percent=0.99)
    with pytest.raises(SpecError, match="smoothing"):
        find_range(held, "moving-average", smoothing=0.5)
    with pytest.raises(SpecError, match="at least as many bins"):
        find_range(held, "entropy", bins=64)
    with pytest.raises(DataError, match="no finite values"):
        find_range(Histogram(), "min-max")


def test_magnitudes_keep_every_value() -> None:
    held = histogram(drawn("normal")).bins()
    counts = magnitudes(held, float(np.abs(drawn("normal")).max()), 2048)
    np.testing.assert_allclose(counts.sum(), 200_000, rtol=1e-9)
    expected = np.histogram(np.abs(drawn("normal")), 2048, (0, float(np.abs(drawn("normal")).max())))[0]
    # the highest octaves' bins are up to twice as wide as these: sums over eight of them agree but for the ends
    np.testing.assert_allclose(counts.reshape(-1, 8).sum(1), expected.reshape(-1, 8).sum(1), atol=60, rtol=0.05)


# --- ONNX Runtime's calibrators


MODEL = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N, 64] x) => (float[N, 64] y) { z = Tanh(x)  y = Relu(x) }
"""


@pytest.fixture
def batches() -> list[dict[str, Array]]:
    # the first holds the extremes: ORT's later bins are no finer than those it began with
    made = [{"x": drawn("laplace", 64 * 500, seed).reshape(500, 64)} for seed in range(4)]
    return sorted(made, key=lambda feeds: -float(np.abs(feeds["x"]).max()))


def by_ort(kind: Any, batches: list[dict[str, Array]], tmp_path: Path, **options: Any) -> dict[str, Range]:
    from onnxruntime.quantization import calibrate as ort_calibrate

    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    calibrator = getattr(ort_calibrate, kind)(path, augmented_model_path=str(tmp_path / "a.onnx"), **options)
    calibrator.augment_graph()
    calibrator.create_inference_session()

    class Reader(ort_calibrate.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[dict[str, Array]] = iter(batches)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.rest, None)

    calibrator.collect_data(Reader())
    found = calibrator.compute_data()
    return {
        name: Range(float(np.min(data.range_value[0])), float(np.max(data.range_value[1])))
        for name, data in found.data.items()
    }


def by_us(batches: list[dict[str, Array]], method: str, **options: Any) -> dict[str, Range]:
    from graphopt.calibrate import calibrate

    found = calibrate(onnx.parser.parse_model(MODEL), batches)
    return {name: found.range(name, method, **options) for name in found.names}


def close(mine: Range, its: Range, slack: float) -> None:
    assert abs(mine.low - its.low) <= slack, (mine, its)
    assert abs(mine.high - its.high) <= slack, (mine, its)


def test_min_max_is_onnx_runtimes(batches: list[dict[str, Array]], tmp_path: Path) -> None:
    theirs = by_ort("MinMaxCalibrater", batches, tmp_path)
    for name, mine in by_us(batches, "min-max").items():
        assert mine == theirs[name]


def test_averaged_extremes_are_onnx_runtimes(batches: list[dict[str, Array]], tmp_path: Path) -> None:
    theirs = by_ort("MinMaxCalibrater", batches, tmp_path, moving_average=True)
    for name, mine in by_us(batches, "moving-average", smoothing=0.0).items():
        close(mine, theirs[name], 1e-5)  # float32 sums


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
def test_percentiles_are_onnx_runtimes(batches: list[dict[str, Array]], tmp_path: Path, percent: float) -> None:
    theirs = by_ort("PercentileCalibrater", batches, tmp_path, percentile=percent, num_bins=8192)
    for name, mine in by_us(batches, "percentile", percent=percent).items():
        peak = max(float(np.abs(feeds["x"]).max()) for feeds in batches) if name != "z" else 1.0
        # it returns an edge of one of its bins, 2 / 8192 of the range wide; ours are 2^-10 of the value
        close(mine, theirs[name], 2 * 2 * peak / 8192 + BIN * max(-mine.low, mine.high))


def test_entropy_is_near_onnx_runtimes(batches: list[dict[str, Array]], tmp_path: Path) -> None:
    theirs = by_ort("EntropyCalibrater", batches, tmp_path, num_bins=1024, num_quantized_bins=127)["x"]
    mine = by_us(batches, "entropy", bins=512, levels=64)["x"]
    # its levels take the same whole number of bins each, and the last one the rest, so its minimum lies elsewhere
    assert 0.8 < mine.high / theirs.high < 1.25
    assert 0.8 < mine.low / theirs.low < 1.25
