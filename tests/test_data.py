"""Samples in every form, what is refused and why, and random feeds."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.data import load_function, load_samples
from graphopt.errors import DataError
from graphopt.model import Model, load
from graphopt.runtime import Session
from graphopt.samples import Samples

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any] | None = None) -> Model:
    """Return a model from (name, type, shape) of inputs and outputs."""
    graph = helper.make_graph(
        nodes, "test", [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )  # fmt: skip
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def adder(shape: list[Any], kind: int = FLOAT) -> Model:
    return model_of([helper.make_node("Add", ["x", "x"], ["y"])], [("x", kind, shape)], [("y", kind, shape)])


def stateful() -> Model:
    """A float (N, 4) input, a state (2, 4) and a scalar."""
    nodes = [
        helper.make_node("ReduceSum", ["state"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["t"]),
        helper.make_node("Add", ["t", "scale"], ["y"]),
    ]
    inputs = [("x", FLOAT, ["N", 4]), ("state", FLOAT, [2, 4]), ("scale", FLOAT, [])]
    return model_of(nodes, inputs, [("y", FLOAT, ["N", 4])])


def rows(count: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.arange(count * int(np.prod(shape)), dtype=np.float32).reshape(count, *shape)


class TestNpz:
    def test_cut_along_the_first_axis(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(5, 4))
        feeds = list(load_samples(tmp_path / "a.npz", adder(["N", 4]), batch=2))
        assert [f["x"].shape for f in feeds] == [(2, 4), (2, 4), (1, 4)]
        assert np.array_equal(np.concatenate([f["x"] for f in feeds]), rows(5, 4))

    def test_can_be_iterated_again(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "a.npz", x=rows(3, 4))
        samples = load_samples(str(tmp_path / "a.npz"), adder(["N", 4]))
        assert [f["x"][0, 0] for f in samples] == [f["x"][0, 0] for f in samples] == [0, 4, 8]

    def test_rank_plus_one_is_one_feed_per_entry(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(3, 2, 4))
        assert [f["x"].shape for f in load_samples(tmp_path / "a.npz", adder(["N", 4]))] == [(2, 4)] * 3

    def test_fixed_batch_of_the_model_is_used(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(6, 4))
        assert len(list(load_samples(tmp_path / "a.npz", adder([3, 4])))) == 2
        with pytest.raises(DataError, match="batches of 3, not 2"):
            list(load_samples(tmp_path / "a.npz", adder([3, 4]), batch=2))

    def test_entries_that_make_no_whole_batch(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(5, 4))
        with pytest.raises(DataError, match="5 entries do not make batches of 3"):
            list(load_samples(tmp_path / "a.npz", adder([3, 4])))

    def test_states_and_scalars_go_into_every_feed(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(3, 4), state=np.ones((2, 4), np.float32), scale=np.float32(2))
        feeds = list(load_samples(tmp_path / "a.npz", stateful()))
        assert len(feeds) == 3
        assert all(f["state"].shape == (2, 4) and f["scale"].shape == () for f in feeds)

    def test_uneven_counts(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(3, 4), state=np.ones((4, 2, 4), np.float32), scale=np.float32(2))
        with pytest.raises(DataError, match="different numbers of feeds: 'x' 3, 'state' 4"):
            list(load_samples(tmp_path / "a.npz", stateful()))

    def test_labels_are_left_alone_and_said(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(1, 4), label=np.array([1]))
        samples = load_samples(tmp_path / "a.npz", adder(["N", 4]))
        assert "not an input: label" in samples.description
        assert list(next(iter(samples))) == ["x"]

    def test_missing_array_names_the_nearest(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", images=rows(1, 4))
        model = model_of(
            [helper.make_node("Abs", ["image"], ["y"])], [("image", FLOAT, [1, 4])], [("y", FLOAT, [1, 4])]
        )
        with pytest.raises(DataError, match="no array for input 'image'") as error:
            list(load_samples(tmp_path / "a.npz", model))
        assert error.value.hint == "did you mean 'images'?"

    def test_rows_are_read_one_batch_at_a_time(self, tmp_path: Path) -> None:
        """Peak memory stays below a tenth of the array: 4 of 400 rows are held at once, with room for copies."""
        np.savez(tmp_path / "a.npz", x=np.zeros((400, 10_000), np.float32))
        samples = load_samples(tmp_path / "a.npz", adder(["N", 10_000]), batch=4)
        tracemalloc.start()
        count = sum(1 for _ in samples)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 100
        assert peak < 1_600_000

    def test_objects_are_not_unpickled(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
        with pytest.raises(DataError, match="pickled"):
            list(load_samples(tmp_path / "a.npz", adder(["N", 4])))

    def test_a_header_that_claims_more_than_there_is(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 1000)})
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("x.npy", buffer.getvalue() + b"\0" * 64)
        with pytest.raises(DataError, match="claims 4000000000000 bytes and holds 64"):
            list(load_samples(tmp_path / "a.npz", adder(["N", 1000])))

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"not a zip"])
    def test_not_an_archive(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"not an \.npz"):
            list(load_samples(tmp_path / "a.npz", adder(["N", 4])))

    def test_column_order(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.asfortranarray(rows(3, 4)))
        with pytest.raises(DataError, match="column by column"):
            list(load_samples(tmp_path / "a.npz", adder(["N", 4])))

    def test_big_endian_numbers_and_text(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=rows(2, 4).astype(">f4"))
        found = next(iter(load_samples(tmp_path / "a.npz", adder(["N", 4]))))["x"]
        assert found.dtype == np.float32
        assert found[0, 1] == 1.0
        words = model_of(
            [helper.make_node("Identity", ["s"], ["y"])],
            [("s", TensorProto.STRING, ["N"])],
            [("y", TensorProto.STRING, ["N"])],
        )
        np.savez(tmp_path / "b.npz", s=np.array(["a", "bc"]))
        feeds = list(load_samples(tmp_path / "b.npz", words, batch=2))
        assert Session(words).run(feeds[0])["y"].tolist() == ["a", "bc"]


class TestFolders:
    def test_npz_files_in_order_each_one_feed(self, tmp_path: Path) -> None:
        for i, width in enumerate((3, 5)):
            np.savez(tmp_path / f"{i}.npz", x=np.full((2, width), i, np.float32))
        samples = load_samples(tmp_path, adder(["N", "W"]))
        assert [f["x"].shape for f in samples] == [(2, 3), (2, 5)]
        assert samples.description.startswith("2 feeds of ")

    @pytest.mark.parametrize("parent", [False, True])
    def test_onnx_test_data(self, tmp_path: Path, parent: bool) -> None:
        for i in (0, 2, 10):
            folder = tmp_path / f"test_data_set_{i}"
            folder.mkdir()
            tensor = numpy_helper.from_array(np.full((1, 4), i, np.float32), "whatever")
            (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
        samples = load_samples(tmp_path if parent else tmp_path / "test_data_set_2", adder(["N", 4]))
        assert [f["x"][0, 0] for f in samples] == ([0, 2, 10] if parent else [2])

    def test_sequences(self, tmp_path: Path) -> None:
        info = helper.make_tensor_sequence_value_info("s", FLOAT, ["N"])
        graph = helper.make_graph(
            [helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0)],
            "g",
            [info],
            [helper.make_tensor_value_info("y", FLOAT, ["M"])],
        )
        model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
        folder = tmp_path / "test_data_set_0"
        folder.mkdir()
        value = numpy_helper.from_list([np.ones(2, np.float32), np.zeros(3, np.float32)], "s")
        (folder / "input_0.pb").write_bytes(value.SerializeToString())
        feed = next(iter(load_samples(folder, model)))
        assert Session(model).run(feed)["y"].tolist() == [1, 1, 0, 0, 0]

    def test_missing_input_file(self, tmp_path: Path) -> None:
        (tmp_path / "test_data_set_0").mkdir()
        with pytest.raises(DataError, match=r"no input_0.pb for input 'x'"):
            list(load_samples(tmp_path, adder([1, 4])))

    def test_damaged_proto(self, tmp_path: Path) -> None:
        (tmp_path / "input_0.pb").write_bytes(b"\xff\xff\xff")
        with pytest.raises(DataError, match="not a tensor"):
            list(load_samples(tmp_path, adder([1, 4])))

    def test_external_data_is_refused(self, tmp_path: Path) -> None:
        tensor = TensorProto(data_type=FLOAT, dims=[1, 4], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/passwd")
        (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
        with pytest.raises(DataError, match="another file"):
            list(load_samples(tmp_path, adder([1, 4])))

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no samples"):
            load_samples(tmp_path, adder([1, 4]))


class TestFunctions:
    def write(self, path: Path, text: str) -> str:
        (path / "task.py").write_text(text)
        return str(path / "task.py")

    def test_generator_is_called_for_every_pass(self, tmp_path: Path) -> None:
        file = self.write(
            tmp_path,
            "import numpy as np\n"
            "def feeds():\n    for i in range(3):\n        yield {'x': np.full((1, 4), i, np.float32)}\n",
        )
        samples = load_samples(f"{file}:feeds", adder(["N", 4]))
        assert len(list(samples)) == len(list(samples)) == 3
        assert [f["x"][0, 0] for f in samples.limit(2)] == [0, 1]

    def test_two_files_of_one_name_do_not_meet(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        first = load_function(self.write(tmp_path / "a", "def f():\n    return 1\n") + ":f")
        second = load_function(self.write(tmp_path / "b", "def f():\n    return 2\n") + ":f")
        assert (first(), second()) == (1, 2)

    def test_neighbouring_modules_can_be_imported(self, tmp_path: Path) -> None:
        (tmp_path / "neighbour_of_task.py").write_text("value = 7\n")
        file = self.write(tmp_path, "from neighbour_of_task import value\ndef f():\n    return value\n")
        assert load_function(f"{file}:f")() == 7

    @pytest.mark.parametrize(
        ("text", "name", "what", "hint"),
        [
            ("def feeds():\n    pass\n", "feed", "no function 'feed'", "did you mean 'feeds'"),
            ("feeds = 3\n", "feeds", "not a function", ""),
            ("def feeds(:\n", "feeds", "SyntaxError", "line 1"),
            ("import numpyy\n", "feeds", "ModuleNotFoundError", "line 1"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, text: str, name: str, what: str, hint: str) -> None:
        file = self.write(tmp_path, text)
        with pytest.raises(DataError) as error:
            load_function(f"{file}:{name}")
        assert what in error.value.what
        assert hint in (error.value.hint or "")

    def test_an_error_inside_names_file_and_line(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, "def feeds():\n    yield {}['x']\n")
        with pytest.raises(DataError, match="KeyError") as error:
            list(load_samples(f"{file}:feeds", adder(["N", 4])))
        assert "task.py, line 2, in feeds" in (error.value.hint or "")

    def test_missing_file(self, tmp_path: Path) -> None:
        self.write(tmp_path, "")
        with pytest.raises(DataError, match="does not exist") as error:
            load_function(str(tmp_path / "tasks.py") + ":f")
        assert error.value.hint == "did you mean 'task.py'?"


class TestPython:
    def test_lists_functions_and_single_feeds(self) -> None:
        feed = {"x": np.ones((1, 4), np.float32)}

        def two() -> Iterator[dict[str, Any]]:
            yield feed
            yield feed

        model = adder(["N", 4])
        for spec, count in (([feed], 1), (feed, 1), (two, 2), (load_samples([feed], model), 1)):
            samples = load_samples(spec, model)
            assert len(list(samples)) == len(list(samples)) == count
            assert not samples.random

    def test_an_iterator_is_refused(self) -> None:
        with pytest.raises(DataError, match="once only"):
            load_samples(iter([{}]), adder(["N", 4]))

    def test_no_feeds_at_all(self) -> None:
        with pytest.raises(DataError, match="empty"):
            list(load_samples([], adder(["N", 4])))


class TestChecks:
    @pytest.mark.parametrize(
        ("feed", "what", "hint"),
        [
            ({"X": np.ones((1, 4), np.float32)}, "no input 'X'", "its inputs: x"),
            ({}, "input 'x' is not fed", "the model needs: x"),
            ({"x": np.ones((1, 4))}, "type float64 where the model takes float32", "array.astype('float32')"),
            ({"x": np.ones((1, 4), np.int64)}, "type int64", "astype"),
            ({"x": np.ones((1, 5), np.float32)}, r"shape [1, 5] where the model takes [N,4]", ""),
            ({"x": np.ones(4, np.float32)}, "shape [4]", "the batch axis is missing"),
            ({"x": [[1.0, 2.0, 3.0, 4.0]]}, "an array is needed, not list", "numpy.asarray"),
        ],
    )
    def test_one_clear_error(self, feed: dict[str, Any], what: str, hint: str) -> None:
        good = {"x": np.ones((1, 4), np.float32)}
        with pytest.raises(DataError) as error:
            list(load_samples([good, feed], adder(["N", 4])))
        assert what in error.value.what
        assert "sample 1" in (error.value.at or "")
        assert hint in (error.value.hint or "")

    def test_channels_last(self) -> None:
        with pytest.raises(DataError) as error:
            list(load_samples([{"x": np.ones((1, 8, 9, 3), np.float32)}], adder(["N", 3, "H", "W"])))
        assert "transpose(0, 3, 1, 2)" in (error.value.hint or "")

    @pytest.mark.parametrize("spec", ["nowhere.npz", "nowhere", "file.txt"])
    def test_paths_that_do_not_exist(self, spec: str) -> None:
        with pytest.raises(DataError, match="do not exist"):
            load_samples(spec, adder(["N", 4]))


def gather(bound: int, offset: int = 0) -> Model:
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=INT64),
        helper.make_node("Add", ["wide", "offset"], ["moved"]),
        helper.make_node("Gather", ["table", "moved"], ["y"]),
    ]
    constants = {"table": np.zeros((bound, 2), np.float32), "offset": np.int64(offset)}
    return model_of(nodes, [("ids", TensorProto.INT32, ["batch", "seq"])], [("y", FLOAT, None)], constants)


class TestRandom:
    def test_two_shapes_known_dimensions_kept_same_for_a_seed(self) -> None:
        model = adder(["batch", 3, "h", "w"])
        samples = load_samples(None, model, seed=5)
        first, second = [f["x"] for f in samples]
        assert first.shape[1] == second.shape[1] == 3
        assert first.shape != second.shape
        assert np.array_equal(first, next(iter(load_samples(None, model, seed=5)))["x"])
        assert not np.array_equal(first, next(iter(load_samples(None, model, seed=6)))["x"])
        assert samples.random
        assert samples.description.startswith("2 random feeds (seed 5; x 1x3x224x224, then x 2x3x")

    def test_indices_stay_in_the_table(self) -> None:
        for feed in load_samples(None, gather(7, offset=3)):
            assert feed["ids"].dtype == np.int32
            assert 0 <= feed["ids"].min() <= feed["ids"].max() < 4

    def test_one_symbol_one_size(self) -> None:
        model = model_of(
            [helper.make_node("MatMul", ["a", "b"], ["y"])],
            [("a", FLOAT, ["n", "k"]), ("b", FLOAT, ["k", "m"])], [("y", FLOAT, ["n", "m"])],
        )  # fmt: skip
        for feed in load_samples(None, model):
            assert feed["a"].shape[1] == feed["b"].shape[0]

    def test_sums_of_symbols(self) -> None:
        model = model_of(
            [helper.make_node("Concat", ["past", "x"], ["y"], axis=1), helper.make_node("Add", ["y", "mask"], ["z"])],
            [
                ("past", FLOAT, ["batch", "past_len"]), ("x", FLOAT, ["batch", "seq"]),
                ("mask", FLOAT, ["batch", "past_len + seq"]),
            ],
            [("z", FLOAT, None)],
        )  # fmt: skip
        for feed in load_samples(None, model):
            assert feed["mask"].shape[1] == feed["past"].shape[1] + feed["x"].shape[1]

    def test_given_shapes_win_and_are_checked(self) -> None:
        model = adder(["batch", 3, "h", "w"])
        for feed in load_samples(None, model, shapes={"x": (2, 3, 10, 12)}):
            assert feed["x"].shape == (2, 3, 10, 12)
        with pytest.raises(DataError, match="no input 'X'"):
            load_samples(None, model, shapes={"X": (1,)})
        with pytest.raises(DataError, match=r"shape \[2, 4, 1, 1\]"):
            load_samples(None, model, shapes={"x": (2, 4, 1, 1)})
        with pytest.raises(DataError, match="for random feeds"):
            load_samples([{}], model, shapes={"x": (2, 3, 1, 1)})

    def test_both_branches_are_taken(self) -> None:
        branches = {
            f"{way}_branch": helper.make_graph(
                [helper.make_node(op, ["x"], [way])], way, [], [helper.make_tensor_value_info(way, FLOAT, [4])]
            )
            for way, op in (("then", "Neg"), ("else", "Abs"))
        }
        nodes = [helper.make_node("Equal", ["rate", "wanted"], ["c"]), helper.make_node("If", ["c"], ["y"], **branches)]
        model = model_of(
            nodes, [("x", FLOAT, [4]), ("rate", INT64, [])], [("y", FLOAT, [4])], {"wanted": np.int64(16000)}
        )
        assert [int(f["rate"]) for f in load_samples(None, model)] == [16000, 8000, 16000, 8000]

    def test_sizes_are_found_by_trying(self) -> None:
        """A Reshape that wants the number of pixels to be a multiple of 240."""
        nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
        model = model_of(
            nodes, [("x", FLOAT, [1, 1, "h", "w"])], [("y", FLOAT, None)], {"shape": np.array([48, 5, -1])}
        )
        for feed in load_samples(None, model):
            assert feed["x"].size % 240 == 0

    def test_values_that_an_operator_accepts(self) -> None:
        model = model_of([helper.make_node("Log", ["x"], ["y"])], [("x", FLOAT, [64])], [("y", FLOAT, [64])])
        for feed in load_samples(None, model):
            assert np.isfinite(Session(model).run(feed)["y"]).all()

    def test_signals_are_rough_then_smooth(self) -> None:
        """White noise has neighbours that are independent (correlation within 0.1 of 0), smooth noise alike ones."""
        for feed, low, high in zip(load_samples(None, adder([1, 3, 64, 64])), (-0.1, 0.5), (0.1, 1.0), strict=True):
            x = feed["x"]
            assert low < float(np.corrcoef(x[..., 1:].ravel(), x[..., :-1].ravel())[0, 1]) < high
            assert 0.8 < float(np.sqrt(np.mean(np.square(x)))) < 1.2

    def test_values_that_saturate_a_sigmoid_are_passed_over(self) -> None:
        """sigmoid(sum(x) - 64) is 0 for any noise of 64 values, and 0.5 for ones: those are fed."""
        nodes = [
            helper.make_node("ReduceSum", ["x"], ["s"], keepdims=1), helper.make_node("Sub", ["s", "c"], ["d"]),
            helper.make_node("Sigmoid", ["d"], ["y"]),
        ]  # fmt: skip
        constants = {"c": np.float32(64.0)}
        model = model_of(nodes, [("x", FLOAT, [1, 64])], [("y", FLOAT, [1, 1])], constants)
        for feed in load_samples(None, model):
            assert Session(model).run(feed)["y"].max() > 1e-3

    def test_nothing_runs(self) -> None:
        nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
        model = model_of(nodes, [("x", FLOAT, ["n"])], [("y", FLOAT, None)], {"shape": np.array([1009, 1013])})
        with pytest.raises(DataError, match="no random feed was found") as error:
            list(load_samples(None, model))
        assert "--shape x=N" in (error.value.hint or "")

    def test_masks_lengths_and_text(self) -> None:
        nodes = [
            helper.make_node("Cast", ["attention_mask"], ["m"], to=FLOAT),
            helper.make_node("Identity", ["words"], ["w"]),
        ]
        model = model_of(
            nodes, [("attention_mask", INT64, ["batch", "seq"]), ("words", TensorProto.STRING, [3])],
            [("m", FLOAT, None), ("w", TensorProto.STRING, [3])],
        )  # fmt: skip
        first, second = load_samples(None, model)
        assert first["attention_mask"].min() == 1
        assert second["attention_mask"][0, 0] == 1
        assert second["attention_mask"][0, -1] == 0
        assert isinstance(first["words"][0], str)

    def test_samples_of_models_without_inputs(self) -> None:
        model = model_of(
            [helper.make_node("Identity", ["c"], ["y"])], [], [("y", FLOAT, [2])], {"c": np.ones(2, np.float32)}
        )
        assert list(load_samples(None, model)) == [{}, {}]


def test_samples_repr() -> None:
    assert repr(Samples(lambda: iter([]), "nothing")) == "<Samples: nothing>"
