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

from graphopt.bridge.batches import TrainingData, load_training_data  # noqa: E402  (after the check for torch)
from graphopt.bridge.graph import TrainableGraph  # noqa: E402
from graphopt.bridge.loop import train  # noqa: E402
from graphopt.bridge.objective import Objective, distill_objective, task_objective  # noqa: E402
from graphopt.bridge.standardize import standardize  # noqa: E402
from graphopt.bridge.start_from import start_from  # noqa: E402
from graphopt.bridge.teacher import Teacher  # noqa: E402

__all__ = [
    "Objective",
    "Teacher",
    "TrainableGraph",
    "TrainingData",
    "distill_objective",
    "load_training_data",
    "standardize",
    "start_from",
    "task_objective",
    "train",
]
