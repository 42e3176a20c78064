"""Exported architectures with random weights: what is cut out of them leaves a model that equals its masked twins.

Random 40 % of every group.  Three twins, ORT's optimisations off: consumers' slices zeroed as `masking` does it; slices
read off the weights and zeroed whoever uses them; only what makes the channels zeroed, where zeros then stay zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import kept, masking, runtime
from graphopt.analysis.channels import Channels, Group, find_groups
from graphopt.analysis.cost import costs
from graphopt.analysis.shapes import Shapes
from graphopt.edit import label
from graphopt.errors import SpecError
from graphopt.models import structures
from graphopt.pipeline import Pipeline, Settings
from tests.cut_twins import Slices, Use, slices, twin

CUT = "prune-channels{criterion=random,spread=local,ratio=0.4,round_to=1}"
CASES = [
    pytest.param(name, stage, marks=pytest.mark.slow if (stage == "raw") == name.endswith("torchscript") else ())
    for name in structures.names() for stage in ("raw", "canonical")
]  # fmt: skip
"""Both stages of all; by default what dynamo and hands wrote as it came, TorchScript's in canonical form."""

NOISE = 2e-5
"""Relative to the largest element: float32 sums of a few hundred terms in another order, some twenty layers deep."""

SHIFTED = {"handmade-small-meets-large", "handmade-einsum-attention"}
"""Where a channel of zeros does not stay one on its way to those who read it, or an equation says what is made."""

CODED = {"handmade-weight-codes"}
"""Where weights are codes alone, in which slices cannot be told apart."""

LESS = 0.9
"""Part of the MACs and parameters that is left at most."""

BATCH_COVERAGE = 0.98
"""Part of the parameters in tensors with an axis that can be cut: all but norms of inputs, biases of outputs."""

LAYER_COVERAGE = 0.8
"""The same where LayerNorm freezes its axis."""

HALVED = {"espcn-dynamo"}
"""Written as Reshape to (H // 2, 2): nothing in the graph says that H is even, so what lies before stays."""

STAYS = ("input '", "output '", "kernels lie", "groups of channels", "has a direction", "by computed indices",
         "Softmax '", "no layer makes it", "slides along it")  # fmt: skip
"""Reasons of axes that stay by their nature: what enters and leaves, places of a kernel, vocabularies, classes."""


def proto(name: str, stage: str) -> onnx.ModelProto:
    model = structures.get(name)
    return model if stage == "raw" else graphopt.optimize(model, stage="canonical", measure=False).proto


def feeds(name: str) -> list[dict[str, Any]]:
    dynamic = any(spec.dynamic for spec in structures.inputs(name).values())
    return [structures.feeds(name), *([structures.feeds(name, 1, second=True)] if dynamic else [])]


def apart(one: onnx.ModelProto | graphopt.Model, other: onnx.ModelProto | graphopt.Model, name: str) -> float:
    """Return the largest difference of an output relative to its largest element, over both shapes."""
    worst = 0.0
    for feed in feeds(name):
        wanted, found = runtime.evaluate(one, feed), runtime.evaluate(other, feed)
        for key, value in wanted.items():
            assert value.shape == found[key].shape
            worst = max(worst, float(np.abs(value - found[key]).max() / np.abs(value).max()))
    return worst


def groups_of(model: graphopt.Model) -> Channels:
    return find_groups(model, Shapes(model), runtime.evaluate)


def left(groups: Iterable[Group], cut: graphopt.Model, gone: Mapping[Use, Slices]) -> list[tuple[Group, Any]]:
    """Return each group with the units that are left: read off its weights, in codes off the notes of its layers."""
    notes = {label(node): kept.kept(node) for node in cut.nodes()}
    found = []
    for group in groups:
        units = np.arange(group.size)
        for site in group.sites:
            if site.node is None or site.role == "carries":
                continue
            note = notes.get(label(site.node))
            if (label(site.node), site.port) in gone:
                units = np.intersect1d(units, site.units[gone[label(site.node), site.port].kept[site.axis]])
            elif site.role == "makes" and note is not None and note.width == len(site.units):
                units = np.intersect1d(units, site.units[note.indices])
        found.append((group, units))
    return found


def cut_of(model: graphopt.Model) -> graphopt.Model:
    return Pipeline(CUT).run(model, settings=Settings(verify="off", on_failure="stop")).model


def size(model: graphopt.Model, name: str) -> tuple[int | None, int]:
    """Return MACs, None where some are unknown, and bytes of weights."""
    shapes = {key: list(spec.shape) for key, spec in structures.inputs(name).items()}
    cost = costs(model, inputs=shapes)
    return None if cost.unknown else cost.macs, model.weight_bytes()


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_cut_model_equals_masked_twins(name: str, stage: str) -> None:
    before = proto(name, stage)
    model = graphopt.load(before)
    groups = groups_of(model).prunable()
    cut = cut_of(model)
    after = cut.proto
    onnx.checker.check_model(after, full_check=True)
    gone = slices(before, after)
    assert gone
    assert apart(masking.masked(model, left(groups, cut, gone)), cut, name) < NOISE
    if name not in CODED:
        assert apart(twin(before, gone), after, name) < NOISE
    if name not in SHIFTED | CODED:
        assert apart(twin(before, gone, producers=True), after, name) < NOISE
    (macs, parameters), (fewer, left_over) = size(model, name), size(cut, name)
    assert left_over < LESS * parameters
    assert macs is None or fewer is None or fewer < LESS * macs


@pytest.mark.parametrize(("name", "stage"), [case for case in CASES if structures.norm(str(case.values[0])) != "none"])
def test_weights_have_an_axis_that_can_be_cut(name: str, stage: str) -> None:
    found = groups_of(graphopt.load(proto(name, stage)))
    held, total = found.coverage()
    assert all(group.role("makes") for group in found.groups)
    assert all(axis.why for axis in found.frozen_axes)
    if structures.norm(name) == "layer" or name in HALVED:
        assert held >= LAYER_COVERAGE * total
    else:
        assert held >= BATCH_COVERAGE * total
        assert not [axis for axis in found.frozen_axes if not any(word in axis.why for word in STAYS)]


@pytest.mark.parametrize("name", structures.names())
def test_activations_neither_die_nor_explode(name: str) -> None:
    for feed in feeds(name):
        for value in runtime.evaluate(structures.get(name, seed=3), feed).values():
            assert np.isfinite(value).all()
            assert 1e-3 < float(value.std()) < 1e2
            assert len(value) == 1 or float(np.abs(value - value[:1]).max()) > 1e-4  # it depends on the input


def test_a_seed_gives_the_same_weights_and_feeds() -> None:
    one, other = structures.get("resnet18-dynamo", 5), structures.get("resnet18-dynamo", 5)
    assert one.SerializeToString() == other.SerializeToString()
    assert one.SerializeToString() != structures.get("resnet18-dynamo", 6).SerializeToString()
    assert np.array_equal(structures.feeds("vgg-dynamo", 5)["image"], structures.feeds("vgg-dynamo", 5)["image"])


def test_files_are_small() -> None:
    folder = Path(structures.__file__).parent
    assert max(path.stat().st_size for path in folder.glob("*.onnx")) < 40_000


def test_unknown_name_is_one_clear_error() -> None:
    with pytest.raises(SpecError, match="no structure 'resnet19-dynamo'") as error:
        structures.get("resnet19-dynamo")
    assert "resnet18-dynamo" in (error.value.hint or "")
