"""Networks that join kinds of parts: fusion of resolutions, conditions, tables, memory; needs torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import Block, ConvNorm, Mlp


class HighResolution(Block):
    """Two resolutions side by side that are added to each other (HRNet, Sun et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 16, 3, 2)
        self.fine, self.coarse = ConvNorm(16, 16, 3), ConvNorm(16, 24, 3, 2)
        self.down, self.up = ConvNorm(16, 24, 3, 2, act=None), ConvNorm(24, 16, act=None)
        self.fine2, self.coarse2 = ConvNorm(16, 16, 3), ConvNorm(24, 24, 3)
        self.head = nn.Conv2d(40, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return N, 3, H / 2, W / 2; H and W are multiples of 4."""
        x = self.stem(image)
        fine, coarse = self.fine(x), self.coarse(x)
        raised = functional.interpolate(self.up(coarse), scale_factor=2.0, mode="bilinear", align_corners=False)
        fine, coarse = torch.relu(fine + raised), torch.relu(coarse + self.down(fine))
        fine, coarse = self.fine2(fine), self.coarse2(coarse)
        whole = torch.cat([fine, functional.interpolate(coarse, scale_factor=2.0, mode="nearest")], 1)
        return self.head(whole)


class BlockAttention(Block):
    """Gates by channel from mean and maximum through one perceptron, then by place (CBAM, Woo et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(width, 6, 1), nn.ReLU(), nn.Conv2d(6, width, 1))
        self.places = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated input."""
        mean, most = functional.adaptive_avg_pool2d(x, 1), functional.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(self.shared(mean) + self.shared(most))
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.places(seen))


class Cbam(Block):
    """Convolutions around two kinds of attention; the second kind (ECA, Wang et al. 2020) slides over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = ConvNorm(3, 16, 3, 2), BlockAttention(16)
        self.second, self.slide = ConvNorm(16, 24, 3, 2), nn.Conv1d(1, 1, 3, padding=1)
        self.third, self.head = ConvNorm(24, 32, 3), nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        x = self.second(self.attention(self.first(image)))
        gates = self.slide(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        x = x * torch.sigmoid(gates)[:, :, None, None]
        return self.head(self.third(x).mean((2, 3)))


class Film(Block):
    """Features scaled and shifted by a condition (FiLM, Perez et al. 2018), with GroupNorm, as in diffusion nets."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(6, 20), nn.SiLU(), nn.Linear(20, 2 * width))
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(4, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 16, 3, 2, 1), nn.SiLU())
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        """Return N, 3, H / 2, W / 2 of an image and N, 6."""
        scale, shift = self.condition(time)[:, :, None, None].chunk(2, 1)
        x = self.first(image)
        y = functional.silu(self.norm(x) * (1 + scale) + shift)
        return self.head(self.down(x + self.second(y)))


class Tabular(Block):
    """Two embeddings and numbers side by side, BatchNorm over features, a perceptron with a shortcut of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(12, 8), nn.Embedding(30, 10)
        self.norm = nn.BatchNorm1d(6)
        self.first = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1))
        self.second = nn.Sequential(nn.Linear(32 + 24, 20), nn.BatchNorm1d(20), nn.SELU())
        self.head = nn.Linear(20, 1)

    def forward(self, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Return N, 1 of N, 2 and N, 6."""
        x = torch.cat([self.one(kinds[:, 0]), self.other(kinds[:, 1]), self.norm(numbers)], 1)
        return torch.sigmoid(self.head(self.second(torch.cat([self.first(x), x], 1))))


class CachedDecoder(Block):
    """One layer of a decoder with keys and values of earlier tokens as inputs, and all of them as outputs."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.norm, self.second = nn.Embedding(40, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp, self.head = Mlp(width, 96, nn.ReLU), nn.Linear(width, 40)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits, keys and values of N, length and twice N, heads, past, width / heads."""
        x = self.words(tokens)
        y = self.norm(x)
        batch, length, width = y.shape

        def split(z: Tensor) -> Tensor:
            return z.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        query, keys = split(self.query(y)), torch.cat([keys, split(self.key(y))], 2)
        values = torch.cat([values, split(self.value(y))], 2)
        mixed = functional.scaled_dot_product_attention(query, keys, values)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return self.head(x + self.mlp(self.second(x))), keys, values


class CrossAttention(Block):
    """A decoder that looks at what an encoder made of an image: queries of one side, keys and values of the other."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.seen = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 24, 3, 2))
        self.words = nn.Embedding(40, width)
        self.query, self.packed, self.out = nn.Linear(width, 48), nn.Linear(24, 96), nn.Linear(48, width)
        self.norm, self.mlp, self.head = nn.LayerNorm(width), Mlp(width, 64), nn.Linear(width, 40)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Return N, length, 40."""
        places = self.seen(image).flatten(2).transpose(1, 2)
        x = self.words(tokens)
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (half.unflatten(-1, (self.heads, -1)).transpose(1, 2) for half in self.packed(places).chunk(2, -1))
        mixed = (query @ key.transpose(-1, -2) / 12**0.5).softmax(-1) @ value
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(self.norm(x)))
