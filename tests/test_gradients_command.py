"""`graphopt gradients`: what it writes is the gradient, criteria take it, and bad input gets one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from graphopt.bridge.gradient import gradients  # noqa: E402  (torch first)
from graphopt.cli import app  # noqa: E402
from graphopt.errors import DataError, ModelError, SpecError  # noqa: E402
from graphopt.gradients import read_gradients  # noqa: E402
from graphopt.model import load  # noqa: E402
from graphopt.models.digits import demo_model, task  # noqa: E402
from graphopt.pruner import prune  # noqa: E402
from graphopt.quality import Bound  # noqa: E402
from graphopt.runtime import Session  # noqa: E402
from graphopt.sparsifier import sparsify  # noqa: E402
from graphopt.training import TrainSettings  # noqa: E402

Array = np.ndarray[Any, Any]

TASK = """
import numpy as np

def train():
    rng = np.random.default_rng(3)
    for _ in range(3):
        x = rng.normal(size=(4, 6)).astype(np.float32)
        yield {"x": x}, (x @ np.ones((6, 2), np.float32)) * np.float32(0.5)

def unlabelled():
    yield {"x": np.zeros((4, 6), np.float32)}

def wild():
    yield {"x": np.zeros((4, 6), np.float32)}, np.full((4, 2), 1e30, np.float32)
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def linear() -> onnx.ModelProto:
    """Return y = x w + b."""
    rng = np.random.default_rng(0)
    held = {"w": rng.normal(size=(6, 2)).astype(np.float32), "b": np.zeros(2, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", s]) for n, s in (("x", 6), ("y", 2))]
    graph = helper.make_graph(
        nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(v, n) for n, v in held.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    onnx.save(linear(), tmp_path / "m.onnx")
    return tmp_path


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["gradients", *map(str, words)])
    return done.exit_code, done.output if done.exception is None else f"{done.output}{done.exception}"


def by_hand(batches: list[tuple[Array, Array]]) -> list[Array]:
    """Return d mean((x w - y)²) / dw for each batch."""
    w = numpy_helper.to_array(linear().graph.initializer[0]).astype(np.float64)
    return [2.0 * x.T @ (x @ w - y) / y.size for x, y in batches]


@pytest.mark.parametrize("moment", ["first", "second"])
def test_it_is_the_gradient(folder: Path, moment: str) -> None:
    out = folder / "g.npz"
    code, text = run(folder / "m.onnx", "--train", f"{folder}/task.py:train", "--loss", "mse", "--batch", 4,
                     "--moment", moment, "-o", out)  # fmt: skip
    assert code == 0, text
    found = read_gradients(out, load(folder / "m.onnx"))
    rng = np.random.default_rng(3)
    drawn = [np.asarray(rng.normal(size=(4, 6)).astype(np.float32)) for _ in range(3)]
    given = [(x, (x @ np.ones((6, 2), np.float32)) * np.float32(0.5)) for x in drawn]
    each = by_hand(given)
    if moment == "first":  # batches are drawn anew, the mean over rows is not
        np.testing.assert_allclose(found["w"], np.mean(each, axis=0), atol=1e-5)  # sums of 12 products in float32
    else:
        assert found["w"].min() >= 0.0
        assert np.all(found["w"] >= np.abs(np.mean(each, axis=0)) - 1e-5)  # a mean square is never below a squared mean
    assert set(found) == {"w", "b"}


def test_json_and_table(folder: Path) -> None:
    words = (folder / "m.onnx", "--train", f"{folder}/task.py:train", "-o", folder / "g.npz")
    code, text = run(*words, "--json")
    document = json.loads(text)
    assert (code, document["moment"]) == (0, "first")
    assert document["gradients"]["w"]["shape"] == [6, 2]
    assert document["gradients"]["w"]["norm"] > 0
    assert "norm of the gradient" in run(*words)[1]


def test_the_same_bytes_again(folder: Path) -> None:
    files = [folder / "a.npz", folder / "b.npz"]
    for file in files:
        assert run(folder / "m.onnx", "--train", f"{folder}/task.py:train", "--batch", 5, "-o", file)[0] == 0
    one, two = (read_gradients(file, load(folder / "m.onnx")) for file in files)
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_only_and_freeze(folder: Path) -> None:
    model, train = folder / "m.onnx", f"{folder}/task.py:train"
    assert set(gradients(model, train, TrainSettings(freeze=("b",)))) == {"w"}
    assert set(gradients(model, train, TrainSettings(only=("b",)))) == {"b"}


def test_what_is_refused(folder: Path) -> None:
    model, task_file = folder / "m.onnx", folder / "task.py"
    with pytest.raises(SpecError, match="unknown moment 'third'"):
        gradients(model, f"{task_file}:train", TrainSettings(), moment="third")
    with pytest.raises(DataError, match="label"):
        gradients(model, f"{task_file}:unlabelled", TrainSettings())
    with pytest.raises(DataError, match="the loss is inf"):
        gradients(model, f"{task_file}:wild", TrainSettings(loss="mse"))
    with pytest.raises(ModelError, match="nothing to take gradients by"):
        gradients(model, f"{task_file}:train", TrainSettings(freeze=("*",)))
    code, text = run(model, "--train", f"{task_file}:train", "-o", folder / "g.txt")
    assert code != 0
    assert "gradients are written as .npz" in text


def right(model: Any) -> float:
    return float(np.mean(task.accuracy(Session(model, threads=1).run, limit=300)))


def test_digits_pruned_by_gradients(tmp_path: Path) -> None:
    out = tmp_path / "digits.npz"
    code, text = run(demo_model(), "--train", f"{task.__file__}:train", "--batch", 64, "--subset", 320, "-o", out)
    assert code == 0, text
    base: Any = {"target_macs": 0.75, "bound": Bound(defaults=False), "measure": False}
    by_taylor = right(prune(demo_model(), criterion="taylor", gradients=out, **base).model)
    by_chance = right(prune(demo_model(), criterion="random", **base).model)
    assert by_taylor > by_chance + 0.2  # 0.6 and 0.09 here; a class by chance is 0.1
    half = sparsify(
        demo_model(), amount=0.4, criterion="gradient", gradients=out, measure=False, bound=Bound(defaults=False)
    )
    chance = sparsify(demo_model(), amount=0.4, criterion="random", measure=False, bound=Bound(defaults=False))
    assert right(half.model) > right(chance.model) + 0.2
