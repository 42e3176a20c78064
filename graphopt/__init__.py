"""graphopt: a compiler for exported ONNX models.

result = graphopt.optimize("model.onnx")
result.save("model.fast.onnx")
"""

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

__version__ = "0.1.0"
del _interrupt

__all__ = [
    "Change",
    "Context",
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
    "bench",
    "bisect",
    "explain",
    "inspect",
    "load",
    "load_plugin",
    "load_samples",
    "optimize",
    "register",
    "validate",
]
