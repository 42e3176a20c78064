"""Networks that answer for every place: segmentation, super-resolution, detection, video; needs torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import Block, ConvNorm


def _double(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(ConvNorm(inputs, outputs, 3), ConvNorm(outputs, outputs, 3))


class Unet(Block):
    """Down by pooling; up by ConvTranspose, PixelShuffle and Resize; skips by Concat (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_double(3, 12), _double(12, 16), _double(16, 24), _double(24, 32)])
        self.transposed = nn.Sequential(nn.ConvTranspose2d(32, 20, 2, 2), nn.BatchNorm2d(20), nn.ReLU())
        self.shuffled = nn.Sequential(nn.Conv2d(24, 4 * 16, 3, padding=1), nn.PixelShuffle(2), nn.ReLU())
        self.up = nn.ModuleList([_double(24 + 20, 24), _double(16 + 16, 16), _double(12 + 16, 12)])
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return N, 2, H, W; H and W are multiples of 8."""
        skips = []
        x = image
        for index, stage in enumerate(self.down):
            x = stage(x if index == 0 else functional.max_pool2d(x, 2))
            skips.append(x)
        x = self.up[0](torch.cat([self.transposed(x), skips[2]], 1))
        x = self.up[1](torch.cat([skips[1], self.shuffled(x)], 1))
        x = self.up[2](torch.cat([functional.interpolate(x, scale_factor=2.0, mode="nearest"), skips[0]], 1))
        return self.head(x)


class Espcn(Block):
    """Super-resolution: features at low resolution, PixelUnshuffle in, PixelShuffle out (Shi et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 5, padding=2)
        self.packed = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(64, 24, 3, padding=1), nn.PReLU(24))
        self.last = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.PReLU(), nn.Conv2d(24, 3 * 16, 3, padding=1))
        self.grow = nn.PixelShuffle(4)

    def forward(self, image: Tensor) -> Tensor:
        """Return N, 3, 2 H, 2 W; H and W are even."""
        return self.grow(self.last(self.packed(functional.gelu(self.first(image)))))


class C2f(Block):
    """Split in two, bottlenecks on the last part, everything concatenated (YOLOv8's block)."""

    def __init__(self, inputs: int, outputs: int, repeats: int, shortcut: bool) -> None:
        super().__init__()
        self.half, self.shortcut = outputs // 2, shortcut
        self.first = ConvNorm(inputs, outputs, act=nn.SiLU)
        body = (ConvNorm(self.half, self.half, 3, act=nn.SiLU) for _ in range(2 * repeats))
        self.body = nn.ModuleList(nn.Sequential(*pair) for pair in zip(body, body, strict=True))
        self.last = ConvNorm((2 + repeats) * self.half, outputs, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H, W."""
        parts = list(self.first(x).split((self.half, self.half), 1))
        for block in self.body:
            made = block(parts[-1])
            parts.append(parts[-1] + made if self.shortcut else made)
        return self.last(torch.cat(parts, 1))


class Sppf(Block):
    """Max pools in a row, all of them concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = ConvNorm(width, width // 2, act=nn.SiLU), ConvNorm(2 * width, width, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, width, H, W."""
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(functional.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, 1))


class Detect(Block):
    """Boxes as distributions over distances (DFL, Li et al. 2020) and class scores, of every scale in one list."""

    bins = 8

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()

        def branch(width: int, outputs: int) -> nn.Module:
            act = nn.SiLU
            layers = [ConvNorm(width, 16, 3, act=act), ConvNorm(16, 16, 3, act=act), nn.Conv2d(16, outputs, 1)]
            return nn.Sequential(*layers)

        self.boxes = nn.ModuleList(branch(width, 4 * self.bins) for width in widths)
        self.scores = nn.ModuleList(branch(width, classes) for width in widths)
        self.mean = nn.Conv2d(self.bins, 1, 1, bias=False).requires_grad_(False)
        self.classes = classes

    def fixed(self) -> None:
        """Set what is never learned: the bins' distances."""
        self.mean.weight.data.copy_(torch.arange(float(self.bins)).view(1, self.bins, 1, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return N, 4 + classes, places."""
        found, anchors, strides = [], [], []
        for x, box, score, stride in zip(maps, self.boxes, self.scores, (8.0, 16.0), strict=True):
            height, width = x.shape[2:]
            found.append(torch.cat([box(x), score(x)], 1).flatten(2))
            ys, xs = torch.arange(height, device=x.device) + 0.5, torch.arange(width, device=x.device) + 0.5
            grid = torch.stack([xs[None, :].expand(height, width), ys[:, None].expand(height, width)], 0)
            anchors.append(grid.flatten(1))
            strides.append(torch.full_like(grid[:1], stride).flatten(1))
        places, scale = torch.cat(anchors, 1), torch.cat(strides, 1)
        box, scores = torch.cat(found, 2).split((4 * self.bins, self.classes), 1)
        batch, _, count = box.shape
        spread = box.view(batch, 4, self.bins, count).transpose(2, 1).softmax(1)
        left, right = self.mean(spread).view(batch, 4, count).chunk(2, 1)
        low, high = places - left, places + right
        return torch.cat([(low + high) / 2 * scale, (high - low) * scale, scores.sigmoid()], 1)


class Yolo(Block):
    """Backbone with C2f and SPPF, top-down path, head at two scales."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU
        self.stem = nn.Sequential(ConvNorm(3, 8, 3, 2, act=act), ConvNorm(8, 16, 3, 2, act=act), C2f(16, 16, 1, True))
        self.middle = nn.Sequential(ConvNorm(16, 32, 3, 2, act=act), C2f(32, 32, 2, True))
        self.deep = nn.Sequential(ConvNorm(32, 48, 3, 2, act=act), Sppf(48))
        self.top_down, self.down = C2f(80, 32, 1, False), ConvNorm(32, 32, 3, 2, act=act)
        self.bottom_up = C2f(80, 48, 1, False)
        self.head = Detect((32, 48), 5)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes with scores, and the finest map; H and W are multiples of 16."""
        fine = self.middle(self.stem(image))
        coarse = self.deep(fine)
        up = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        fine = self.top_down(torch.cat([up, fine], 1))
        coarse = self.bottom_up(torch.cat([self.down(fine), coarse], 1))
        return self.head([fine, coarse]), fine


class Aspp(Block):
    """Dilated branches and the image's mean, resized back, side by side (DeepLabV3, Chen et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 24, 3, 2))
        rates = [nn.Sequential(nn.Conv2d(24, 16, 3, padding=r, dilation=r, bias=False), nn.ReLU()) for r in (1, 2, 3)]
        self.rates = nn.ModuleList(rates)
        self.whole = nn.Conv2d(24, 16, 1)
        self.fuse, self.head = ConvNorm(64, 24), nn.Conv2d(24, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return N, 4, H, W; H and W are multiples of 4."""
        x = self.features(image)
        whole = torch.relu(self.whole(x.mean((2, 3), keepdim=True))).expand(-1, -1, x.shape[2], x.shape[3])
        x = self.fuse(torch.cat([*(branch(x) for branch in self.rates), whole], 1))
        return functional.interpolate(self.head(x), scale_factor=4.0, mode="bilinear", align_corners=False)


class Video(Block):
    """3-D convolutions with norms by group and by instance, over time and place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(16, 16, 3, padding=1, groups=16), nn.Conv3d(16, 24, 1), nn.InstanceNorm3d(24, affine=True),
            nn.ELU(), nn.Conv3d(24, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.head = nn.Linear(24, 6)

    def forward(self, clip: Tensor) -> Tensor:
        """Return the logits of N, 3, T, H, W."""
        return self.head(self.body(clip).mean((2, 3, 4)))


class Siamese(Block):
    """One network on two images, compared (shared weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 24, 3, 2), nn.Conv2d(24, 32, 3))
        self.head = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 1))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return N, 1: how much the images differ."""
        one, other = (self.features(image).mean((2, 3)) for image in (left, right))
        return self.head(torch.cat([(one - other).abs(), one * other], 1))
