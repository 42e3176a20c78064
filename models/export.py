"""PyTorch weights -> ``.onnx``, with either of torch's exporters: what users bring, from both.

An exported file is kept in the cache under the versions of torch and onnxscript that made it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from graphopt.errors import ProviderError, SpecError

from .wheels import replacing

OPSET = 17  # of the TorchScript exporter; dynamo's takes its own default
_DISTRIBUTIONS = ("torch", "onnxscript")


def key(_name: str) -> str:
    """Return what the made file depends on besides its name and source.

    Raises:
        ProviderError: torch or onnxscript is not installed.
    """
    try:
        versions = [f"{name}{metadata.version(name)}" for name in _DISTRIBUTIONS]
    except metadata.PackageNotFoundError as missing:
        raise ProviderError(
            f"this model is exported from PyTorch, and '{missing.name}' is not installed",
            hint="pip install torch onnxscript; once exported, the model stays in the cache",
        ) from missing
    return "-".join(versions).replace("+", ".")


def make(name: str, sources: Sequence[Path], path: Path) -> None:
    """Export the network that ``name`` starts with, by the exporter that it ends with, to ``path``."""
    import torch  # noqa: PLC0415 (heavy, and optional)

    from . import networks  # noqa: PLC0415 (imports torch)

    network_name, exporter = name.rsplit("-", 1)
    if network_name == "efficientnet-lite0":
        network = networks.efficientnet_lite0(sources[0])
        arguments: tuple[Any, ...] = (torch.zeros(2, 3, 224, 224),)
        names, output, dynamic = ["image"], "logits", {0: "batch"}
    elif network_name == "minilm":
        network = networks.minilm(sources[0])
        arguments = (torch.full((2, 16), 1000), torch.ones(2, 16, dtype=torch.int64))
        names, output, dynamic = ["input_ids", "attention_mask"], "sentence_embedding", {0: "batch", 1: "length"}
    else:
        raise SpecError(f"no network is known for '{name}'")
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about themselves
        options: dict[str, Any] = {"input_names": names, "output_names": [output]}
        if exporter == "torchscript":
            axes = {**dict.fromkeys(names, dynamic), output: {0: "batch"}}
            options |= {"dynamic_axes": axes, "dynamo": False, "opset_version": OPSET}
        else:
            shapes = {argument: {axis: torch.export.Dim(dim) for axis, dim in dynamic.items()} for argument in names}
            options |= {"dynamic_shapes": shapes, "dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(network, arguments, temporary, **options)
