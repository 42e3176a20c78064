"""Networks for phones: inverted residuals, channel shuffle, cheap features; needs torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import Block, Classifier, ConvNorm, SqueezeExcite


class InvertedResidual(Block):
    """Expand, depthwise, gate, project (MobileNetV2, Sandler 2018; V3, Howard 2019; EfficientNet, Tan 2019)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        expand: int,
        act: type[nn.Module],
        squeeze: SqueezeExcite | None = None,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        wide = inputs * expand
        parts: list[nn.Module] = [ConvNorm(inputs, wide, act=act)] if expand > 1 else []
        parts.append(ConvNorm(wide, wide, kernel, stride, wide, act))
        parts += [squeeze] if squeeze else []
        self.body = nn.Sequential(*parts, ConvNorm(wide, outputs, act=None))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H / stride, W / stride."""
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v2() -> nn.Module:
    """ReLU6 throughout."""
    act = nn.ReLU6
    blocks = [ConvNorm(3, 16, 3, 2, act=act), InvertedResidual(16, 8, 1, 1, act)]
    for inputs, outputs, stride in ((8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1), (16, 16, 1), (16, 24, 1)):
        blocks.append(InvertedResidual(inputs, outputs, stride, 6, act))
    blocks.append(ConvNorm(24, 64, act=act))
    return Classifier(nn.Sequential(*blocks), (64, 10))


def mobilenet_v3() -> nn.Module:
    """HardSwish, squeeze-excite with HardSigmoid on some blocks, a hidden layer in the head."""

    def gate(channels: int) -> SqueezeExcite:
        return SqueezeExcite(channels, channels // 4, nn.ReLU, nn.Hardsigmoid)

    blocks = [ConvNorm(3, 16, 3, 2, act=nn.Hardswish), InvertedResidual(16, 16, 2, 1, nn.ReLU, gate(16))]
    blocks += [InvertedResidual(16, 16, 1, 4, nn.ReLU), InvertedResidual(16, 24, 2, 3, nn.Hardswish, gate(48), 5)]
    blocks += [InvertedResidual(24, 24, 1, 4, nn.Hardswish, gate(96), 5), ConvNorm(24, 72, act=nn.Hardswish)]
    return Classifier(nn.Sequential(*blocks), (72, 64, 10), nn.Hardswish)


def efficientnet() -> nn.Module:
    """SiLU; every gate is as wide as a quarter of the block's input."""

    def block(inputs: int, outputs: int, stride: int, expand: int, kernel: int) -> nn.Module:
        gate = SqueezeExcite(inputs * expand, max(1, inputs // 4), nn.SiLU)
        return InvertedResidual(inputs, outputs, stride, expand, nn.SiLU, gate, kernel)

    blocks = [ConvNorm(3, 16, 3, 2, act=nn.SiLU), block(16, 8, 1, 1, 3), block(8, 12, 2, 6, 3), block(12, 12, 1, 6, 3)]
    blocks += [block(12, 20, 2, 6, 5), block(20, 20, 1, 6, 5), ConvNorm(20, 64, act=nn.SiLU)]
    return Classifier(nn.Sequential(*blocks, nn.Dropout(0.2)), (64, 10))


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Return the channels dealt out anew: (groups, C / groups) transposed."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleUnit(Block):
    """Half of the channels pass by, or both halves are made anew at stride 2 (ShuffleNetV2, Ma et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        source = inputs if stride == 2 else half
        self.main = nn.Sequential(
            ConvNorm(source, half), ConvNorm(half, half, 3, stride, half, act=None), ConvNorm(half, half)
        )
        self.side = nn.Sequential(ConvNorm(inputs, inputs, 3, 2, inputs, act=None), ConvNorm(inputs, half))
        self.splits = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H / stride, W / stride."""
        if self.splits:
            passing, worked = x.chunk(2, dim=1)
            return shuffled(torch.cat([passing, self.main(worked)], 1), 2)
        return shuffled(torch.cat([self.side(x), self.main(x)], 1), 2)


def shufflenet_v2() -> nn.Module:
    """Two stages of a downsampling unit and two others."""
    blocks = [ConvNorm(3, 16, 3, 2), nn.MaxPool2d(3, 2, 1)]
    for inputs, outputs in ((16, 32), (32, 48)):
        blocks += [ShuffleUnit(inputs, outputs, 2), ShuffleUnit(outputs, outputs, 1), ShuffleUnit(outputs, outputs, 1)]
    return Classifier(nn.Sequential(*blocks, ConvNorm(48, 64)), (64, 10))


class ShuffleGroupUnit(Block):
    """Grouped 1 x 1, shuffle, depthwise, grouped 1 x 1 (ShuffleNet, Zhang et al. 2018)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first = ConvNorm(width, width // 2, groups=groups)
        self.deep = ConvNorm(width // 2, width // 2, 3, groups=width // 2, act=None)
        self.last = ConvNorm(width // 2, width, groups=groups, act=None)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, width, H, W."""
        return torch.relu(x + self.last(self.deep(shuffled(self.first(x), self.groups))))


def shufflenet_v1() -> nn.Module:
    """Grouped convolutions on both sides of a shuffle."""
    return Classifier(nn.Sequential(ConvNorm(3, 48, 3, 2), ShuffleGroupUnit(48, 3), ShuffleGroupUnit(48, 3)), (48, 10))


class Ghost(Block):
    """Some features by convolution, as many again from them depthwise; cut to size (GhostNet, Han et al. 2020)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        made = (outputs + 1) // 2
        self.outputs = outputs
        self.primary, self.cheap = ConvNorm(inputs, made), ConvNorm(made, made, 3, groups=made)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H, W."""
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)[:, : self.outputs]


def ghostnet() -> nn.Module:
    """Ghost modules, one of which drops its last channel."""
    features = [ConvNorm(3, 16, 3, 2), Ghost(16, 24), ConvNorm(24, 24, 3, 2, 24), Ghost(24, 31), Ghost(31, 32)]
    return Classifier(nn.Sequential(*features), (32, 10))


class RepBlock(Block):
    """3 x 3, 1 x 1 and identity branches, each with its own norm (RepVGG, Ding et al. 2021), before they are merged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.three, self.one = ConvNorm(width, width, 3, act=None), ConvNorm(width, width, act=None)
        self.same = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, width, H, W."""
        return torch.relu(self.three(x) + self.one(x) + self.same(x))


def repvgg() -> nn.Module:
    """Sums of branches."""
    features = [ConvNorm(3, 16, 3, 2), RepBlock(16), RepBlock(16), ConvNorm(16, 32, 3, 2), RepBlock(32)]
    return Classifier(nn.Sequential(*features), (32, 10))
