"""Recurrent, dilated and convolutional networks over time; needs torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import Block, ConvNorm


class Recurrent(Block):
    """Embedding, recurrent layers, a perceptron on the last step (LSTM, Hochreiter 1997; GRU, Cho et al. 2014)."""

    def __init__(self, kind: type[nn.Module], both_ways: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.layers = kind(16, 24, num_layers=2, batch_first=True, bidirectional=both_ways)
        self.inner = nn.Linear(24 * (1 + both_ways), 20)
        self.head = nn.Linear(20, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of N, length."""
        steps, _ = self.layers(self.words(tokens))
        return self.head(torch.relu(self.inner(steps[:, -1])))


class TimeMajor(Block):
    """Features, length first, through an LSTM and a GRU; last hidden state and all steps are used."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(12, 16)
        self.lstm, self.gru = nn.LSTM(16, 20), nn.GRU(20, 16)
        self.steps, self.last = nn.Linear(16, 6), nn.Linear(20, 6)

    def forward(self, sound: Tensor) -> Tensor:
        """Return length, N, 6."""
        x, (hidden, _) = self.lstm(torch.tanh(self.before(sound)))
        x, _ = self.gru(x)
        return self.steps(x) + self.last(hidden[-1])


class Crnn(Block):
    """Convolutions, columns read by a bidirectional LSTM (Shi et al. 2017): text lines of any width."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNorm(1, 16, 3), nn.MaxPool2d(2), ConvNorm(16, 24, 3), nn.MaxPool2d(2), ConvNorm(24, 32, 3),
            nn.MaxPool2d((4, 1)),
        )  # fmt: skip
        self.lstm = nn.LSTM(32, 24, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 12)

    def forward(self, line: Tensor) -> Tensor:
        """Return N, W / 4, classes of N, 1, 16, W."""
        x = self.features(line).squeeze(2).permute(0, 2, 1)
        return functional.log_softmax(self.head(self.lstm(x)[0]), -1)


class GatedLayer(Block):
    """tanh times sigmoid of two halves of a dilated convolution; residual and skip (WaveNet, van den Oord 2016)."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv = nn.Conv1d(width, 2 * width, 3, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(width, width, 1), nn.Conv1d(width, 20, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next layer's input and what goes to the output."""
        left, right = self.conv(functional.pad(x, (self.pad, 0))).chunk(2, 1)
        gated = torch.tanh(left) * torch.sigmoid(right)
        return x + self.residual(gated), self.skip(gated)


class Wavenet(Block):
    """Three gated layers; the skips are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 16, 1)
        self.layers = nn.ModuleList(GatedLayer(16, 2**i) for i in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(20, 24, 1), nn.ReLU(), nn.Conv1d(24, 8, 1))

    def forward(self, sound: Tensor) -> Tensor:
        """Return N, 8, length of N, 4, length."""
        x = self.first(sound)
        total = None
        for layer in self.layers:
            x, skip = layer(x)
            total = skip if total is None else total + skip
        return self.head(total)


class Conformer(Block):
    """Attention; pointwise, GLU, depthwise, BatchNorm, SiLU, pointwise over time (Conformer, Gulati et al. 2020)."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.front = nn.Linear(20, width)
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.second = nn.LayerNorm(width)
        self.wide, self.deep = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.batch, self.narrow = nn.BatchNorm1d(width), nn.Conv1d(width, width, 1)
        self.head = nn.Linear(width, 9)

    def forward(self, sound: Tensor) -> Tensor:
        """Return N, length, 9 of N, length, 20."""
        x = self.front(sound)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = functional.glu(self.wide(self.second(x).transpose(1, 2)), 1)
        y = self.narrow(functional.silu(self.batch(self.deep(y))))
        return self.head(x + y.transpose(1, 2))
