"""The loop on graphs: masks, statistics, half precision, projections of taps, and what training leaves as it was."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from pathlib import Path  # noqa: E402  (after the check for torch)
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from graphopt.bridge import TrainableGraph  # noqa: E402
from graphopt.bridge.history import History  # noqa: E402
from graphopt.bridge.loop import train  # noqa: E402
from graphopt.bridge.objective import distill_objective, task_objective  # noqa: E402
from graphopt.bridge.parts import Judge  # noqa: E402
from graphopt.model import Model, load  # noqa: E402
from graphopt.runtime import Session  # noqa: E402
from graphopt.training import DistillSettings, TrainSettings  # noqa: E402
from tests.training_script import graph, image_net, images  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings(**options: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": 3, "batch": 8, "rate": 0.02, **options})


def trained(
    asked: TrainSettings, masks: dict[str, Any] | None = None, dropout: float = 0.0, judge: Judge | None = None
) -> tuple[TrainableGraph, History]:
    model = load(image_net(dropout=dropout))
    objective = task_objective(model, asked)
    bridge = TrainableGraph(
        model, taps=objective.taps, only=asked.only, freeze=asked.freeze, batch_norm=asked.batch_norm, masks=masks
    )
    return bridge, train(bridge, images(model, asked), objective, asked, judge=judge)


def values(model: Model) -> dict[str, np.ndarray[Any, Any]]:
    return {c.name: np.array(c.values) for c in model.constants()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_masked_weights_stay_zero_and_the_others_are_trained(optimizer: str) -> None:
    masks = {name: np.random.default_rng(3).random(shape) < 0.5 for name, shape in
             {"conv1": (8, 3, 3, 3), "conv2": (8, 8, 3, 3)}.items()}  # fmt: skip
    asked = settings(optimizer=optimizer, ema=0.8, l1=1e-3, group_lasso=1e-3, weight_decay=0.1)
    bridge, _ = trained(asked, masks)
    before, after = values(bridge.model), values(bridge.write_back())
    for name, mask in masks.items():
        assert not after[name][~mask].any()
        assert not bridge.parameters[name].detach().numpy()[~mask].any()  # and so are the averages, and what decays
        assert (after[name][mask] != before[name][mask]).mean() > 0.9


@pytest.mark.parametrize("options", [{"batch": 4, "accumulate": 2}, {"batch": 3, "accumulate": 4}])
def test_accumulation_is_a_larger_batch_where_statistics_are_frozen(options: dict[str, Any]) -> None:
    rows = options["batch"] * options["accumulate"]
    plain = {"optimizer": "sgd", "rate": 0.05, "clip": 1.0, "ema": 0.5}
    whole, first = trained(settings(**plain, batch=rows))
    parts, second = trained(settings(**plain, **options))
    assert first.steps == second.steps
    expected, found = values(whole.write_back()), values(parts.write_back())
    for name, array in expected.items():  # sums in another order
        np.testing.assert_allclose(found[name], array, rtol=0, atol=3e-6, err_msg=name)


def test_statistics_are_trained_or_frozen() -> None:
    names = {"mean", "variance"}
    for kind in ("frozen", "train"):
        bridge, _ = trained(settings(batch_norm=kind))
        before, after = values(bridge.model), values(bridge.write_back())
        moved = {name for name, array in before.items() if not np.array_equal(array, after[name])}
        assert moved == {"conv1", "conv2", "linear", "bias", "scale", "shift"} | (names if kind == "train" else set())


def test_frozen_tensors_stay() -> None:
    bridge, _ = trained(settings(freeze=("conv*",), l1=0.1, weight_decay=0.5, group_lasso=0.1))
    before, after = values(bridge.model), values(bridge.write_back())
    assert {name for name, array in before.items() if not np.array_equal(array, after[name])} == {
        "linear", "bias", "scale", "shift",
    }  # fmt: skip


def test_averaged_statistics_are_what_ort_judges() -> None:
    """The judge sees the model that is written in the end, statistics included."""
    x = np.random.default_rng(2).normal(size=(4, 3, 8, 8)).astype(np.float32)
    seen: list[Any] = []

    def judge(model: Model) -> float:
        seen.append(Session(model, threads=1).run({"x": x})["logits"])
        return float(len(seen))

    bridge, _ = trained(settings(batch_norm="train", ema=0.7), judge=judge)
    with torch.no_grad():
        own = bridge.module.eval()({"x": x})["logits"].numpy()
    np.testing.assert_allclose(own, seen[-1], rtol=0, atol=1e-5)  # torch and ORT sum in other orders
    assert np.array_equal(Session(bridge.write_back(), threads=1).run({"x": x})["logits"], seen[-1])


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_autocast_of_convolutions(kind: str) -> None:
    exact, _ = trained(settings(epochs=6))
    bridge, history = trained(settings(epochs=6, autocast=kind))
    losses = [row.terms["loss"] for row in history.rows]
    assert losses[-1] < losses[0]
    difference = np.abs(values(bridge.write_back())["conv1"] - values(exact.write_back())["conv1"]).max()
    assert 1e-6 < difference < 0.3  # it computes otherwise, and goes the same way


def test_float16_loses_no_update() -> None:
    """Gradients that overflow are computed again: the first step is as large as any."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "steps": 1, "warmup": 0.0, "schedule": "constant", "clip": 1e-2}

    def moved(asked: TrainSettings) -> float:
        model = load(image_net(dropout=0.0))
        objective = task_objective(model, asked)
        bridge = graph(asked, model, objective.taps)
        before = bridge.parameters["conv1"].detach().clone()
        train(bridge, images(model, asked), lambda o, b: {"loss": 1e4 * objective(o, b)["loss"]}, asked)
        return float((bridge.parameters["conv1"].detach() - before).norm())

    expected = moved(settings(**plain))
    assert expected > 0
    assert moved(settings(**plain, autocast="float16")) == pytest.approx(expected, rel=0.02)


def test_projections_are_trained_and_resumed(tmp_path: Path) -> None:
    """The student's tap has 8 channels, the teacher's 3: the checkpoint holds what projects it, and the scale."""
    asked = DistillSettings(epochs=2, batch=8, rate=1e-3, taps=("r=x",), tap_weight=10.0, autocast="float16")
    found: list[tuple[dict[str, Any], bytes]] = []
    for steps in (None, 5, None):
        model = load(image_net(dropout=0.2))
        objective = distill_objective(model, load(image_net(dropout=0.0)), asked)
        (projection,) = objective.parameters
        bridge = graph(asked, model, objective.taps)
        data = images(model, asked)
        folder = None if not found else tmp_path / "c"
        before = projection.detach().clone()
        try:
            train(
                bridge, Stopping(data, steps), objective, asked, checkpoint=folder, resume=len(found) == 2,
                checkpoint_seconds=0.0,
            )  # fmt: skip
        except KeyboardInterrupt:
            assert steps
        assert not torch.equal(before, projection)
        found.append((values(bridge.write_back()), projection.detach().numpy().tobytes()))
    assert found[0][1] == found[2][1]
    assert all(array.tobytes() == found[2][0][name].tobytes() for name, array in found[0][0].items())


class Stopping:
    """Data whose reader is interrupted after so many batches."""

    def __init__(self, data: Any, steps: int | None) -> None:
        self.data, self.steps, self.read = data, steps, 0
        self.rows, self.batch, self.batches = data.rows, data.batch, data.batches

    def epoch(self, epoch: int, **options: Any) -> Any:
        for batch in self.data.epoch(epoch, **options):
            if self.read == self.steps:
                raise KeyboardInterrupt
            self.read += 1
            yield batch


def test_same_seed_same_model() -> None:
    emitted = []
    for _ in range(2):
        bridge, _ = trained(settings(ema=0.9, batch_norm="train"), dropout=0.3)
        emitted.append(bridge.write_back().proto.SerializeToString(deterministic=True))
    assert emitted[0] == emitted[1]
