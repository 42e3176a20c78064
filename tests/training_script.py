"""A training for tests to kill, and to start in several processes: a small image net with all that is random.

    python training_script.py FOLDER '{"options of the training": ...}'

Says `step N` after every update; writes the weights to FOLDER/weights-RANK.npz and the history to FOLDER/history.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from graphopt.bridge import TrainableGraph, loop
from graphopt.bridge.batches import TrainingData, load_training_data
from graphopt.bridge.objective import task_objective
from graphopt.bridge.parallel import leads
from graphopt.model import Model, load
from graphopt.training import TrainSettings


def image_net(batch: int | str = "n", dropout: float = 0.2) -> onnx.ModelProto:
    """Return conv, normalization, conv, dropout and a linear layer on (batch, 3, 8, 8)."""
    rng = np.random.default_rng(0)
    shapes = {"conv1": (8, 3, 3, 3), "conv2": (8, 8, 3, 3), "linear": (8, 5), "bias": (5,)}
    values = {name: rng.normal(size=shape, scale=0.3) for name, shape in shapes.items()}
    values.update(scale=rng.uniform(0.8, 1.2, 8), shift=rng.normal(size=8), mean=rng.normal(size=8))
    values.update(variance=rng.uniform(0.5, 2.0, 8), ratio=np.array(dropout))
    held = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()]
    same: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "conv1"], ["c1"], **same),
        helper.make_node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Conv", ["r", "conv2"], ["c2"], strides=[2, 2], **same),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Dropout", ["f", "ratio"], ["d"]),
        helper.make_node("Gemm", ["d", "linear", "bias"], ["logits"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])
    graph = helper.make_graph(nodes, "images", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(model: Model, settings: TrainSettings, rows: int = 44) -> TrainingData:
    """Return labelled images."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 3, 8, 8)).astype(np.float32)
    labels = np.abs(x.mean((2, 3))).argmax(1) + 2 * (x.mean((1, 2, 3)) > 0)
    given = [({"x": x[i : i + 1]}, labels[i : i + 1]) for i in range(rows)]
    return load_training_data(given, model, settings, labelled=True)


def graph(settings: TrainSettings, model: Model, taps: tuple[str, ...] = ()) -> TrainableGraph:
    """Return the net as the settings want it."""
    return TrainableGraph(
        model, taps=taps, only=settings.only, freeze=settings.freeze, batch_norm=settings.batch_norm
    )  # fmt: skip


class Poisoned:
    """Data whose second batch of the second epoch is infinite in one process."""

    def __init__(self, data: TrainingData, rank: int) -> None:
        self.data, self.rank = data, rank
        self.rows, self.batch, self.batches = data.rows, data.batch, data.batches

    def epoch(self, epoch: int, **options: Any) -> Iterator[Any]:
        """Yield the batches of an epoch."""
        for number, batch in enumerate(self.data.epoch(epoch, **options)):
            if (epoch, number, options["rank"]) == (1, 1, self.rank):
                batch.feeds["x"] = batch.feeds["x"] * float("inf")
            yield batch


def norm(model: Model) -> float:
    """Judge a model by a number that any change of it changes."""
    return float(sum(np.abs(np.asarray(c.values)).sum() for c in model.constants()))


def main(folder: Path, options: dict[str, Any], pause: float = 0.0) -> None:
    """Train; say every update, and wait so long, where there is a pause."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    options = dict(options)
    resume, dropout, poisoned = options.pop("resume", False), options.pop("dropout", 0.2), options.pop("poisoned", -1)
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    settings = TrainSettings(**given)
    model = load(image_net(dropout=dropout))
    objective = task_objective(model, settings)
    bridge = graph(settings, model, objective.taps)
    loop.SHOWN_EVERY = 0.0 if pause else loop.SHOWN_EVERY

    def progress(done: int, total: int, sentence: str, /) -> None:
        if pause:
            print(f"step {done}", flush=True)
            time.sleep(pause)

    history = loop.train(
        bridge, Poisoned(images(model, settings), poisoned), objective, settings, judge=norm, seed=5,
        checkpoint=folder / "checkpoint", resume=resume, progress=progress, checkpoint_seconds=0.0,
    )  # fmt: skip
    found: dict[str, Any] = bridge.values()
    np.savez(folder / f"weights-{os.environ.get('RANK', '0')}.npz", **found)
    if leads():
        history.save_json(folder / "history.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), pause=0.02)
