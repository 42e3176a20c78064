"""Two networks whose weights are on the Python package index, written for export; needs torch.

EfficientNet-Lite0 (Tan, Le 2019; the Lite family drops squeeze-excite and takes ReLU6) and the encoder
all-MiniLM-L6-v2 (Wang et al. 2020; BERT architecture) with mean pooling. Parameter names follow the weights.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Stage(NamedTuple):
    """Some inverted residual blocks; ``stride`` is that of the first one."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    outputs: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
_BN_EPSILON = 1e-3


class SameConv(nn.Conv2d):  # type: ignore[misc]
    """Convolution without bias, padded as TensorFlow's "SAME" pads even sizes: more at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        total = kernel - stride
        self.pads = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H / stride, W / stride."""
        return super().forward(functional.pad(x, self.pads) if any(self.pads) else x)


class InvertedResidual(nn.Module):  # type: ignore[misc]
    """Expand, depthwise, project; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        if expand > 1:
            self._expand_conv = SameConv(inputs, wide, 1)
            self._bn0 = nn.BatchNorm2d(wide, eps=_BN_EPSILON)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, eps=_BN_EPSILON)
        self._project_conv = SameConv(wide, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_BN_EPSILON)
        self.expands, self.shortcut = expand > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return N, outputs, H / stride, W / stride."""
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):  # type: ignore[misc]
    """RGB images N, 3, 224, 224 as (x - 127) / 128 -> logits of the 1,000 ImageNet classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, eps=_BN_EPSILON)
        blocks, channels = [], 32
        for stage in STAGES:
            for index in range(stage.repeats):
                stride = stage.stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, stage.outputs, stage.kernel, stride, stage.expand))
                channels = stage.outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(channels, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=_BN_EPSILON)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        x = functional.relu6(self._bn0(self._conv_stem(image)))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self._fc(self._dropout(x))


class SelfAttention(nn.Module):  # type: ignore[misc]
    """Scaled dot-product attention of 12 heads, spelled out as BERT's code is."""

    heads = 12

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        """Return N, heads, length, width of a head."""
        return x.view(x.size(0), x.size(1), self.heads, x.size(2) // self.heads).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return N, length, width; ``mask`` is added to the scores."""
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.size(-1))
        mixed = torch.matmul(torch.softmax(scores + mask, dim=-1), value)
        return mixed.permute(0, 2, 1, 3).contiguous().view(x.size(0), x.size(1), x.size(2))


def _projection(inputs: int, outputs: int) -> nn.Module:
    layers = {"dense": nn.Linear(inputs, outputs), "LayerNorm": nn.LayerNorm(outputs, eps=1e-12)}
    return nn.ModuleDict(layers)


class EncoderLayer(nn.Module):  # type: ignore[misc]
    """Attention and feed-forward, each added to its input and normalised."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        attention = {"self": SelfAttention(width), "output": _projection(width, width)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _projection(inner, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return N, length, width."""
        attended = self.attention["output"]["dense"](self.attention["self"](x, mask))
        x = self.attention["output"]["LayerNorm"](attended + x)
        inner = functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](inner) + x)


class MiniLM(nn.Module):  # type: ignore[misc]
    """WordPiece ids and mask, N, length (int64) -> unit sentence vectors, N, 384."""

    def __init__(self, vocabulary: int = 30522, width: int = 384, layers: int = 6) -> None:
        super().__init__()
        tables = {
            "word_embeddings": nn.Embedding(vocabulary, width),
            "position_embeddings": nn.Embedding(512, width),
            "token_type_embeddings": nn.Embedding(2, width),
            "LayerNorm": nn.LayerNorm(width, eps=1e-12),
        }
        self.embeddings = nn.ModuleDict(tables)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(EncoderLayer(width, 1536) for _ in range(layers))})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean of the token vectors that are not padding, scaled to length 1."""
        tables = self.embeddings
        positions = torch.arange(input_ids.size(1), device=input_ids.device).unsqueeze(0)
        x = tables["word_embeddings"](input_ids) + tables["position_embeddings"](positions)
        x = x + tables["token_type_embeddings"](torch.zeros_like(input_ids))
        x = tables["LayerNorm"](x)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -10000.0
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        mean = (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, p=2.0, dim=1)


def efficientnet_lite0(weights: Path) -> nn.Module:
    """Return the network with the weights of a PyTorch state dict, in evaluation mode."""
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def minilm(weights: Path) -> nn.Module:
    """Return the encoder with the weights of a safetensors file, in evaluation mode."""
    network = MiniLM()
    state = {key: value for key, value in _safetensors(weights).items() if key in network.state_dict()}
    network.load_state_dict(state)
    return network.eval()


def _safetensors(path: Path) -> OrderedDict[str, Tensor]:
    """Read the float32 tensors of a safetensors file: 8 bytes of header length, JSON header, raw data."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        low, high = entry["data_offsets"]
        flat = torch.frombuffer(data, dtype=torch.float32, count=(high - low) // 4, offset=start + low)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors
