"""The labelled tasks on optimized models: every item scores as it did."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt.errors import ProviderError
from graphopt.models import zoo
from graphopt.models.tasks import crops, magika_files, minilm_pairs, ocr_cls, ocr_det, ocr_rec
from graphopt.runtime import Session


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "metric", "items"),
    [
        ("ppocr-rec", ocr_rec.lines_right, 200),
        ("ppocr-rec", ocr_rec.character_accuracy, 100),
        ("ppocr-cls", ocr_cls.rotation_right, 400),
        ("ppocr-det", ocr_det.box_f1, 40),
        ("magika", magika_files.type_right, 264),
        ("minilm-torchscript", minilm_pairs.neighbour_right, 200),
        ("minilm-dynamo", minilm_pairs.neighbour_right, 200),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_item_scores_as_before(model: str, metric: Callable[..., Any], items: int) -> None:
    path = fetched(model)
    optimized = graphopt.optimize(path, measure=False, verify="off")
    assert optimized.report.after.nodes < optimized.report.before.nodes
    before = metric(Session(path).run, limit=items)
    after = metric(Session(optimized.proto).run, limit=items)
    assert before.mean() > 0.5  # there is something to lose
    assert np.array_equal(before, after)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_every_picture_is_classified_as_before(exporter: str) -> None:
    path = fetched(f"efficientnet-lite0-{exporter}")
    optimized = graphopt.optimize(path, measure=False, verify="off")
    agreement = crops.agreement_with(Session(path).run)(Session(optimized.proto).run, limit=100)
    assert agreement.mean() == 1.0


def fetched(name: str) -> Any:
    try:
        return zoo.fetch(name)
    except ProviderError as error:
        if os.environ.get("CI") and zoo.get(name).recipe != "torch-export":
            raise
        pytest.skip(str(error))
