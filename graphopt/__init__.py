"""graphopt: a compiler for exported ONNX models.

result = graphopt.optimize("model.onnx")
result.save("model.fast.onnx")
"""

import importlib
from typing import TYPE_CHECKING, Any

from graphopt import interrupt as _interrupt  # first: what follows takes time, and Ctrl-C may come
from graphopt.base import Change, Context, Pass, Target
from graphopt.bisection import bisect
from graphopt.data import load_samples
from graphopt.errors import GateMissedError, GraphoptError, InputError, InternalError
from graphopt.explain import explain
from graphopt.inspect import inspect
from graphopt.model import Model, load
from graphopt.optimizer import optimize
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.registry import load_plugin, register
from graphopt.rewrite import Rule, RulePass
from graphopt.timing import bench
from graphopt.validate import validate

if TYPE_CHECKING:
    from graphopt.factorizer import factorize
    from graphopt.pruner import prune
    from graphopt.quality import Bound
    from graphopt.quantizer import quantize
    from graphopt.sparsifier import sparsify
    from graphopt.trainer import distill, finetune
    from graphopt.training import DistillSettings, TrainSettings

__version__ = "0.1.0"
del _interrupt

__all__ = [
    "Bound",
    "Change",
    "Context",
    "DistillSettings",
    "GateMissedError",
    "GraphoptError",
    "InputError",
    "InternalError",
    "Model",
    "Pass",
    "Pipeline",
    "Result",
    "Rule",
    "RulePass",
    "Settings",
    "Target",
    "TrainSettings",
    "bench",
    "bisect",
    "distill",
    "explain",
    "factorize",
    "finetune",
    "inspect",
    "load",
    "load_plugin",
    "load_samples",
    "optimize",
    "prune",
    "quantize",
    "register",
    "sparsify",
    "validate",
]

_LATER = {
    "Bound": "graphopt.quality",
    "DistillSettings": "graphopt.training",
    "TrainSettings": "graphopt.training",
    "distill": "graphopt.trainer",
    "factorize": "graphopt.factorizer",
    "finetune": "graphopt.trainer",
    "prune": "graphopt.pruner",
    "quantize": "graphopt.quantizer",
    "sparsify": "graphopt.sparsifier",
}
"""Public names whose modules are imported when they are first asked for: they take as long as all others together."""


def __dir__() -> list[str]:
    """Return all public names, those that are imported late as well."""
    return sorted({*globals(), *_LATER})


def __getattr__(name: str) -> Any:
    """Return a public name that is imported late (PEP 562)."""
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    if name == "bridge":  # a package that needs torch
        return importlib.import_module("graphopt.bridge")
    raise AttributeError(f"module 'graphopt' has no attribute '{name}'")
