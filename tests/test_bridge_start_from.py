"""A student that starts from its teacher: by name and shape, or by the channels that pruning left."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from collections.abc import Callable  # noqa: E402  (after the check for torch)
from typing import Any, TypeAlias  # noqa: E402

import numpy as np  # noqa: E402
import onnx  # noqa: E402

from graphopt.bridge.feature_taps import feature_taps  # noqa: E402
from graphopt.bridge.start_from import start_from  # noqa: E402
from graphopt.kept import kept  # noqa: E402
from graphopt.model import Model, load  # noqa: E402
from graphopt.models import digits  # noqa: E402
from graphopt.runtime import evaluate  # noqa: E402
from graphopt.tensors import is_float  # noqa: E402
from graphopt.training import DistillSettings  # noqa: E402
from tests import test_prune_channels as nets  # noqa: E402

Array: TypeAlias = np.ndarray[Any, Any]

WHOLE: tuple[Callable[[nets.Net], str], ...] = (
    nets.residual, nets.norms, nets.grouped, nets.transposed, nets.concat, nets.squeeze_excite, nets.flattened,
    nets.padded, nets.resized, nets.tiled,
)  # fmt: skip
IN_PART: tuple[Callable[[nets.Net], str], ...] = (
    nets.split, nets.sliced, nets.picked, nets.shuffled, nets.pixel_shuffle, nets.open_target, nets.attention,
)  # fmt: skip
"""Channels go through operators that are not followed: some weights stay as they are, none gets others' channels."""


def floats(model: Model) -> dict[str, Array]:
    return {c.name: np.array(c.values) for c in model.constants() if is_float(c.dtype)}


def restarted(proto: onnx.ModelProto) -> tuple[list[str], dict[str, Array], dict[str, Array]]:
    """Return what was started of a pruned model whose weights were overwritten, and its weights before and after."""
    pruned = nets.run(proto).model
    wanted = floats(pruned)
    for constant in pruned.constants():
        if is_float(constant.dtype):
            constant.values = np.array(constant.values) + 1
    started = start_from(pruned, load(proto))
    return started, wanted, floats(pruned)


@pytest.mark.parametrize("grow", [*WHOLE, *IN_PART], ids=lambda grow: str(grow.__name__))
def test_a_pruned_student_gets_the_channels_that_are_left(grow: Callable[[nets.Net], str]) -> None:
    net = nets.Net()
    output = grow(net)
    started, wanted, found = restarted(net.model(output))
    for name in wanted:
        assert np.array_equal(found[name], wanted[name] + (name not in started))
    assert (set(started) == set(wanted)) == (grow in WHOLE)
    assert len(started) >= len(wanted) // 2


def test_the_digits_network() -> None:
    started, wanted, found = restarted(onnx.load(digits.demo_model()))
    assert set(started) == set(wanted)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_projection_of_a_tap_starts_at_the_channels_that_are_left() -> None:
    net = nets.Net()
    proto = net.model(nets.residual(net))
    pruned, teacher = nets.run(proto).model, load(proto)
    tap = next(node.outputs[0].name for node in pruned.graph.nodes if node.name == "expand")
    (term,) = feature_taps(pruned, teacher, DistillSettings(taps=(tap,)))
    left = kept(next(node for node in pruned.graph.nodes if node.name == "expand"))
    assert left is not None
    assert term.weight is not None
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 6, 12, 12)).astype(np.float32)}
    values = torch.from_numpy(evaluate(pruned, feeds, [tap])[tap])
    there = evaluate(teacher, feeds, [tap])[tap]
    projected = term.projected(values).detach().numpy()
    assert np.array_equal(projected[:, left.indices], values.numpy())
    assert projected.shape == there.shape
    assert not np.delete(projected, left.indices, axis=1).any()


def test_names_and_shapes_that_the_teacher_does_not_have_stay() -> None:
    net, other = nets.Net(), nets.Net()
    model, teacher = load(net.model(nets.residual(net))), load(other.model(other.head(other.conv("x", 6, 7), 7)))
    before = floats(model)
    started = start_from(model, teacher)
    shared = {n for n, v in floats(teacher).items() if n in before and before[n].shape == v.shape}
    assert set(started) == shared
    assert all(np.array_equal(v, before[n]) for n, v in floats(model).items() if n not in started)
