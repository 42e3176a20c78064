"""Which network is exported how: builder, inputs, exporters; needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from . import convnets, dense_prediction, mixed, mobile, sequences, transformers
from .spec import Input

TORCHSCRIPT, DYNAMO = ("torchscript",), ("dynamo",)
BOTH = TORCHSCRIPT + DYNAMO


@dataclass(frozen=True)
class Network:
    """A builder and how its model is exported.

    Attributes:
        build: makes the network with any weights.
        inputs: by name.
        norm: `batch` where every parameter must lie on a prunable axis, `layer` where LayerNorm may freeze some, `none`
            where more stays by the nature of the network.
        exporters: of `BOTH`.
        merged: whether equal weights are one initializer, as exporters leave untrained networks.
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Input]
    norm: str = "batch"
    exporters: tuple[str, ...] = BOTH
    merged: bool = False


def _image(*second: int, side: int = 32) -> dict[str, Input]:
    shape = (2, 3, side, side)
    return {"image": Input(shape, second or (3, 3, side, side))}


# torchscript keeps the length that it traced of PyTorch's own attention; dynamo that of an LSTM over the first axis
_ANY = _image(3, 3, 48, 40, side=64)
_TOKENS = {"tokens": Input((2, 7), (3, 10), 40)}

NETWORKS = {
    "resnet18": Network(convnets.resnet18, _ANY),
    "resnet18-merged": Network(convnets.resnet18, _ANY, exporters=TORCHSCRIPT, merged=True),
    "resnet50": Network(convnets.resnet50, _ANY),
    "resnext": Network(convnets.resnext, _ANY),
    "regnet-x": Network(lambda: convnets.regnet(squeeze=False), _ANY),
    "regnet-y": Network(lambda: convnets.regnet(squeeze=True), _ANY),
    "mobilenet-v2": Network(mobile.mobilenet_v2, _ANY),
    "mobilenet-v3": Network(mobile.mobilenet_v3, _ANY),
    "efficientnet": Network(mobile.efficientnet, _ANY),
    "shufflenet-v2": Network(mobile.shufflenet_v2, _ANY),
    "shufflenet-v1": Network(mobile.shufflenet_v1, _ANY, "none"),  # its two groupings leave one unit in common
    "ghostnet": Network(mobile.ghostnet, _ANY),
    "repvgg": Network(mobile.repvgg, _ANY),
    "densenet": Network(convnets.densenet, _ANY),
    "googlenet": Network(convnets.googlenet, _ANY),
    "squeezenet": Network(convnets.squeezenet, _ANY),
    "vgg": Network(convnets.vgg, _image(side=16)),
    "convnext": Network(convnets.ConvNext, _image(3, 3, 48, 40), "layer"),
    "swin": Network(transformers.Swin, _image(), "layer"),
    "vit": Network(transformers.Vit, _image(side=16), "layer"),
    "mixer": Network(transformers.Mixer, _image(side=16), "layer"),
    "mobilevit": Network(transformers.MobileVit, _image(), "layer"),
    "encoder": Network(transformers.Encoder, _TOKENS, "layer", DYNAMO),
    "encoder-fixed": Network(transformers.Encoder, {"tokens": Input((2, 7), (3, 7), 40)}, "layer", TORCHSCRIPT),
    "gqa": Network(transformers.Gqa, _TOKENS, "layer"),
    "unet": Network(dense_prediction.Unet, _image(3, 3, 48, 40)),
    "espcn": Network(dense_prediction.Espcn, _image(3, 3, 12, 10, side=16)),
    "yolo": Network(dense_prediction.Yolo, _image(3, 3, 48, 32, side=64)),
    "aspp": Network(dense_prediction.Aspp, _image(3, 3, 48, 40)),
    "video": Network(dense_prediction.Video, {"clip": Input((2, 3, 4, 8, 8), (1, 3, 3, 10, 8))}),
    "siamese": Network(
        dense_prediction.Siamese, {side: Input((2, 3, 32, 32), (3, 3, 24, 40)) for side in ("left", "right")}
    ),
    "hrnet": Network(mixed.HighResolution, _image(3, 3, 48, 40)),
    "cbam": Network(mixed.Cbam, _image(3, 3, 48, 40), "none"),
    "film": Network(mixed.Film, {"image": Input((2, 3, 16, 16), (3, 3, 24, 20)), "time": Input((2, 6), (3, 6))}),
    "tabular": Network(mixed.Tabular, {"kinds": Input((2, 2), (5, 2), 12), "numbers": Input((2, 6), (5, 6))}),
    "cached-decoder": Network(
        mixed.CachedDecoder,
        {"tokens": Input((2, 3), (3, 4), 40), **{n: Input((2, 4, 5, 8), (3, 4, 7, 8)) for n in ("keys", "values")}},
        "none",
    ),
    "cross-attention": Network(
        mixed.CrossAttention,
        {"image": Input((2, 3, 16, 16), (3, 3, 24, 20)), "tokens": Input((2, 5), (3, 7), 40)},
        "layer",
    ),
    "lstm": Network(lambda: sequences.Recurrent(nn.LSTM), _TOKENS),
    "gru": Network(lambda: sequences.Recurrent(nn.GRU), _TOKENS),
    "bilstm": Network(lambda: sequences.Recurrent(nn.LSTM, both_ways=True), _TOKENS),
    "time-major": Network(sequences.TimeMajor, {"sound": Input((6, 2, 12), (9, 3, 12))}, exporters=TORCHSCRIPT),
    "crnn": Network(sequences.Crnn, {"line": Input((2, 1, 16, 32), (3, 1, 16, 48))}),
    "wavenet": Network(sequences.Wavenet, {"sound": Input((2, 4, 20), (3, 4, 31))}),
    "conformer": Network(sequences.Conformer, {"sound": Input((2, 12, 20), (3, 17, 20))}, "layer", DYNAMO),
    "conformer-fixed": Network(sequences.Conformer, {"sound": Input((2, 12, 20), (3, 12, 20))}, "layer", TORCHSCRIPT),
}


def initialised(network: nn.Module) -> nn.Module:
    """Return the network with He-scaled weights, norms around 1, in evaluation mode."""

    def around(tensor: torch.Tensor, middle: float, spread: float) -> None:
        nn.init.uniform_(tensor, middle - spread, middle + spread)

    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            is_scale = name.endswith("weight") or "scale" in name
            around(parameter.data, *((0.9, 0.2) if is_scale else (0.0, 0.1)))
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            fan_in = weight[0].numel()
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                fan_in = weight.shape[0] // module.groups
            nn.init.normal_(weight, std=(1.5 / fan_in) ** 0.5)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            around(module.running_mean, 0.0, 0.1)
            around(module.running_var, 1.0, 0.3)
        if isinstance(module, nn.PReLU):
            around(weight.data, 0.25, 0.1)
        if isinstance(module, dense_prediction.Detect):
            module.fixed()
    return network.eval()
