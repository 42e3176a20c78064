"""Gradients of hand-written operators by finite differences, and shapes that stay numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphopt.models import structures

torch = pytest.importorskip("torch")

from graphopt.bridge import (  # noqa: E402  (torch may be missing)
    ops_attention,
    ops_boxes,
    ops_contrib,
    ops_conv,
    ops_index,
    ops_math,
    ops_norm,
    ops_reduce,
    ops_resize,
    ops_rnn,
    ops_shape,
    ops_vision,
)
from graphopt.bridge.graph import TrainableGraph  # noqa: E402


def d(*shape: int, seed: int = 0) -> Any:
    """Return normal numbers in float64, for finite differences."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


LSTM = (d(3, 2, 4), d(2, 12, 4), d(2, 12, 3), d(2, 24))
GRU = (d(3, 2, 4), d(2, 9, 4), d(2, 9, 3), d(2, 18))
LENGTHS = torch.tensor([3, 1])
WINDOW: dict[str, Any] = {"kernel_shape": (3, 2), "pads": (2, 0, 1, 1), "strides": (2, 1)}
PLACES = torch.tensor([[0, 1], [1, -1]])

GRADIENTS: dict[str, Callable[..., Any]] = {
    "lstm": lambda: (lambda *a: ops_rnn.lstm(*a, direction="bidirectional", outputs=3), LSTM),
    "lstm of lengths": lambda: (
        lambda x, w, r, b, p: ops_rnn.lstm(x, w, r, b, LENGTHS, p=p, direction="bidirectional", outputs=3),
        (*LSTM, d(2, 9))),
    "gru": lambda: (lambda *a: ops_rnn.gru(*a, direction="bidirectional", linear_before_reset=1, outputs=2), GRU),
    "gru with the reset first": lambda: (lambda *a: ops_rnn.gru(*a, direction="bidirectional", outputs=2), GRU),
    "rnn": lambda: (
        lambda x, w, r, b: ops_rnn.rnn(
            x, w, r, b, LENGTHS, direction="reverse", activations=("Affine",), activation_alpha=(0.4,),
            activation_beta=(0.1,), outputs=2),
        (d(3, 2, 4), d(1, 3, 4), d(1, 3, 3), d(1, 6))),
    "resize, cubic": lambda: (
        lambda x: ops_resize.resize(x, None, (1, 1, 1.7, 0.6), mode="cubic", exclude_outside=1), (d(1, 2, 4, 5),)),
    "resize, antialias": lambda: (
        lambda x: ops_resize.resize(x, None, (1, 1, 0.5, 0.6), mode="linear", antialias=1), (d(1, 2, 6, 5),)),
    "resize, linear": lambda: (lambda x: ops_resize.resize(x, None, (1, 1, 2, 1.5), mode="linear"), (d(1, 2, 3, 4),)),
    "resize, nearest": lambda: (lambda x: ops_resize.resize(x, None, (1, 1, 1.7, 0.6)), (d(1, 2, 4, 5),)),
    "resize, crop": lambda: (
        lambda x: ops_resize.resize(x, (0, 0, 0.2, -0.1, 1, 1, 0.8, 1.2), None, (1, 2, 3, 6), mode="linear",
                                    coordinate_transformation_mode="tf_crop_and_resize"), (d(1, 2, 4, 5),)),
    "pad, reflect": lambda: (lambda x: ops_resize.pad(x, (0, 2, 1, 1), mode="reflect"), (d(3, 4),)),
    "pad, wrap": lambda: (lambda x: ops_resize.pad(x, (1, 2, 1, 1), mode="wrap"), (d(3, 4),)),
    "conv": lambda: (
        lambda *a: ops_conv.conv(*a, pads=(2, 0, 1, 1), dilations=(1, 2), group=2),
        (d(1, 2, 5, 5), d(4, 1, 2, 3), d(4))),
    "conv transpose": lambda: (
        lambda *a: ops_conv.conv_transpose(*a, pads=(1, 0, 0, 2), strides=(2, 3), output_padding=(1, 2)),
        (d(1, 2, 3, 3), d(2, 2, 3, 2), d(2))),
    "max pool": lambda: (lambda x: ops_conv.max_pool(x, **WINDOW, ceil_mode=1), (d(1, 2, 6, 5),)),
    "average pool": lambda: (lambda x: ops_conv.average_pool(x, **WINDOW, count_include_pad=1), (d(1, 2, 6, 5),)),
    "lp pool": lambda: (lambda x: ops_conv.lp_pool(x, **WINDOW), (d(1, 2, 6, 5),)),
    "lrn": lambda: (lambda x: ops_norm.lrn(x, size=4, alpha=0.5), (d(2, 6, 3),)),
    "layer normalization": lambda: (lambda *a: ops_norm.layer_normalization(*a, outputs=3), (d(2, 5), d(5), d(5))),
    "rms normalization": lambda: (lambda *a: ops_norm.rms_normalization(*a, axis=1), (d(2, 3, 4), d(3, 4))),
    "mean variance": lambda: (lambda x: ops_norm.mean_variance_normalization(x, (0, 2)), (d(2, 3, 4),)),
    "attention": lambda: (
        lambda *a: ops_attention.attention(*a, is_causal=1, softcap=3.0, outputs=4),
        (d(1, 4, 3, 4), d(1, 2, 3, 4), d(1, 2, 3, 5))),
    "rotary": lambda: (ops_attention.rotary_embedding, (d(1, 2, 3, 4), d(1, 3, 2), d(1, 3, 2))),
    "roi align": lambda: (
        lambda x, r: ops_vision.roi_align(x, r, (0, 0), output_height=2, output_width=2, sampling_ratio=2),
        (d(1, 2, 6, 6), torch.tensor([[0.3, 0.6, 4.2, 4.7], [1.1, 0.2, 3.3, 5.2]], dtype=torch.float64))),
    "deformable": lambda: (
        lambda *a: ops_vision.deform_conv(*a, pads=(1, 1, 1, 1)),
        (d(1, 2, 4, 4), d(3, 2, 2, 2), d(1, 8, 5, 5), d(3), d(1, 4, 5, 5))),
    "col2im": lambda: (
        lambda x: ops_vision.col2im(x, (4, 5), (2, 2), strides=(1, 2), pads=(0, 1, 0, 1)), (d(1, 8, 9),)),
    "scatter nd": lambda: (lambda x, u: ops_index.scatter_nd(x, PLACES, u), (d(2, 3, 4), d(2, 4))),
    "scatter nd, mul": lambda: (lambda x, u: ops_index.scatter_nd(x, PLACES, u, "mul"), (d(2, 3, 4), d(2, 4))),
    "gather nd": lambda: (lambda x: ops_index.gather_nd(x, PLACES), (d(2, 3, 4),)),
    "top k": lambda: (lambda x: ops_reduce.topk(x, 2)[0], (d(3, 5),)),
    "l2": lambda: (lambda x: ops_reduce.reduce_l2(x, (1,)), (d(3, 5),)),
    "prod": lambda: (lambda x: ops_reduce.reduce_prod(x, (0, 2)), (d(2, 3, 2),)),
    "gemm": lambda: (lambda a, b, c: ops_math.gemm(a, b, c, 0.5, 2.0, 1, 1), (d(3, 2), d(4, 3), d(4))),
    "cumsum": lambda: (lambda x: ops_math.cumsum(x, 1, exclusive=1, reverse=1), (d(2, 4),)),
    "skip": lambda: (
        lambda *a: ops_contrib.skip_layer_normalization(*a, outputs=4), (d(2, 4), d(2, 4, seed=1), d(4), d(4, seed=1))),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_finite_differences(name: str) -> None:
    function, inputs = GRADIENTS[name]()
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: ops_reduce.reduce_l2(x, (1,)), (2, 3)),
        (lambda x: ops_conv.lp_pool(x, kernel_shape=(2,)), (1, 1, 4)),
        (ops_norm.lp_normalization, (2, 3)), (ops_conv.global_lp_pool, (1, 1, 4)),
    ],
)  # fmt: skip
def test_gradients_of_norms_are_finite_at_zero(function: Callable[..., Any], x: tuple[int, ...]) -> None:
    zeros = torch.zeros(x, requires_grad=True)
    function(zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()


def test_shapes_are_numbers() -> None:
    """What makes shapes stays on the host: with tensors between, torch.compile would break the graph."""
    x = torch.zeros(2, 3, 4)
    sizes = ops_shape.shape(x)
    assert sizes == (2, 3, 4)
    last = ops_index.gather(sizes, -1)
    assert last == 4
    assert ops_shape.concat(
        ops_shape.unsqueeze(ops_math.mul(last, 2), (0,)), ops_shape.sliced(sizes, (0,), (2,)), axis=0
    ) == (8, 2, 3)
    assert ops_math.div((7, -7), (2,)) == (3, -3)
    assert ops_math.mod((7, -7), 3) == (1, 2)
    assert ops_math.mod((7, -7), 3, fmod=1) == (1, -1)
    assert ops_math.where((True, False), (1, 2), 5) == (1, 5)
    assert ops_math.equal((1, 2), (1,)) == (True, False)
    assert ops_shape.cast(ops_math.floor(ops_math.div(ops_shape.cast(7, 1), 2.0)), 7) == 3
    assert ops_reduce.reduce_prod(sizes, keepdims=0) == 24
    assert ops_shape.constant_of_shape((3,), (1, torch.int64)) == (1, 1, 1)
    assert ops_shape.expand(ops_shape.ranged(0, 6, 5), (2,)) == (0, 5)
    assert ops_shape.reshape((3, 4), (-1,)) == (3, 4)
    assert ops_shape.squeeze((3,), (0,)) == 3
    assert ops_shape.split((1, 2, 3), (1, 2), outputs=2) == ((1,), (2, 3))
    assert ops_shape.tile((1, 2), (2,)) == (1, 2, 1, 2)
    assert ops_math.maximum(3, (1, 5)) == (3, 5)
    assert ops_math.clip((0, 3, 9), 1, 5) == (1, 3, 5)
    assert ops_math.power(2, 3.0) == 8
    assert ops_shape.sliced((1, 2, 3), (-1,), (-9,), (0,), (-1,)) == (3, 2, 1)


def test_boxes_that_overlap_go() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 2], [2, 2, 0, 0.1], [3, 3, 4, 4]]])
    scores = torch.tensor([[[0.5, 0.9, 0.3], [0.1, 0.1, 0.1]]])
    assert ops_boxes.non_max_suppression(boxes, scores, 2, 0.5, 0.2).tolist() == [[0, 0, 1], [0, 0, 2]]
    assert ops_boxes.non_max_suppression(boxes, scores).tolist() == []


@pytest.mark.parametrize("name", ["bilstm-torchscript", "gru-torchscript", "swin-torchscript", "aspp-dynamo"])
def test_modules_run_on_any_device_and_in_low_precision(name: str) -> None:
    """What is made of shapes follows the data: `meta` refuses to mix devices as an accelerator does."""
    feeds = {key: torch.tensor(value) for key, value in structures.feeds(name).items()}
    module = TrainableGraph(structures.get(name)).module
    with torch.autocast("cpu", torch.bfloat16):
        sum(y.float().sum() for y in module(feeds).values()).backward()
    outputs = module.to("meta")({key: value.to("meta") for key, value in feeds.items()})
    assert all(y.device.type == "meta" for y in outputs.values())
