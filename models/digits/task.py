"""The digits task: calibration feeds and held-out accuracy, for ``--data`` and ``--eval``.

There are 600 labelled test images, all that the set leaves after training and calibration.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.models.digits import demo_calibration, demo_data
from graphopt.models.tasks import Predict, item_limit

BATCH = 32


def calibration(limit: int | None = None) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield 200 images in batches of 32; disjoint from training and test images."""
    images, _ = _load(demo_calibration(), limit)
    for start in range(0, len(images), BATCH):
        yield {"image": images[start : start + BATCH]}


def accuracy(predict: Predict, limit: int | None = None) -> npt.NDArray[np.float64]:
    """Return, for each held-out image, 1.0 where the largest logit is the label's, else 0.0."""
    images, labels = _load(demo_data(), limit)
    logits = [predict({"image": images[i : i + BATCH]})["logits"] for i in range(0, len(images), BATCH)]
    return np.asarray(np.concatenate(logits).argmax(axis=1) == labels, np.float64)


def _load(path: Path, limit: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    with np.load(path) as archive:
        count = item_limit(limit, len(archive["label"]))
        return archive["image"][:count], archive["label"][:count]
