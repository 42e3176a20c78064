"""Transformers for images and text; needs torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import Block, ConvNorm, Mlp


class PackedAttention(Block):
    """Self-attention whose query, key and value come from one layer (Vaswani et al. 2017), as ViT's codes write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, length, width."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class PreNorm(Block):
    """Norm, attention, shortcut; norm, perceptron, shortcut."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(width), attention
        self.second, self.mlp = nn.LayerNorm(width), Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, length, width."""
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Vit(Block):
    """Patches, class token, learned positions (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 40, heads: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(PreNorm(width, PackedAttention(width, heads)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of N, 3, 16, 16."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowAttention(Block):
    """Attention inside windows, a bias by relative position, windows shifted by rolling (Swin, Liu et al. 2021)."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.side, self.window, self.shift = heads, side, window, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        ticks = torch.arange(window)
        places = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])
        regions = torch.zeros(side, side)
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
            regions[rows, columns] = number
        tiles = self.tiled(regions[None, :, :, None]).squeeze(-1)
        self.register_buffer("mask", (tiles[:, None, :] != tiles[:, :, None]).float() * -100.0)

    def tiled(self, x: Tensor) -> Tensor:
        """Return N, side, side, C as N * windows, places of a window, C."""
        count, size = self.side // self.window, self.window
        x = x.reshape(-1, count, size, count, size, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, size * size, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return N, side, side, width."""
        width, tokens = x.shape[-1], self.window**2
        count = self.side // self.window
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        qkv = self.qkv(self.tiled(x)).reshape(-1, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] * (width // self.heads) ** -0.5) @ qkv[1].transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0)
        if self.shift:
            scores = scores.view(-1, count * count, self.heads, tokens, tokens) + self.mask[None, :, None]
            scores = scores.view(-1, self.heads, tokens, tokens)
        mixed = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(-1, tokens, width)
        y = self.out(mixed).view(-1, count, count, self.window, self.window, width).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(-1, self.side, self.side, width)
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y


class PatchMerging(Block):
    """Four neighbours side by side, normalised and projected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, side / 2, side / 2, 2 * width."""
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduce(self.norm(torch.cat(parts, -1)))


class Swin(Block):
    """Two stages, each of a plain and a shifted block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 20, 4, 4), nn.LayerNorm(20)
        self.stages = nn.Sequential(
            PreNorm(20, WindowAttention(20, 5, 8, 2, 0)),
            PreNorm(20, WindowAttention(20, 5, 8, 2, 1)),
            PatchMerging(20),
            PreNorm(40, WindowAttention(40, 10, 4, 2, 0)),
            PreNorm(40, WindowAttention(40, 10, 4, 2, 1)),
        )
        self.norm, self.head = nn.LayerNorm(40), nn.Linear(40, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of N, 3, 32, 32."""
        x = self.first(self.patches(image).permute(0, 2, 3, 1))
        return self.head(self.norm(self.stages(x)).mean((1, 2)))


class Encoder(Block):
    """PyTorch's own encoder layers, post-norm, on token ids with padding 0 (BERT, Devlin et al. 2019)."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(50, width), nn.Embedding(32, width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, heads, 128, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of N, length."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(places))
        x = self.layers(x, src_key_padding_mask=tokens == 0)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class RmsNorm(Block):
    """x / rms(x) * scale (Zhang, Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return the vectors turned by their positions (Su et al. 2021): halves, not pairs."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cosine + turned * sine


class GroupedQueryAttention(Block):
    """Several query heads share one key and value head (Ainslie et al. 2023)."""

    def __init__(self, width: int, heads: int, shared: int, size: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, size
        self.query = nn.Linear(width, heads * size, bias=False)
        self.key, self.value = nn.Linear(width, shared * size, bias=False), nn.Linear(width, shared * size, bias=False)
        self.out = nn.Linear(heads * size, width, bias=False)

    def repeated(self, x: Tensor) -> Tensor:
        """Return N, heads, length, size of N, shared heads, length, size."""
        batch, shared, length, size = x.shape
        times = self.heads // shared
        return x[:, :, None].expand(batch, shared, times, length, size).reshape(batch, self.heads, length, size)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return N, length, width."""
        batch, length, _ = x.shape
        query = rotated(self.query(x).view(batch, length, self.heads, self.size).transpose(1, 2), cosine, sine)
        key = rotated(self.key(x).view(batch, length, self.shared, self.size).transpose(1, 2), cosine, sine)
        value = self.value(x).view(batch, length, self.shared, self.size).transpose(1, 2)
        scores = query @ self.repeated(key).transpose(2, 3) / self.size**0.5
        scores = scores + torch.full((length, length), -1e4, device=x.device).triu(1)
        mixed = scores.softmax(-1) @ self.repeated(value)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.heads * self.size))


class SwiGlu(Block):
    """Linear gated by the SiLU of another (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, length, width."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Gqa(Block):
    """A decoder in the shape of Llama (Touvron et al. 2023): 8 query heads, 4 key heads; embedding and head are one."""

    def __init__(self, width: int = 32, size: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(60, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([RmsNorm(width), GroupedQueryAttention(width, 8, 4, size), RmsNorm(width), SwiGlu(width, 80)])
            for _ in range(2)
        )
        self.norm = RmsNorm(width)
        self.register_buffer("speeds", 1.0 / 10000.0 ** (torch.arange(0, size, 2) / size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return N, length, vocabulary."""
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.speeds[None]
        angles = torch.cat((angles, angles), -1)
        cosine, sine = angles.cos(), angles.sin()
        x = self.words(tokens)
        for first, attention, second, mlp in self.layers:
            x = x + attention(first(x), cosine, sine)
            x = x + mlp(second(x))
        return self.norm(x) @ self.words.weight.t()


class MixerBlock(Block):
    """A perceptron along the tokens, one along the channels (MLP-Mixer, Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = Mlp(tokens, 24), Mlp(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Return N, tokens, width."""
        x = x + self.tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.second(x))


class Mixer(Block):
    """Patches, two mixer blocks, the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, 32), MixerBlock(16, 32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of N, 3, 16, 16."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class MobileVit(Block):
    """Convolutions around a transformer over unfolded patches (MobileViT, Mehta, Rastegari 2022)."""

    def __init__(self, width: int = 24, patch: int = 2, side: int = 8) -> None:
        super().__init__()
        self.patch, self.side = patch, side
        self.stem = nn.Sequential(ConvNorm(3, 16, 3, 2, act=nn.SiLU), ConvNorm(16, 16, 3, 2, act=nn.SiLU))
        self.into = nn.Sequential(ConvNorm(16, 16, 3, act=nn.SiLU), nn.Conv2d(16, width, 1, bias=False))
        self.transformer = PreNorm(width, PackedAttention(width, 4))
        self.norm = nn.LayerNorm(width)
        self.back, self.fuse = ConvNorm(width, 16, act=nn.SiLU), ConvNorm(32, 16, 3, act=nn.SiLU)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of N, 3, 32, 32."""
        x = self.stem(image)
        y = self.into(x)
        width, patch, count = y.shape[1], self.patch, self.side // self.patch
        y = y.reshape(-1, count, patch, count, patch).transpose(2, 3).reshape(-1, width, count * count, patch * patch)
        y = y.permute(0, 3, 2, 1).reshape(-1, count * count, width)
        y = self.norm(self.transformer(y))
        y = y.reshape(-1, patch * patch, count * count, width).permute(0, 3, 2, 1)
        y = y.reshape(-1, count, count, patch, patch).transpose(2, 3).reshape(-1, width, self.side, self.side)
        y = self.fuse(torch.cat([x, self.back(y)], 1))
        return self.head(y.mean((2, 3)))
