"""What the training loop is tested with: rows of a plane, two Gemms as a module, their loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from graphopt.model import Model, load

WIDTHS = {"w1": (8, 6), "w2": (4, 8)}


@dataclass
class Rows:
    feeds: dict[str, Any]
    labels: Any
    index: np.ndarray[Any, Any]
    share: float = 1.0
    targets: dict[str, Any] = field(default_factory=dict)


class Data:
    """Rows of a plane with four corners, shuffled by seed and epoch."""

    def __init__(self, rows: int = 40, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(rows, 6)).astype(np.float32)
        self.labels = (self.x[:, 0] > 0) * 2 + (self.x[:, 1] > 0)
        self.rows = rows
        self.batch: int | None = None

    def batches(self, batch: int, world: int = 1) -> int:
        return -(-self.rows // (batch * world))

    def epoch(
        self, epoch: int, *, seed: int, batch: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> Iterator[Rows]:
        order = np.random.default_rng([seed, epoch]).permutation(self.rows)
        for number in range(start, self.batches(batch, world)):
            whole = order[number * batch * world : (number + 1) * batch * world]
            index = whole[rank::world]
            share, index = (1.0, index) if len(index) else (0.0, whole[:1])
            yield Rows({"x": torch.from_numpy(self.x[index])}, torch.from_numpy(self.labels[index]), index, share)


class Net(nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, parameters: dict[str, nn.Parameter], dropout: float) -> None:
        super().__init__()
        self.held = nn.ParameterDict(parameters)
        self.dropout = nn.Dropout(dropout)

    def forward(self, feeds: dict[str, Any]) -> dict[str, Any]:
        hidden = torch.relu(feeds["x"] @ self.held["w1"].T + self.held["b1"])
        return {"y": self.dropout(hidden) @ self.held["w2"].T}


class Bridge:
    """What `TrainableGraph` is to the loop: two Gemms, their weights trained."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        self.model = load(gemms(seed))
        held = {c.name: c.values for c in self.model.constants()}
        self.parameters = {name: nn.Parameter(torch.from_numpy(held[name].copy())) for name in ("w1", "b1", "w2")}
        self.coded: dict[str, float] = {}
        self.statistics: dict[str, Any] = {}
        self.roles = {"w1": "weight", "b1": "bias", "w2": "weight"}
        self.module = Net(self.parameters, dropout)
        self.batch: int | None = None

    def channel_axis(self, name: str) -> int:
        return 0

    def write_back(self, into: Model | None = None) -> Model:
        into = (into or self.model).copy()
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
