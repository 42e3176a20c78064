"""ONNX graphs as torch modules, and back: fine-tuning, distillation, training with quantization.

The only part of graphopt that imports torch, and only where it is used: `pip install 'graphopt[train]'`.

    bridge = graphopt.bridge.TrainableGraph("model.onnx")
    bridge.module                       # an ordinary torch.nn.Module
    bridge.write_back().save("trained.onnx")
"""

from graphopt.errors import ProviderError

try:
    import torch as _torch
except ImportError as error:
    raise ProviderError(
        "training needs torch, which is not installed",
        hint="pip install 'graphopt[train]' (a CPU build of torch will do)",
    ) from error
del _torch

from graphopt.bridge.graph import TrainableGraph  # noqa: E402  (after the check for torch)

__all__ = ["TrainableGraph"]
