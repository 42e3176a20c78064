"""Training as steps of pipelines, with a trainer that needs no torch: what is asked of it, and what is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.data import load_samples
from graphopt.errors import DataError, GraphoptError, ProviderError
from graphopt.model import Model, from_snapshot, load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.registry import get
from graphopt.runtime import Session
from graphopt.samples import Samples
from graphopt.training import DistillSettings, TrainSettings
from graphopt.training_steps import StepTrainer

Array = np.ndarray[Any, Any]

TRAIN = 'finetune{data="task.py:train"}'


def weight(rows: int, columns: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def network() -> onnx.ModelProto:
    """Return two dense layers, the second one's weight in a Constant node."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]), helper.make_node("Add", ["a", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Constant", [], ["w2"], value=numpy_helper.from_array(weight(64, 16, 1), "")),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]  # fmt: skip
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", s]) for n, s in (("x", 32), ("y", 16))]
    weights = {"w1": weight(32, 64, 0), "b1": np.zeros(64, np.float32)}
    held = [numpy_helper.from_array(v, n) for n, v in weights.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples() -> Samples:
    rng = np.random.default_rng(0)
    return load_samples([{"x": rng.normal(size=(4, 32)).astype(np.float32)} for _ in range(4)], load(network()))


def weights_of(model: Model) -> dict[str, Array]:
    proto = model.proto
    held = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    return held | {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in proto.graph.node if n.op_type == "Constant"
    }


class Trainer:
    """Stands for the bridge: adds one hundredth to every weight, but where it is zero; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[TrainSettings, str, str]] = []
        self.teachers: list[dict[str, tuple[int, ...]]] = []

    def train(self, here: StepTrainer, settings: TrainSettings, data: str = "", teacher: str = "") -> tuple[Model, str]:
        self.asked.append((settings, data, teacher))
        self.teachers.append({name: values.shape for name, values in weights_of(here.original()).items()})
        trained = from_snapshot(here.model.snapshot())
        inside = [node.attrs["value"] for node in trained.nodes() if node.op == "Constant"]
        for constant in [*trained.constants(), *inside]:
            constant.values = np.where(constant.values == 0, 0, constant.values + np.float32(0.01)).astype(np.float32)
        return trained, "moved"

    def gradients(self, here: StepTrainer, settings: TrainSettings, data: str, *, moment: str = "first") -> Any:
        self.asked.append((settings, data, moment))
        return {"w1": np.arange(2048, dtype=np.float32).reshape(32, 64), "w2": np.ones((64, 16), np.float32)}


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that a class takes for a method."""

    def method(here: StepTrainer, *args: Any, **options: Any) -> Any:
        return function(here, *args, **options)

    return method


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    fake = Trainer()
    monkeypatch.setattr(StepTrainer, "check", lambda *_, **__: None)
    monkeypatch.setattr(StepTrainer, "refusal", lambda *_: "")
    monkeypatch.setattr(StepTrainer, "train", _method(fake.train))
    monkeypatch.setattr(StepTrainer, "gradients", _method(fake.gradients))
    return fake


def run(pipeline: str, model: Any = None, given: Samples | None = None, **settings: Any) -> Result:
    chosen = Settings(**{"verify": "off", "on_failure": "stop", **settings})
    return Pipeline(pipeline).run(network() if model is None else model, samples=given or samples(), settings=chosen)


def statuses(result: Result) -> list[str]:
    return [record.status for record in result.report.passes]


def test_weights_are_set_and_nothing_else(trainer: Trainer) -> None:
    result = run("distill{steps=3, temperature=4.0}")
    before, after = weights_of(load(network())), weights_of(result.model)
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(after[name], before[name] + np.float32(0.01))
    proto = result.proto
    onnx.checker.check_model(proto, full_check=True)
    assert [n.op_type for n in proto.graph.node] == [n.op_type for n in network().graph.node]
    ((settings, data, teacher),) = trainer.asked
    assert settings == DistillSettings(steps=3, temperature=4.0)
    assert type(settings) is DistillSettings
    assert (data, teacher) == ("", "")
    assert "moved" in result.report.passes[0].notes[0]
    Session(proto).run({"x": np.ones((2, 32), np.float32)})


def test_the_same_request_does_nothing(trainer: Trainer) -> None:
    first = run("distill{steps=3}")
    again = run("distill{steps=3}", first.proto)
    assert statuses(again) != ["changed"]
    assert again.report.passes[0].blocked[0]["why"].startswith("they were trained so already")
    assert again.proto == load(first.proto).proto
    assert len(trainer.asked) == 1
    assert statuses(run("distill{steps=4}", first.proto)) == ["changed"]


def test_changed_weights_are_trained_again(trainer: Trainer) -> None:
    pipeline = "distill{steps=3}, sparsify-weights{amount=0.5}, distill{steps=3}, " + TRAIN
    first = run(pipeline)
    assert statuses(first) == ["changed"] * 4
    again = run(pipeline, first.proto)
    assert not [status for status in statuses(again) if status == "changed"]
    assert again.proto == load(first.proto).proto


def test_labels_come_from_the_pass(trainer: Trainer) -> None:
    run('finetune{data="task.py:train", epochs=2, optimizer=sgd}')
    ((settings, data, _),) = trainer.asked
    assert type(settings) is TrainSettings
    assert (settings.optimizer, settings.epochs, data) == ("sgd", 2.0, "task.py:train")


def test_the_teacher_is_the_model_that_was_given(trainer: Trainer) -> None:
    result = run("prune-channels{ratio=0.5, round_to=1}, distill{steps=3}")
    assert trainer.teachers == [{"w1": (32, 64), "b1": (64,), "w2": (64, 16)}]
    assert weights_of(result.model)["w1"].shape == (32, 32)


def test_a_change_that_is_left_out_is_not_trained(trainer: Trainer) -> None:
    assert statuses(run("distill{steps=3}", limit=0)) != ["changed"]
    assert not trainer.asked


def test_gradual_schedule(trainer: Trainer) -> None:
    schedule = "gradual{times=3}(sparsify-weights{amount={from=0.0, to=0.9}}, distill{steps=5})"
    result = run(schedule)
    assert str(Pipeline(schedule)) == schedule
    assert [r.options.get("amount") for r in result.report.passes][::2] == [0.633333, 0.866667, 0.9]
    assert len(trainer.asked) == 3
    zeros = [float(np.mean(values == 0)) for name, values in weights_of(result.model).items() if name != "b1"]
    sizes = [2048, 1024]
    assert np.isclose(np.dot(zeros, sizes) / sum(sizes), 0.9, atol=0.001)  # one element of 3,072 is 0.0003
    again = run(schedule, result.proto)
    assert not [status for status in statuses(again) if status == "changed"]


def test_options_of_a_schedule_are_checked_at_once() -> None:
    with pytest.raises(GraphoptError, match="amount lies between 0 and 1"):
        Pipeline("gradual{times=2}(sparsify-weights{amount={from=0.0, to=1.5}}, distill)")
    with pytest.raises(GraphoptError, match="must be of type float"):
        Pipeline("sparsify-weights{amount={from=0.0, to=0.5}}")


def test_rewinding_keeps_the_mask(trainer: Trainer) -> None:
    result = run(f"{TRAIN}, sparsify-weights{{amount=0.5}}, rewind-weights")
    first, last = weights_of(load(network())), weights_of(result.model)
    zeros = 0
    for name in ("w1", "w2"):
        mask = last[name] != 0
        zeros += int(np.sum(~mask))
        np.testing.assert_array_equal(last[name], np.where(mask, first[name], 0))
    assert zeros == 1536
    assert statuses(result) == ["changed"] * 3


def test_rewinding_to_after_a_training(trainer: Trainer) -> None:
    result = run("distill{steps=1}, distill{steps=2}, rewind-weights{to=1}, distill{steps=2}, rewind-weights{to=1}")
    np.testing.assert_array_equal(weights_of(result.model)["w1"], weight(32, 64, 0) + np.float32(0.01))
    assert statuses(result) == ["changed"] * 5


def test_nothing_to_rewind_to(trainer: Trainer) -> None:
    near = run("rewind-weights").report.passes[0]
    assert near.blocked[0]["why"] == "this pipeline has not trained it"
    near = run("distill{steps=1}, rewind-weights{to=2}").report.passes[1]
    assert near.blocked[0]["why"] == "this pipeline has not trained it 2 times"
    assert statuses(run("distill{steps=1}, rewind-weights, rewind-weights"))[2] != "changed"


def test_a_weight_of_another_shape_stays(trainer: Trainer) -> None:
    result = run("distill{steps=1}, prune-channels{ratio=0.5, round_to=1}, rewind-weights")
    blocked = {each["where"]: each["why"] for each in result.report.passes[2].blocked}
    assert {"w1", "b1"} <= set(blocked)
    assert "it has changed its form since: [32, 64] float32 then, [32, 32] float32 now" in blocked["w1"]


def test_gradients_are_handed_on(trainer: Trainer) -> None:
    result = run(
        'take-gradients{data="task.py:train"}, sparsify-weights{amount=0.5, criterion=gradient, spread=per-layer}'
    )
    values = weights_of(result.model)["w1"]
    score = np.abs(weight(32, 64, 0)) * np.arange(2048, dtype=np.float32).reshape(32, 64)
    assert np.array_equal(values == 0, score <= np.sort(score.ravel())[1023])
    assert "gradients of 2 tensors" in result.report.passes[0].notes
    with pytest.raises(DataError, match="looks at gradients, and there are none"):
        run("sparsify-weights{criterion=gradient}")


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ("finetune", "there are no labels to train by"),
        ("distill{alpha=0.5}", "there are no labels to train by"),
        ("take-gradients", "there are no labels to train by"),
    ],
)
def test_labels_missing(step: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        run(step)


def test_samples_missing() -> None:
    random = load_samples(None, load(network()))
    for given in (None, random):
        with pytest.raises(DataError, match="weights are trained on samples, and there are none"):
            Pipeline("distill").run(network(), samples=given, settings=Settings(verify="off"))


def test_torch_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("graphopt.bridge")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ProviderError, match="training needs torch, which is not installed") as caught:
        run("distill")
    assert "pip install 'graphopt[train]'" in str(caught.value)


@pytest.mark.parametrize("name", ["distill", "finetune", "rewind-weights", "take-gradients"])
def test_options_are_the_settings(name: str) -> None:
    options = get(name).option_defaults()
    if name in ("distill", "finetune"):
        kind = DistillSettings if name == "distill" else TrainSettings
        assert set(vars(kind())) < set(options)
    with pytest.raises(GraphoptError, match="unknown optimizer 'adan'"):
        Pipeline("distill{optimizer=adan}")


def test_a_graph_that_is_only_written_otherwise_is_not_trained_again(trainer: Trainer) -> None:
    model = network()
    copy = numpy_helper.from_array(np.zeros(64, np.float32), "b2")
    model.graph.initializer.append(copy)
    model.graph.node.insert(2, helper.make_node("Add", ["h", "b2"], ["h2"]))
    model.graph.node[3].input[0] = "h2"
    first = run("distill{steps=3}, eliminate-common", model)
    assert statuses(first) == ["changed", "changed"]
    assert statuses(run("distill{steps=3}", first.proto)) == ["unchanged"]
