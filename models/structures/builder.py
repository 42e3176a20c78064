"""A small graph writer for the handmade structures: layers with random weights, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .spec import Input

_IR_VERSION = {9: 4, 11: 6, 13: 7, 17: 8, 18: 8}


@dataclass(frozen=True)
class Made:
    """A model and what it takes."""

    proto: onnx.ModelProto
    inputs: Mapping[str, Input]


@dataclass
class Builder:
    """Nodes and initializers of one graph; every method returns the name of a tensor."""

    rng: np.random.Generator
    opset: int = 17
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; return its output's name, or a list of names."""
        name = f"{kind}_{len(self.nodes)}"
        made = [f"{name}_out{index}" for index in range(outputs)] if outputs > 1 else [f"{name}_out"]
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=name, **attributes))
        return made if outputs > 1 else made[0]

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Add an initializer with these values."""
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        """Add a 1-D int64 initializer."""
        return self.constant(values, np.int64)

    def weight(self, *shape: int, fan_in: int) -> str:
        """Add a He-scaled weight."""
        return self.constant(self.rng.standard_normal(shape) * (1.5 / fan_in) ** 0.5)

    def spread(self, *shape: int, low: float = -0.1, high: float = 0.1) -> str:
        """Add a constant drawn evenly from an interval: a bias, a scale."""
        return self.constant(self.rng.uniform(low, high, shape))

    def conv(
        self, x: str, inputs: int, outputs: int, kernel: int = 3, *, dims: int = 2, bias: bool = True, **more: Any
    ) -> str:
        """Add a convolution that keeps the extent, unless attributes say otherwise."""
        per_group = inputs // more.get("group", 1)
        weight = self.weight(outputs, per_group, *[kernel] * dims, fan_in=per_group * kernel**dims)
        extra = [self.spread(outputs)] if bias else []
        more = {"kernel_shape": [kernel] * dims, "pads": [kernel // 2] * (2 * dims), **more}
        return self.op("Conv", x, weight, *extra, **more)

    def norm(self, x: str, channels: int) -> str:
        """Add a BatchNormalization."""
        scale, bias = self.spread(channels, low=0.7, high=1.2), self.spread(channels)
        mean, variance = self.spread(channels), self.spread(channels, low=0.7, high=1.3)
        return self.op("BatchNormalization", x, scale, bias, mean, variance)

    def gemm(self, x: str, inputs: int, outputs: int) -> str:
        """Add a Gemm whose weight lies as PyTorch's does."""
        weight = self.weight(outputs, inputs, fan_in=inputs)
        return self.op("Gemm", x, weight, self.spread(outputs), transB=1)

    def made(self, inputs: Mapping[str, Input], outputs: Sequence[str], rank: int = 2) -> Made:
        """Return the model; dynamic axes get names, outputs of unknown shape the rank."""

        def typed(name: str, spec: Input) -> onnx.ValueInfoProto:
            dims = [f"{name}{axis}" if axis in spec.dynamic else size for axis, size in enumerate(spec.shape)]
            return helper.make_tensor_value_info(name, TensorProto.INT64 if spec.high else TensorProto.FLOAT, dims)

        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        values = [typed(name, spec) for name, spec in inputs.items()]
        graph = helper.make_graph(self.nodes, "handmade", values, results, self.initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION[self.opset])
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        ranks = {value.name: value for value in inferred.graph.output}
        for value in model.graph.output:
            value.CopyFrom(ranks[value.name])
            if not value.type.tensor_type.HasField("shape"):
                value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [None] * rank))
        return Made(model, inputs)
