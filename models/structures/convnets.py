"""Convolutional classifiers; needs torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import Block, ChannelsFirstNorm, Classifier, ConvNorm, Identity, SqueezeExcite


class Basic(Block):
    """Two 3 x 3 convolutions and a shortcut (ResNet, He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvNorm(inputs, outputs, 3, stride), ConvNorm(outputs, outputs, 3, act=None))
        same = stride == 1 and inputs == outputs
        self.shortcut = Identity() if same else ConvNorm(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H / stride, W / stride."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Bottleneck(Block):
    """1 x 1, grouped 3 x 3, 1 x 1, shortcut (ResNet; ResNeXt, Xie et al. 2017; RegNet, Radosavovic et al. 2020)."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, groups: int = 1, squeeze: int = 0) -> None:
        super().__init__()
        parts = [ConvNorm(inputs, middle), ConvNorm(middle, middle, 3, stride, groups)]
        if squeeze:
            parts.append(SqueezeExcite(middle, squeeze))
        self.body = nn.Sequential(*parts, ConvNorm(middle, outputs, act=None))
        same = stride == 1 and inputs == outputs
        self.shortcut = Identity() if same else ConvNorm(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H / stride, W / stride."""
        return torch.relu(self.body(x) + self.shortcut(x))


def _stem(width: int) -> list[nn.Module]:
    return [ConvNorm(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]


def resnet18() -> nn.Module:
    """Two basic blocks in each of four stages."""
    blocks, channels = _stem(16), 16
    for stage, width in enumerate((16, 24, 32, 48)):
        blocks += [Basic(channels, width, 1 + (stage > 0)), Basic(width, width, 1)]
        channels = width
    return Classifier(nn.Sequential(*blocks), (channels, 10))


def resnet50(groups: int = 1) -> nn.Module:
    """Bottlenecks: the first of each stage with a projection, and another one."""
    blocks, channels = _stem(16), 16
    for stage, width in enumerate((16, 24, 32)):
        outputs = 2 * width
        blocks.append(Bottleneck(channels, width, outputs, 1 + (stage > 0), groups))
        blocks.append(Bottleneck(outputs, width, outputs, 1, groups))
        channels = outputs
    return Classifier(nn.Sequential(*blocks), (channels, 10))


def resnext() -> nn.Module:
    """Bottlenecks of 8 groups."""
    return resnet50(groups=8)


def regnet(squeeze: bool) -> nn.Module:
    """Bottlenecks without expansion whose groups are 4 wide; RegNetY with squeeze-excite of a quarter of the input."""
    blocks: list[nn.Module] = [ConvNorm(3, 16, 3, 2)]
    channels = 16
    for width in (24, 40):
        for stride, inputs in ((2, channels), (1, width)):
            blocks.append(Bottleneck(inputs, width, width, stride, width // 4, inputs // 4 if squeeze else 0))
        channels = width
    return Classifier(nn.Sequential(*blocks), (channels, 10))


class DenseLayer(Block):
    """Norm first; the output joins the input (DenseNet, Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return N, inputs + growth, H, W."""
        return torch.cat([x, self.body(x)], 1)


def densenet() -> nn.Module:
    """Three dense blocks of three layers, transitions that halve the channels between them."""
    blocks, channels = _stem(16), 16
    for block in range(3):
        for _ in range(3):
            blocks.append(DenseLayer(channels, 8))
            channels += 8
        blocks += [nn.BatchNorm2d(channels), nn.ReLU()]
        if block < 2:
            blocks += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return Classifier(nn.Sequential(*blocks), (channels, 10))


class Inception(Block):
    """Four branches side by side (GoogLeNet, Szegedy et al. 2015, with BatchNorm)."""

    def __init__(self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvNorm(inputs, one),
                nn.Sequential(ConvNorm(inputs, three[0]), ConvNorm(three[0], three[1], 3)),
                nn.Sequential(ConvNorm(inputs, five[0]), ConvNorm(five[0], five[1], 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), ConvNorm(inputs, pooled)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the branches' channels one after the other."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def googlenet() -> nn.Module:
    """Three inception modules."""
    blocks = [*_stem(16), ConvNorm(16, 16), ConvNorm(16, 24, 3), nn.MaxPool2d(3, 2, 1)]
    blocks += [Inception(24, 8, (12, 16), (4, 8), 8), Inception(40, 16, (16, 24), (4, 12), 12), nn.MaxPool2d(2, 2)]
    blocks += [Inception(64, 16, (16, 32), (8, 16), 16)]
    return Classifier(nn.Sequential(*blocks, nn.Dropout(0.2)), (80, 10))


class Fire(Block):
    """Squeeze, then 1 x 1 and 3 x 3 side by side (SqueezeNet, Iandola et al. 2016)."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, 2 * expand, H, W."""
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.one(x)), torch.relu(self.three(x))], 1)


def squeezenet() -> nn.Module:
    """No BatchNorm; the last convolution makes the classes."""
    features = [nn.Conv2d(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    features += [Fire(24, 8, 16), Fire(32, 8, 16), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(32, 12, 24)]
    head = [nn.Dropout(0.5), nn.Conv2d(48, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
    return nn.Sequential(*features, *head)


class ConvNextBlock(Block):
    """Depthwise 7 x 7, channels-last LayerNorm and perceptron, layer scale (ConvNeXt, Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return N, width, H, W."""
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.outer(nn.functional.gelu(self.inner(y)))
        return x + (self.layer_scale * y).permute(0, 3, 1, 2)


class ConvNext(Block):
    """Stem, two stages, a head with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 40, 4, 4), ChannelsFirstNorm(40, eps=1e-6))
        down = [ChannelsFirstNorm(40, eps=1e-6), nn.Conv2d(40, 80, 2, 2)]
        stages = [ConvNextBlock(40), ConvNextBlock(40), *down, ConvNextBlock(80), ConvNextBlock(80)]
        self.stages = nn.Sequential(*stages)
        self.norm, self.head = nn.LayerNorm(80, eps=1e-6), nn.Linear(80, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.norm(self.stages(self.stem(image)).mean((-2, -1))))


def vgg() -> nn.Module:
    """Plain convolutions, then Flatten of 2 x 2 places into a perceptron (Simonyan, Zisserman 2015)."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 24, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    head = [nn.Flatten(), nn.Linear(channels * 4, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 10)]
    return nn.Sequential(*layers, *head)
