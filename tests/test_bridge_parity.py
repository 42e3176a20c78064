"""A network in torch and its ONNX graph in the bridge are trained side by side: they stay equal, step by step."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor, nn

from graphopt.bridge import TrainableGraph
from graphopt.runtime import evaluate

torch.set_num_threads(1)

STEPS = 5
TOLERANCE = 1e-5  # of values of order 1: five steps of float32 rounding


class Residual(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Strided, grouped and depthwise convolutions, BatchNormalization with two momenta, a shortcut, squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.deep = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16, momentum=0.03), nn.Hardswish(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16, eps=1e-3), nn.SiLU(),
            nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(x)
        x = self.pool(x + y * self.gate(y))
        return self.head(self.norm(x.mean((2, 3))))


class Transformer(nn.Module):  # type: ignore[misc]
    """Embedded tokens, learned positions, attention with a mask, two norms, a tied output layer."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(11, width)
        self.places = nn.Parameter(torch.randn(1, 6, width) * 0.1)
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # a bias of keys has no gradient
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-6)])
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places[:, : ids.shape[1]]
        x = x + self.attend(self.norms[0](x))
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))
        return x @ self.tokens.weight.t()

    def attend(self, x: Tensor) -> Tensor:
        rows, steps, width = x.shape
        split = (rows, steps, self.heads, width // self.heads)
        q, k, v = (f(x).reshape(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(2, 3) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(torch.ones(steps, steps).triu(1).bool(), float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, steps, width))


def exported(net: nn.Module, example: Tensor) -> onnx.ModelProto:
    """Return the graph as torch's exporter writes it where nothing is folded."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and of the exporter's age
        torch.onnx.export(
            net, (example,), file, dynamo=False, opset_version=17, training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False, input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


def batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(STEPS):
        if kind == "images":
            x, y = torch.randn(6, 3, 12, 12, generator=generator), torch.randint(5, (6,), generator=generator)
        else:
            x, y = torch.randint(11, (4, 6), generator=generator), torch.randint(11, (4, 6), generator=generator)
        made.append((x, y))
    return made


def told_apart(net: nn.Module) -> None:
    """Make tensors different that begin alike: torch's exporter stores equal ones once, which ties them."""
    with torch.no_grad():
        for tensor in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
            tensor.add_(torch.rand_like(tensor), alpha=0.1)


def loss_of(scores: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten())


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.05)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_five_steps_are_those_of_the_source_model(kind: str, training: bool) -> None:
    """Losses, parameters and running statistics after each step; then ONNX Runtime on what is written back."""
    torch.manual_seed(0)
    net = (Residual() if kind == "images" else Transformer()).train(training)
    told_apart(net)
    data = batches(kind)
    bridge = TrainableGraph(exported(net, data[0][0]), batch_norm="train")
    net.train()
    bridge.module.train()
    own = dict(net.named_parameters())
    assert set(bridge.parameters) == set(own)
    ours, theirs = optimizer(list(bridge.parameters.values())), optimizer([own[name] for name in bridge.parameters])
    for x, labels in data:
        losses = []
        for step, scores in ((theirs, net(x)), (ours, bridge.module({"x": x})["y"])):
            loss = loss_of(scores, labels)
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
        statistics = {k: v for k, v in net.named_buffers() if v.is_floating_point()}
        held = bridge.values()
        for name, value in {**own, **statistics}.items():
            assert np.abs(held[name] - value.detach().numpy()).max() < TOLERANCE, name
    net.eval()
    if not training:  # a graph of training normalizes by the batch in ONNX Runtime, too
        with torch.no_grad():
            wanted = net(data[0][0]).numpy()
        found = evaluate(bridge.write_back(), {"x": data[0][0].numpy()})["y"]
        assert np.abs(found - wanted).max() < 10 * TOLERANCE * np.abs(wanted).max()
