"""Train the digits network and write it, its test set and its calibration set beside this file.

    pip install torch scikit-learn onnx && python models/digits/train.py

The network is a small MobileNetV3 (Howard et al. 2019): depthwise convolutions, squeeze-excite, hard-swish.
It is exported as many real models are: BatchNormalization not folded, hard-swish spelled out, normalisation
of the pixels, resizing and the shape arithmetic of ``view`` left in the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

Array = npt.NDArray[Any]
HERE = Path(__file__).parent
SEED = 7
TEST, CALIBRATION = 600, 200  # of 1,797 images; the rest trains
EPOCHS, BATCH, RATE = 80, 64, 4e-3


class BlockSpec(NamedTuple):
    """One inverted residual block; ``excite`` adds squeeze-excite, ``swish`` takes hard-swish for ReLU."""

    kernel: int
    expanded: int
    outputs: int
    excite: bool
    swish: bool
    stride: int


BLOCKS = (
    BlockSpec(3, 32, 16, False, False, 1),
    BlockSpec(3, 64, 24, False, False, 2),
    BlockSpec(3, 72, 24, False, False, 1),
    BlockSpec(5, 96, 40, True, True, 2),
    BlockSpec(5, 160, 40, True, True, 1),
    BlockSpec(3, 160, 48, True, True, 2),
    BlockSpec(3, 192, 48, True, True, 1),
)


class HardSwish(nn.Module):  # type: ignore[misc]
    """``x * clip(x + 3, 0, 6) / 6``, as code bases before ``torch.nn.Hardswish`` write it."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return x * torch.clamp(x + 3.0, 0.0, 6.0) / 6.0


class SqueezeExcite(nn.Module):  # type: ignore[misc]
    """Scale channels by a gate computed from their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, channels // 4)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with each channel scaled; x is N, C, H, W."""
        gate = functional.adaptive_avg_pool2d(x, 1)
        gate = self.expand(functional.relu(self.reduce(gate)))
        return x * (torch.clamp(gate + 3.0, 0.0, 6.0) / 6.0)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its batch normalisation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class Block(nn.Module):  # type: ignore[misc]
    """Inverted residual: expand, depthwise, squeeze-excite, project."""

    def __init__(self, inputs: int, spec: BlockSpec) -> None:
        super().__init__()
        act = HardSwish if spec.swish else nn.ReLU
        wide = spec.expanded
        layers = [*conv(inputs, wide, 1), act(), *conv(wide, wide, spec.kernel, spec.stride, wide), act()]
        layers += [SqueezeExcite(wide)] if spec.excite else []
        self.layers = nn.Sequential(*layers, *conv(wide, spec.outputs, 1))
        self.shortcut = spec.stride == 1 and inputs == spec.outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H / stride, W / stride."""
        return x + self.layers(x) if self.shortcut else self.layers(x)


class Digits(nn.Module):  # type: ignore[misc]
    """Pixels 0..16 of N, 1, 8, 8 -> ten logits; works at 32 x 32 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(1, 16, 3), HardSwish())
        blocks, channels = [], 16
        for spec in BLOCKS:
            blocks.append(Block(channels, spec))
            channels = spec.outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*conv(channels, 224, 1), HardSwish(), nn.Identity())
        self.classifier = nn.Sequential(nn.Linear(224, 160), HardSwish(), nn.Dropout(0.2), nn.Linear(160, 10))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        x = (image / 16.0 - 0.305) / 0.376
        x = functional.interpolate(x, scale_factor=4.0, mode="bilinear", align_corners=False)
        x = self.head(self.blocks(self.stem(x)))
        x = functional.adaptive_avg_pool2d(x, 1)
        return self.classifier(x.view(x.size(0), -1))


def split() -> tuple[Array, Array, dict[str, Array]]:
    """Return all images (N, 1, 8, 8; float32, 0..16), their labels (int64), and disjoint sets of indices."""
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    ends = [TEST, TEST + CALIBRATION]
    parts = dict(zip(("test", "calibration", "train"), np.split(order, ends), strict=True))
    return digits.images[:, None].astype(np.float32), digits.target.astype(np.int64), parts


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images turned, scaled, sheared and shifted a little, with some noise."""
    noise = torch.randn(len(images), 2, 3, generator=generator)
    matrix = torch.eye(2, 3) + noise * torch.tensor([[0.1, 0.1, 0.12], [0.1, 0.1, 0.12]])
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return moved + 0.4 * torch.randn(moved.shape, generator=generator)


def train() -> Digits:
    """Return the trained network, in evaluation mode."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, labels, parts = split()
    x, y = torch.from_numpy(images[parts["train"]]), torch.from_numpy(labels[parts["train"]])
    network = Digits()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for batch in order[: len(x) // BATCH * BATCH].split(BATCH):
            logits = network(augmented(x[batch], generator))
            loss = functional.cross_entropy(logits, y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.4f}", end="\r")
    print()
    network.eval()
    return network


def main() -> None:
    """Train, export, and write the data."""
    network = train()
    images, labels, parts = split()
    with torch.no_grad():
        right = network(torch.from_numpy(images[parts["test"]])).argmax(1).numpy() == labels[parts["test"]]
    print(f"held-out accuracy {right.mean():.4f} on {len(right)} images")
    torch.onnx.export(
        network,
        (torch.from_numpy(images[:2]),),
        HERE / "digits.onnx",
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=13,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # evaluation mode, but BatchNormalization stays
    )
    for name, part in (("digits", "test"), ("calibration", "calibration")):
        np.savez_compressed(HERE / f"{name}.npz", image=images[parts[part]], label=labels[parts[part]])


if __name__ == "__main__":
    main()
