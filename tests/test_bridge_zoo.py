"""Real models and exported architectures as torch modules."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from graphopt.bridge import TrainableGraph
from graphopt.errors import ModelError
from graphopt.models import structures, zoo
from graphopt.optimizer import optimize
from tests.bridge_check import check
from tests.zoo_files import fetched

torch.set_num_threads(1)

QUICK = {"ppocr-cls", "silero-vad", "silero-vad-half", "squeezenet", "shufflenet"}
"""Seconds each; the rest of the zoo takes minutes."""

STRUCTURES = {
    "yolo-dynamo", "bilstm-dynamo", "conformer-dynamo", "unet-torchscript", "gqa-dynamo",
    "handmade-computed-weights", "handmade-slopes",
}  # fmt: skip
"""One of each kind; the rest are the slow ones."""

REFUSED = {"handmade-loop-beside": "Loop"}
"""Structure -> the operator that is refused in it."""

ROUNDED = {"handmade-computed-weights": 1e-3, "handmade-quantized": 2e-3}
"""Weights stored in 16 bits, and activations of 8 bits: an element on the border of two codes becomes either."""


def _some(names: list[str], quick: set[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.zoo
@pytest.mark.parametrize("name", _some(zoo.names(), QUICK))
def test_zoo(name: str) -> None:
    check(fetched(name), next(zoo.feeds(name, count=1)))


LARGE = {"alexnet", "vgg19", "zfnet512"}
"""Half a gigabyte each, of plain layers: their raw form is enough."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", _some([n for n in zoo.names() if n not in LARGE], {"ppocr-cls"}))
def test_zoo_in_canonical_form(name: str) -> None:
    model = optimize(fetched(name), stage="canonical", measure=False).model
    check(model, next(zoo.feeds(name, count=1)))


@pytest.mark.parametrize("name", _some([n for n in structures.names() if n not in REFUSED], STRUCTURES))
def test_structures(name: str) -> None:
    """At two shapes: nothing of the first stays in the module."""
    rounded = ROUNDED.get(name, 0.0)
    for second in (False, True):
        exact = name != "handmade-quantized"
        check(structures.get(name), structures.feeds(name, second=second), stored=rounded, exact=exact)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_structures_that_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[name]) as raised:
        TrainableGraph(structures.get(name))
    assert "node '" in str(raised.value.at)
    assert raised.value.hint
