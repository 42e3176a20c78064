"""The training loop: options obeyed, gradients weighted by rows, the best kept, a kill without a trace."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from collections.abc import Iterator  # noqa: E402  (after the check for torch)
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

from graphopt.bridge.loop import train  # noqa: E402
from graphopt.model import Model, load  # noqa: E402
from graphopt.training import TrainSettings  # noqa: E402

WIDTHS = {"w1": (8, 6), "w2": (4, 8)}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Rows:
    feeds: dict[str, Any]
    labels: Any
    index: np.ndarray[Any, Any]
    targets: dict[str, Any] = field(default_factory=dict)


class Data:
    """Rows of a plane with four corners, shuffled by seed and epoch."""

    def __init__(self, rows: int = 40, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(rows, 6)).astype(np.float32)
        self.labels = (self.x[:, 0] > 0) * 2 + (self.x[:, 1] > 0)
        self.rows = rows

    def batches(self, batch: int, world: int = 1) -> int:
        return -(-self.rows // (batch * world))

    def epoch(
        self, epoch: int, *, seed: int, batch: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> Iterator[Rows]:
        order = np.random.default_rng([seed, epoch]).permutation(self.rows)
        for number in range(start, self.batches(batch, world)):
            index = order[number * batch * world : (number + 1) * batch * world][rank::world]
            yield Rows({"x": torch.from_numpy(self.x[index])}, torch.from_numpy(self.labels[index]), index)


class Net(nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, parameters: dict[str, nn.Parameter], dropout: float) -> None:
        super().__init__()
        self.held = nn.ParameterDict(parameters)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, feeds: dict[str, Any]) -> dict[str, Any]:
        hidden = torch.relu(feeds["x"] @ self.held["w1"].T + self.held["b1"])
        return {"y": self.dropout(hidden) @ self.held["w2"].T}


class Bridge:
    """What `TrainableGraph` is to the loop: two Gemms, their weights trained."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        self.model = load(gemms(seed))
        held = {c.name: c.values for c in self.model.constants()}
        self.parameters = {name: nn.Parameter(torch.from_numpy(held[name].copy())) for name in ("w1", "b1", "w2")}
        self.roles = {"w1": "weight", "b1": "bias", "w2": "weight"}
        self.module = Net(self.parameters, dropout)
        self.batch: int | None = None

    def channel_axis(self, name: str) -> int:
        return 0

    def write_back(self, into: Model | None = None) -> Model:
        into = into or self.model
        for constant in into.constants():
            constant.values = self.parameters[constant.name].detach().numpy().copy()
        return into


def gemms(seed: int) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape, scale=0.3) for name, shape in {**WIDTHS, "b1": (8,)}.items()}
    held = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Gemm", ["a", "w2"], ["y"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "gemms", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def objective(outputs: dict[str, Any], batch: Rows) -> dict[str, Any]:
    loss = nn.functional.cross_entropy(outputs["y"], batch.labels)
    return {"loss": loss, "cross-entropy": loss}


def weights(bridge: Bridge) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in bridge.parameters.items()}


def settings(**options: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": 3, "batch": 8, "rate": 0.02, **options})


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_loss_falls(optimizer: str) -> None:
    bridge, rate = Bridge(), 0.2 if optimizer == "sgd" else 0.02
    history = train(bridge, Data(), objective, settings(optimizer=optimizer, rate=rate, epochs=10))
    losses = [row.terms["loss"] for row in history.rows]
    assert losses[-1] < 0.6 * losses[0]
    assert history.steps == 50


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 0, 1):
        bridge = Bridge(dropout=0.3)
        train(bridge, Data(), objective, settings(ema=0.9), seed=seed)
        runs.append(weights(bridge))
    assert runs[0] == runs[1] != runs[2]


def test_resume_of_a_finished_training_gives_its_weights(tmp_path: Path) -> None:
    first, again = Bridge(), Bridge()
    done = train(first, Data(), objective, settings(), checkpoint=tmp_path / "c")
    held = train(again, Data(), objective, settings(), checkpoint=tmp_path / "c", resume=True)
    assert weights(first) == weights(again)
    assert held.to_dict() == done.to_dict()
