"""What several networks are built of; needs torch.

The networks beside this file keep every kind of coupling of their families (shortcuts, groups, shuffles, concats,
heads ...) at few repeats and small widths.  They are written from the papers named in them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class Block(nn.Module):  # type: ignore[misc]
    """The base of every part of a network here."""


class Identity(Block):
    """Nothing, where a block asks for an activation or a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


class ConvNorm(nn.Sequential):  # type: ignore[misc]
    """Convolution without bias, BatchNorm, activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        parts = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*parts, *([act()] if act else []))


class SqueezeExcite(Block):
    """Channel gates from the channel means (Hu et al. 2018), of 1 x 1 convolutions."""

    def __init__(
        self, channels: int, inner: int, act: type[nn.Module] = nn.ReLU, gate: type[nn.Module] = nn.Sigmoid
    ) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(channels, inner, 1), act()
        self.widen, self.gate = nn.Conv2d(inner, channels, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        """Return the input times a number for each channel."""
        means = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.widen(self.act(self.reduce(means))))


class Classifier(Block):
    """Features, the mean over places, then a perceptron."""

    def __init__(self, features: nn.Module, widths: tuple[int, ...], act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.features = features
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), act()]
        self.head = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits, N, classes."""
        x = self.features(image)
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class ChannelsFirstNorm(nn.LayerNorm):  # type: ignore[misc]
    """LayerNorm over the channels of N, C, H, W."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Sequential):  # type: ignore[misc]
    """Linear, activation, Linear."""

    def __init__(self, width: int, inner: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__(nn.Linear(width, inner), act(), nn.Linear(inner, width))
