"""Pipelines that train, with torch: after cuts, factors, zeros and codes, on a small network and its own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from graphopt.data import load_samples  # noqa: E402  (torch first)
from graphopt.errors import DataError  # noqa: E402
from graphopt.model import Model, load  # noqa: E402
from graphopt.pipeline import Pipeline, Result, Settings  # noqa: E402
from graphopt.runtime import Session  # noqa: E402
from graphopt.samples import Samples  # noqa: E402

Array = np.ndarray[Any, Any]

LABELS = """
import numpy as np

def train():
    rng = np.random.default_rng(1)
    way = np.random.default_rng(2).normal(size=(12, 3))
    for _ in range(8):
        x = rng.normal(size=(16, 12)).astype(np.float32)
        yield {"x": x}, (x @ way).argmax(axis=1)
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def network(seed: int = 0) -> onnx.ModelProto:
    """Return a convolution with normalisation, pooling, and two dense layers that end in three logits."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return np.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])), np.float32)

    held = {
        "cw": normal(16, 1, 3, 3), "scale": np.ones(16, np.float32), "shift": np.zeros(16, np.float32),
        "mean": np.zeros(16, np.float32), "var": np.ones(16, np.float32), "shape": np.array([0, 1, 3, 4], np.int64),
        "w1": normal(192, 24), "b1": np.zeros(24, np.float32), "w2": normal(24, 3),
    }  # fmt: skip
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["i"]), helper.make_node("Conv", ["i", "cw"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]), helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "w1", "b1"], ["h"]), helper.make_node("Relu", ["h"], ["g"]),
        helper.make_node("MatMul", ["g", "w2"], ["logits"]),
    ]  # fmt: skip
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", s]) for n, s in (("x", 12), ("logits", 3))]
    held_tensors = [numpy_helper.from_array(v, n) for n, v in held.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], held_tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    return load_samples([{"x": rng.normal(size=(16, 12)).astype(np.float32)} for _ in range(8)], load(network()))


def run(pipeline: str, model: Any = None) -> Result:
    settings = Settings(verify="off", on_failure="stop")
    return Pipeline(pipeline).run(network() if model is None else model, samples=samples(), settings=settings)


def values(model: Model) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}


def error(model: Model) -> float:
    """Return the mean squared error of a model's logits against the network's, on samples that train nothing."""
    feeds = list(samples(9))
    one, two = (Session(m, threads=1) for m in (network(), model.proto))
    return float(np.mean([(one.run(f)["logits"] - two.run(f)["logits"]) ** 2 for f in feeds]))


STEPS = "distill{steps=60, output_loss=mse}"
CUTS = {
    "channels": "prune-channels{ratio=0.5, round_to=1}",
    "ranks": "factorize-layers{rank=4}",
    "zeros": "sparsify-weights{amount=0.8, spread=per-layer}",
    "codes": "quantize-static",
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=list(CUTS))
def test_what_was_cut_is_learned_again(cut: str) -> None:
    before = run(cut)
    few = "distill{steps=60, rate=0.0003, output_loss=mse}"  # 8 bits lose next to nothing
    train = few if cut == CUTS["codes"] else STEPS
    after = run(f"{cut}, {train}")
    assert [r.status for r in after.report.passes] == ["changed", "changed"]
    assert error(after.model) < (1.1 if cut == CUTS["codes"] else 0.7) * error(before.model)
    assert [n.op for n in after.model.nodes()] == [n.op for n in before.model.nodes()]
    if cut == CUTS["zeros"]:
        np.testing.assert_array_equal(values(after.model)["w1"] == 0, values(before.model)["w1"] == 0)
    onnx.checker.check_model(after.proto, full_check=True)
    again = run(f"{cut}, {train}", after.proto)
    assert again.report.passes[1].status != "changed"


def test_zeros_stay_and_rewind(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(LABELS)
    train = f'finetune{{data="{task}:train", epochs=2}}'
    result = run(f"{train}, sparsify-weights{{amount=0.75}}, {train}, rewind-weights, {train}")
    assert [r.status for r in result.report.passes] == ["changed"] * 5
    first, last = values(load(network())), values(result.model)
    assert np.mean(last["w1"] == 0) == pytest.approx(0.75, abs=1 / 4608)
    assert np.abs(last["w1"] - np.where(last["w1"] == 0, 0, first["w1"])).max() > 0  # trained once more
    ticket = run(f"{train}, sparsify-weights{{amount=0.75}}, rewind-weights")
    held = values(ticket.model)
    np.testing.assert_array_equal(held["w1"], np.where(held["w1"] == 0, 0, first["w1"]))
    np.testing.assert_array_equal(held["cw"], first["cw"])


def test_gradients_in_a_pipeline(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(LABELS)
    taken = f'take-gradients{{data="{task}:train"}}'
    result = run(f"{taken}, prune-channels{{ratio=0.5, criterion=taylor, round_to=1}}")
    assert result.report.passes[1].status == "changed"
    assert "gradients of" in result.report.passes[0].notes[0]
    assert result.report.passes[0].status != "changed"


def test_gradual_schedule_of_the_toml_form(tmp_path: Path) -> None:
    from graphopt.optimizer import read_pipeline

    file = tmp_path / "steps.toml"
    file.write_text(
        "[[step]]\ngradual = 3\n[[step.step]]\npass = 'sparsify-weights'\namount = {from = 0.0, to = 0.9}\n"
        "[[step.step]]\npass = 'distill'\nsteps = 20\n"
    )
    settings = Settings(verify="off", on_failure="stop")
    result = read_pipeline(file).run(network(), samples=samples(), settings=settings)
    assert [r.status for r in result.report.passes] == ["changed"] * 6
    assert np.mean(values(result.model)["w1"] == 0) == pytest.approx(0.9, abs=1 / 4608)
    at_once = run("sparsify-weights{amount=0.9}")
    assert error(result.model) < error(at_once.model)


def test_the_same_seed_gives_the_same_bytes() -> None:
    one, two = (run(STEPS.replace("60", "5")).proto.SerializeToString(deterministic=True) for _ in range(2))
    assert one == two


def test_what_cannot_be_trained_is_a_near_miss() -> None:
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 12]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    near = run("distill", model).report.passes[0]
    assert (near.status, near.blocked[0]["why"]) == ("unchanged", "it has nothing to train")


def test_bad_data_is_one_error(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(LABELS.replace("argmax(axis=1)", "argmax(axis=1) + 7"))
    with pytest.raises(DataError, match="label 9 where there are 3 classes"):
        run(f'finetune{{data="{task}:train"}}')


def test_defaults_of_inputs_and_another_teacher(tmp_path: Path) -> None:
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [192, 24]))
    onnx.save(network(1), tmp_path / "teacher.onnx")
    result = run(f'distill{{steps=10, rate=0.01, teacher="{tmp_path}/teacher.onnx"}}', model)
    before, after = values(load(model)), values(result.model)
    assert np.abs(after["w1"] - before["w1"]).max() > 0.001  # ten updates at up to 0.01
    assert [i.name for i in result.proto.graph.input] == ["x", "w1"]
    twin = run(f'distill{{steps=10, rate=0.01, teacher="{tmp_path}/teacher.onnx"}}')
    np.testing.assert_array_equal(values(twin.model)["w1"], after["w1"])
