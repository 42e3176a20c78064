"""Training data: what may be given, in which batches it comes, what is refused, what augmentation makes of it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from collections.abc import Iterator  # noqa: E402  (after the check for torch)
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import onnx.parser  # noqa: E402
import scipy.sparse  # noqa: E402

from graphopt.bridge.augment import STRENGTHS  # noqa: E402
from graphopt.bridge.batches import TrainingData, load_training_data  # noqa: E402
from graphopt.bridge.row_store import RowStore, gather  # noqa: E402
from graphopt.bridge.standardize import standardize  # noqa: E402
from graphopt.errors import DataError, SpecError  # noqa: E402
from graphopt.model import Model, load  # noqa: E402
from graphopt.optimizer import optimize  # noqa: E402
from graphopt.runtime import Session  # noqa: E402
from graphopt.training import TrainSettings  # noqa: E402

Array = np.ndarray[Any, Any]


def parsed(graph: str, opset: int = 17) -> Model:
    return load(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {graph}'))


DENSE = "dense (float[N, 3] x) => (float[N, 4] y) <float[3, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12}> { y = MatMul(x, w) }"
FIXED = DENSE.replace("float[N, 3]", "float[4, 3]").replace("float[N, 4]", "float[4, 4]")
PIXELS = "pixels (float[N, 2, 5, 6] x) => (float[N, 2, 5, 6] y) { y = Relu(x) }"
STATEFUL = """stateful (float[1, 3] x, float[2, 3] state) => (float[2, 3] y) { y = Add(x, state) }"""
MIXED = """mixed (float[N, 3] x) => (float[N, 3] y) { m = ReduceMean <axes = [0], keepdims = 1> (x) y = Sub(x, m) }"""
LENGTHS = """lengths (float[N, T, 2] x) => (float[N, 2] y) { y = ReduceMean <axes = [1], keepdims = 0> (x) }"""


def rows(count: int = 10, width: int = 3) -> Array:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def loaded(spec: Any, model: str = DENSE, *, labelled: bool = False, seed: int = 0, **settings: Any) -> TrainingData:
    return load_training_data(spec, parsed(model), TrainSettings(**settings), seed=seed, labelled=labelled)


def seen(data: TrainingData, epoch: int = 0, **kwargs: Any) -> list[list[int]]:
    return [batch.index.tolist() for batch in data.epoch(epoch, **{"seed": 0, "batch": 4, **kwargs})]


def test_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    data = loaded([{"x": rows()}])
    assert data.rows == 10
    assert seen(data) == seen(data)
    assert seen(data) != seen(data, epoch=1) != seen(data, epoch=1, seed=1)
    assert sorted(map(len, seen(data))) == [2, 4, 4]
    assert sorted(i for batch in seen(data) for i in batch) == list(range(10))
    assert data.batches(4) == 3


def test_start_leaves_out_what_was_seen() -> None:
    data = loaded([{"x": rows()}])
    assert seen(data, start=2) == seen(data)[2:]
    assert seen(data, start=3) == []


@pytest.mark.parametrize("count", [8, 9, 10, 13])
def test_two_processes_see_together_what_one_sees_with_twice_the_batch(count: int) -> None:
    data = loaded([{"x": rows(count)}])
    alone = [set(batch) for batch in seen(data, batch=8)]
    ranks = [list(data.epoch(0, seed=0, batch=4, rank=rank, world=2)) for rank in range(2)]
    assert [len(r) for r in ranks] == [data.batches(4, 2)] * 2 == [len(alone)] * 2
    for step, (first, second) in enumerate(zip(*ranks, strict=True)):
        counted = [b for b in (first, second) if b.share > 0]
        assert set().union(*(b.index.tolist() for b in counted)) == alone[step]
        assert sum(len(b.index) for b in counted) == len(alone[step])
        mean = sum(float(b.feeds["x"].mean()) * b.share for b in (first, second)) / 2
        assert mean == pytest.approx(float(rows(count)[sorted(alone[step])].mean()), rel=1e-5)  # float32 sums


def test_rows_of_one_shape_share_a_batch() -> None:
    feeds = [{"x": np.full((1, 3 + i % 2, 2), i, np.float32)} for i in range(10)]
    data = loaded(feeds, LENGTHS)
    for batch in data.epoch(0, seed=0, batch=4):
        assert batch.feeds["x"][:, 0, 0].tolist() == batch.index.tolist()
        assert len({i % 2 for i in batch.index}) == 1
    assert data.batches(4) == len(seen(data)) == 4


def test_a_fixed_batch_is_filled_from_any_feeds_and_a_rest_is_left_for_another_epoch() -> None:
    data = loaded([{"x": rows(3)}, {"x": rows(7) + 9}], FIXED, batch=32)
    assert data.batch == 4
    assert [len(batch) for batch in seen(data, batch=32)] == [4, 4]
    assert {i for epoch in range(9) for batch in seen(data, epoch) for i in batch} == set(range(10))
    assert any("2 of 10" in note for note in data.notes)
    ranks = [list(data.epoch(0, seed=0, batch=32, rank=rank, world=3)) for rank in range(3)]
    assert [[len(b.index) for b in r] for r in ranks] == [[4]] * 3
    assert [r[0].share for r in ranks] == [1.5, 1.5, 0.0]


def test_too_few_rows_for_a_fixed_batch() -> None:
    with pytest.raises(DataError, match="3 samples do not fill one batch of 4"):
        loaded([{"x": rows(3)}], FIXED)


def test_a_model_with_a_state_takes_a_feed_at_a_time() -> None:
    feeds = [({"x": np.full((1, 3), i, np.float32), "state": np.zeros((2, 3), np.float32)}, i) for i in range(5)]
    data = loaded(feeds, STATEFUL)
    assert data.batch == 1
    assert sorted(seen(data)) == [[0], [1], [2], [3], [4]]
    batch = next(iter(data.epoch(0, seed=0, batch=8)))
    assert batch.feeds["x"].shape == (1, 3)
    assert batch.feeds["state"].shape == (2, 3)
    ranks = [list(data.epoch(0, seed=0, batch=1, rank=rank, world=2)) for rank in range(2)]
    assert sorted(int(b.index[0]) for r in ranks for b in r if b.share) == [0, 1, 2, 3, 4]


def test_rows_that_depend_on_each_other_stay_together() -> None:
    data = loaded([{"x": rows(4)}, {"x": rows(6)}], MIXED)
    assert data.rows == 2
    assert any("not independent" in note for note in data.notes)
    assert sorted(len(b.feeds["x"]) for b in data.epoch(0, seed=0, batch=4)) == [4, 6]


@pytest.mark.parametrize(
    ("inputs", "feeds"),
    [
        ("float[N, 3] x, float[M, 3] z", [{"x": rows(n), "z": rows(2)} for n in (3, 4)]),
        ("float x, float[N, 3] z", [{"x": np.array(1, np.float32), "z": rows(n)} for n in (3, 4)]),
    ],
)
def test_inputs_without_rows_in_common_are_fed_as_they_come(inputs: str, feeds: list[dict[str, Array]]) -> None:
    text = "a = ReduceSum <keepdims = 0> (x) b = ReduceSum <keepdims = 0> (z) y = Add(a, b)"
    model = f"two ({inputs}) => (float y) {{ {text} }}"
    data = loaded(feeds, model)
    assert data.batch == 1
    found = {int(b.index[0]): b.feeds for b in data.epoch(0, seed=0, batch=4)}
    assert all(np.array_equal(found[i][name], array) for i, feed in enumerate(feeds) for name, array in feed.items())


def test_inputs_of_one_batch_have_the_same_rows() -> None:
    model = "two (float[N, 3] x, float[N, 3] z) => (float[N, 3] y) { y = Add(x, z) }"
    with pytest.raises(DataError, match="different numbers of rows: 'x' 3, 'z' 2"):
        loaded([{"x": rows(3), "z": rows(2)}], model)


@pytest.mark.parametrize("model", [FIXED, FIXED.replace("4, 3", "1, 3").replace("4, 4", "1, 4"), STATEFUL])
def test_an_npz_for_a_model_with_a_fixed_batch(model: str, tmp_path: Path) -> None:
    state = {"state": np.ones((20, 2, 3), np.float32)} if model == STATEFUL else {}
    labels = {"label": np.zeros((20, 2, 3), np.float32)} if model == STATEFUL else {"label": LABELS}
    data = loaded(save(tmp_path / "a.npz", x=rows(20), **state, **labels), model, labelled=True)
    assert data.rows == 20
    assert data.batch == (4 if model == FIXED else 1)
    for batch in data.epoch(0, seed=0, batch=32):
        assert batch.feeds["x"].tolist() == rows(20)[batch.index].tolist()
        assert len(batch.index) == data.batch
    assert sum(len(batch) for batch in seen(data)) == 20


def save(path: Path, **arrays: Array) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def labels_of(data: TrainingData) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for batch in data.epoch(0, seed=0, batch=4):
        assert isinstance(batch.labels, torch.Tensor)
        found.update(zip(batch.index.tolist(), batch.labels.tolist(), strict=True))
    return found


WANTED = dict(enumerate([0, 1, 2, 3] * 5))
LABELS = np.array([0, 1, 2, 3] * 5)


def pairs() -> Iterator[tuple[dict[str, Array], Array]]:
    for start in range(0, 20, 5):
        yield {"x": rows(20)[start : start + 5]}, LABELS[start : start + 5]


class Pairs:
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Array, int]:
        return rows(20)[index], int(LABELS[index])


FUNCTION = """import numpy as np
def train():
    for i in range(20):
        yield {"x": np.arange(60, dtype="float32").reshape(20, 3)[i : i + 1]}, np.array([i % 4])
"""


def given(how: str, folder: Path) -> Any:
    if how == "npz":
        return save(folder / "a.npz", x=rows(20), label=LABELS)
    if how == "entries":
        return save(folder / "a.npz", x=rows(20).reshape(5, 4, 3), label=LABELS.reshape(5, 4))
    if how == "folder":
        for i in range(4):
            save(folder / f"{i}.npz", x=rows(20)[5 * i : 5 * i + 5], labels=LABELS[5 * i : 5 * i + 5])
        return str(folder)
    if how == "file":
        (folder / "task.py").write_text(FUNCTION)
        return f"{folder / 'task.py'}:train"
    if how == "sparse":
        return [({"x": scipy.sparse.csr_matrix(rows(20))}, LABELS)]
    if how == "dict":
        return [{"x": rows(20), "target": LABELS}]
    if how == "one-hot":
        return [({"x": rows(20)}, LABELS.tolist())]
    if how == "singles":
        return [({"x": rows(20)[i : i + 1]}, i % 4) for i in range(20)]
    return {
        "function": pairs, "list": list(pairs()), "loader": torch.utils.data.DataLoader(Pairs(), batch_size=6),
    }[how]  # fmt: skip


WAYS = ["npz", "entries", "folder", "file", "sparse", "dict", "one-hot", "singles", "function", "list", "loader"]


@pytest.mark.parametrize("how", WAYS)
def test_ways_to_give_feeds_with_labels(how: str, tmp_path: Path) -> None:
    data = loaded(given(how, tmp_path), labelled=True)
    assert data.rows == 20
    assert labels_of(data) == WANTED
    for batch in data.epoch(3, seed=0, batch=4):
        assert batch.feeds["x"].dtype == torch.float32
        assert batch.feeds["x"].tolist() == rows(20)[batch.index].tolist()


@pytest.mark.parametrize("how", ["npz", "function"])
def test_labels_that_nobody_needs_are_left_out(how: str, tmp_path: Path) -> None:
    data = loaded(given(how, tmp_path))
    assert not data.labelled
    assert all(batch.labels is None for batch in data.epoch(0, seed=0, batch=4))


def test_a_generator_may_reuse_its_array() -> None:
    def make() -> Iterator[dict[str, Array]]:
        buffer = np.zeros((1, 3), np.float32)
        for i in range(4):
            buffer[:] = i
            yield {"x": buffer}

    for batch in loaded(make).epoch(0, seed=0, batch=4):
        assert batch.feeds["x"][:, 0].tolist() == batch.index.tolist()


@pytest.mark.parametrize("budget", [0, 60, 1 << 20])
def test_what_exceeds_memory_comes_from_a_file(budget: int) -> None:
    feeds = [{"x": rows(20)[i : i + 5]} for i in range(0, 20, 5)]
    data = load_training_data(feeds, parsed(DENSE), TrainSettings(), labelled=False, budget=budget)
    assert bool(data.notes) == (budget < 240)
    for batch in data.epoch(0, seed=0, batch=4):
        assert batch.feeds["x"].tolist() == rows(20)[batch.index].tolist()
        assert batch.feeds["x"].add_(1) is not None  # a tensor of its own, to be written to


def test_spilled_pieces_keep_types_and_odd_shapes() -> None:
    store = RowStore(0)
    wanted = [np.arange(6).reshape(3, 2, 1).astype(dtype) for dtype in (np.float16, np.int64, np.bool_)]
    pieces = [store.keep(array) for array in wanted]
    for piece, array in zip(pieces, wanted, strict=True):
        assert np.array_equal(piece.all(), array)
        assert np.array_equal(gather([piece], np.zeros(2, np.int64), np.array([2, 0])), array[[2, 0]])
    assert store.keep(np.empty((0, 2))).all().shape == (0, 2)


def test_sequences_of_labels_are_padded_to_share_a_batch() -> None:
    model = "steps (float[N, 5, 4] x) => (float[N, 5, 4] y) { y = Softmax <axis = -1> (x) }"
    labels = [[1 + (i + k) % 3 for k in range(1 + i % 3)] for i in range(9)]
    feeds = [({"x": np.full((1, 5, 4), i, np.float32)}, [labels[i]]) for i in range(9)]
    data = loaded(feeds, model, labelled=True)
    assert data.batches(4) == 3
    assert labels_of(data) == {i: row + [-1] * (3 - len(row)) for i, row in enumerate(labels)}


def test_a_loader_that_shuffles_is_read_in_one_order() -> None:
    shuffled = torch.utils.data.DataLoader(Pairs(), batch_size=6, shuffle=True)
    state = torch.random.get_rng_state()
    first, second, third = (labels_of(loaded(shuffled, labelled=True, seed=seed)) for seed in (0, 0, 1))
    assert first == second != third
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_subset_is_drawn_once_by_seed() -> None:
    first, again, other = (loaded([{"x": rows(50)}], subset=10, seed=s) for s in (0, 0, 1))
    assert first.rows == 10
    assert first.samples.tolist() == again.samples.tolist() != other.samples.tolist()
    assert sorted(i for batch in seen(first) for i in batch) == first.samples.tolist()
    assert loaded([{"x": rows(5)}], subset=10).rows == 5


@pytest.mark.parametrize("labelled", [False, True])
def test_stratified_subset_keeps_the_parts(labelled: bool) -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 30, 15, 5])
    data = loaded([({"x": rows(100)}, labels)], labelled=labelled, subset=20, sampling="stratified")
    assert np.bincount(labels[data.samples]).tolist() == [10, 6, 3, 1]
    assert data.labelled == labelled


def test_stratified_needs_a_class_per_sample() -> None:
    with pytest.raises(DataError, match="no one label per sample"):
        loaded([{"x": rows(10)}], subset=5, sampling="stratified")
    with pytest.raises(DataError, match="cannot be stratified by labels of shape"):
        loaded([({"x": rows(10)}, rows(10, 1))], subset=5, sampling="stratified")


def test_parts_are_disjoint_and_only_the_first_is_augmented() -> None:
    data = loaded([{"x": rows(40)}], augment=("noise",))
    parts = [part for part in data.parted(0.1, judges=True) if part is not None]
    assert [part.rows for part in parts] == [32, 4, 4]
    assert sorted(np.concatenate([part.samples for part in parts])) == list(range(40))
    changed = [
        not torch.equal(b.feeds["x"], torch.from_numpy(rows(40)[b.index]))
        for part in parts
        for b in part.epoch(0, seed=0, batch=32)
    ]
    assert changed == [True, False, False]


BAD: dict[str, tuple[Any, str]] = {
    "nothing": (None, "no samples to train on"),
    "empty": ([], "empty"),
    "no rows": ([({"x": rows(0)}, LABELS[:0])], "empty"),
    "no labels": ([{"x": rows(4)}], "labels are missing"),
    "feeds not a dict": ([(1, 2, 3)], "item of 3 parts"),
    "another input": ([({"z": rows(4)}, LABELS[:4])], "no input 'z'"),
    "another name beside a label": ([{"X": rows(4), "label": LABELS[:4]}], "input 'x' is not fed"),
    "shape": ([({"x": rows(4, 2)}, LABELS[:4])], "shape \\[4, 2\\]"),
    "type": ([({"x": rows(4).astype(np.float64)}, LABELS[:4])], "type float64"),
    "sparse type": ([({"x": scipy.sparse.csr_matrix(rows(4), dtype=np.float64)}, LABELS[:4])], "type float64"),
    "NaN": ([({"x": rows(4) * np.nan}, LABELS[:4])], "12 of 12 values are NaN"),
    "infinite labels": ([({"x": rows(4)}, np.full((4, 4), np.inf))], "16 of 16 values are NaN"),
    "text": ([({"x": rows(4)}, np.array(["a", "b", "c", "d"]))], "labels are numbers"),
    "fewer labels": ([({"x": rows(4)}, LABELS[:3])], "3 in 'labels' for 4 rows"),
    "out of range": ([({"x": rows(20)}, np.append(LABELS[:19], 4))], "label 4 where there are 4 classes"),
    "negative": ([({"x": rows(4)}, np.array([0, 1, 2, -7]))], "label -7"),
    "label shape": ([({"x": rows(4)}, np.zeros((4, 3), np.int64))], "labels of shape \\[4, 3\\] do not fit"),
    "float classes": ([({"x": rows(4)}, np.zeros(4, np.float32))], "float labels of shape \\[4\\] do not fit"),
    "which": ([{"x": rows(4), "a": LABELS[:4], "b": LABELS[:4]}], "which of these are the labels: a, b"),
    "unknown output": ([({"x": rows(4)}, {"z": LABELS[:4]})], "labels for 'z', which is no output"),
    "generator": (pairs(), "read more than once"),
    "missing file": ("nowhere.npz", "do not exist"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data_give_one_clear_error(what: str) -> None:
    spec, message = BAD[what]
    with pytest.raises(DataError, match=message):
        loaded(spec, labelled=True)


def test_labels_by_output_and_in_padded_places() -> None:
    data = loaded([({"x": rows(4)}, {"y": np.array([0, -1, -100, 3])})], labelled=True)
    batch = next(iter(data.epoch(0, seed=0, batch=4)))
    assert isinstance(batch.labels, dict)
    assert batch.labels["y"].tolist() == [[0, -1, -100, 3][i] for i in batch.index]


def images(count: int = 6) -> Array:
    return np.random.default_rng(0).random((count, 2, 5, 6), np.float32)


def augmented(*texts: str, spec: Any = None, model: str = PIXELS, epoch: int = 0, **kwargs: Any) -> dict[int, Array]:
    data = loaded([{"x": images()}] if spec is None else spec, model, augment=texts)
    batches = data.epoch(epoch, **{"seed": 0, "batch": 4, **kwargs})
    return {int(i): row.numpy() for b in batches for i, row in zip(b.index, b.feeds["x"], strict=True)}


def alike(a: dict[int, Array], b: dict[int, Array]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[i], b[i]) for i in a)


@pytest.mark.parametrize("name", STRENGTHS)
def test_augmentation_depends_on_seed_epoch_and_sample_alone(name: str) -> None:
    once = augmented(name)
    assert alike(once, augmented(name, batch=3))
    assert not alike(once, augmented(name, epoch=1))
    assert not alike(once, augmented(name, seed=1))
    assert not alike(once, dict(enumerate(images())))
    assert all(row.dtype == np.float32 and np.isfinite(row).all() for row in once.values())


def test_flips_are_exact_in_both_layouts() -> None:
    wanted = {i: image[:, :, ::-1] for i, image in enumerate(images())}
    assert alike(augmented("flip=1"), wanted)
    assert alike(augmented("flip=1", "vflip=1"), {i: image[:, ::-1] for i, image in wanted.items()})
    last = np.moveaxis(images(), 1, 3)
    nhwc = PIXELS.replace("2, 5, 6", "5, 6, 2")
    assert alike(
        augmented("flip=1", spec=[{"x": np.ascontiguousarray(last)}], model=nhwc),
        {i: np.moveaxis(image, 0, 2) for i, image in wanted.items()},
    )


def test_a_quarter_turn_of_a_square_turns_it() -> None:
    from graphopt.bridge.images import moved

    square = np.random.default_rng(0).random((1, 1, 5, 5), np.float32)
    turn = np.array([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    # interpolation at exact places: only the rounding of places in float32 is left
    assert np.allclose(moved(square, turn), np.rot90(square, axes=(2, 3)), atol=1e-5)
    right = np.array([[[1.0, 0.0, 2 / 5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    assert np.allclose(moved(square, right)[..., :4], square[..., 1:], atol=1e-5)


def test_bytes_stay_bytes() -> None:
    bytes_ = (images() * 255).astype(np.uint8)
    model = "p (uint8[N, 2, 5, 6] x) => (float[N, 2, 5, 6] y) { y = Cast <to = 1> (x) }"
    texts = ("rotate=30", "brightness=0.9", "noise=0.5")
    out = augmented(*texts, spec=[{"x": bytes_}], model=model)
    assert all(row.dtype == np.uint8 for row in out.values())
    assert not alike(out, dict(enumerate(bytes_)))


def test_features_take_noise_but_not_moves() -> None:
    out = augmented("noise=0.1", spec=[{"x": rows()}], model=DENSE)
    assert 0 < np.abs(np.stack([out[i] for i in range(10)]) - rows()).max() < 2
    with pytest.raises(SpecError, match="'rotate' is for images"):
        augmented("rotate", spec=[{"x": rows()}], model=DENSE)
    with pytest.raises(SpecError, match="'cutout' is for images"):
        augmented("cutout", spec=[{"x": rows()}], model=DENSE)


@pytest.mark.parametrize("text", ["flop", "rotate=x", "rotate=-3", "crop=1.5", "noise=0", "noise=inf"])
def test_unknown_augmentations_and_strengths(text: str) -> None:
    with pytest.raises(SpecError):
        augmented(text)


def test_mixup_mixes_soft_labels_and_refuses_numbers() -> None:
    one_hot = np.eye(4, dtype=np.float32)[LABELS]
    feeds = {"x": np.tile(LABELS[:, None], 3).astype(np.float32)}
    data = loaded([(feeds, one_hot)], labelled=True, augment=("mixup=1",), loss="cross-entropy")
    for batch in data.epoch(0, seed=0, batch=20):
        assert isinstance(batch.labels, torch.Tensor)
        assert torch.allclose(batch.labels @ torch.arange(4.0), batch.feeds["x"][:, 0], atol=1e-5)  # mixed alike
        assert bool(((batch.labels > 0.001) & (batch.labels < 0.999)).any())
    with pytest.raises(DataError, match="whole numbers"):
        loaded([({"x": rows(20)}, LABELS)], labelled=True, augment=("mixup",))


CONV = """conv (float[N, 2, 5, 6] x) => (float[N, 3, {h}, {w}] y)
<float[3, 2, 3, 3] k = {{{values}}}, float[3] b = {{1, 2, 3}}>
{{ y = Conv <pads = [{pad}, {pad}, {pad}, {pad}]> (x, k, b) }}"""


def conv(pad: int) -> Model:
    values = ", ".join(f"{v:.3f}" for v in np.random.default_rng(0).normal(size=54))
    return parsed(CONV.format(h=3 + 2 * pad, w=4 + 2 * pad, values=values, pad=pad))


@pytest.mark.parametrize("kind", ["standard", "range"])
def test_standardised_inputs_are_part_of_the_graph_and_of_the_first_layer(kind: Any) -> None:
    model = conv(0)
    data = images(20) * np.array([3, 0.1], np.float32)[:, None, None] + np.array([5, -2], np.float32)[:, None, None]
    out = standardize(model, [{"x": data[:11]}, {"x": data[11:]}], kind=kind)
    wide = data.astype(np.float64)
    if kind == "standard":
        wanted = (wide - wide.mean((0, 2, 3), keepdims=True)) / wide.std((0, 2, 3), keepdims=True)
    else:
        least, most = wide.min((0, 2, 3), keepdims=True), wide.max((0, 2, 3), keepdims=True)
        wanted = (wide - least) / (most - least)
    expected = Session(model).run({"x": wanted.astype(np.float32)})["y"]
    # x * scale + shift rounds twice in float32, of values up to 50 deviations from 0
    assert np.allclose(Session(out).run({"x": data})["y"], expected, atol=1e-3)
    folded = optimize(out, measure=False).model
    assert [node.op for node in folded.graph.nodes] == ["Conv"]
    assert np.allclose(Session(folded).run({"x": data})["y"], expected, atol=1e-3)


def test_of_a_padded_convolution_the_scale_goes_in() -> None:
    out = optimize(standardize(conv(1), [{"x": images(20)}]), measure=False).model
    assert [node.op for node in out.graph.nodes] == ["Add", "Conv"]


def test_features_and_constant_columns() -> None:
    data = rows(10) * np.array([1, 0, 2], np.float32) + 7
    out = Session(standardize(parsed(DENSE), [{"x": data}])).run({"x": data})["y"]
    wanted = Session(parsed(DENSE)).run(
        {"x": np.where(data.std(0) > 0, (data - data.mean(0)) / (data.std(0) + 1e-30), 0)}
    )
    assert np.allclose(out, wanted["y"], atol=1e-3)


def test_what_cannot_be_standardised() -> None:
    with pytest.raises(SpecError, match="no input 'X'"):
        standardize(parsed(DENSE), [{"x": rows()}], inputs=["X"])
    with pytest.raises(SpecError, match="unknown kind"):
        standardize(parsed(DENSE), [{"x": rows()}], kind="minmax")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="no axis 2"):
        standardize(parsed(DENSE), [{"x": rows()}], axis=2)
    with pytest.raises(DataError, match="had 3 before"):
        standardize(parsed(LENGTHS), [{"x": np.ones((1, n, 2), np.float32)} for n in (3, 4)], axis=1)


HOOKS = """
def noisy(feeds, rng):
    return {"x": feeds["x"] + rng.random(3)}

def both(feeds, labels, rng):
    return {"x": feeds["x"] * 0}, labels * 0

def wrong(feeds, rng):
    return feeds["x"]

def broken(feeds, rng):
    return {"x": feeds["z"]}
"""


def test_functions_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "hooks.py"
    file.write_text(HOOKS)
    out = augmented(f"{file}:noisy", spec=[{"x": rows()}], model=DENSE)
    assert all(0 < np.abs(row - rows()[i]).max() < 1 and row.dtype == np.float32 for i, row in out.items())
    assert alike(out, augmented(f"{file}:noisy", spec=[{"x": rows()}], model=DENSE, batch=3))
    data = loaded([({"x": rows(20)}, LABELS)], labelled=True, augment=(f"{file}:both",))
    batch = next(iter(data.epoch(0, seed=0, batch=20)))
    assert isinstance(batch.labels, torch.Tensor)
    assert not batch.labels.any()
    assert not batch.feeds["x"].any()
    with pytest.raises(DataError, match="returned ndarray"):
        augmented(f"{file}:wrong", spec=[{"x": rows()}], model=DENSE)
    with pytest.raises(DataError, match="KeyError"):
        augmented(f"{file}:broken", spec=[{"x": rows()}], model=DENSE)


def test_labels_of_pixels_are_not_left_behind() -> None:
    pixels = np.zeros((6, 5, 6), np.int64)
    with pytest.raises(DataError, match="labels of pixels"):
        loaded([({"x": images()}, pixels)], PIXELS, labelled=True, augment=("flip",), loss="cross-entropy")
