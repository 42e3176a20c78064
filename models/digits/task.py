"""The digits task: calibration feeds, training images and held-out accuracy, for ``--data``, ``--train``, ``--eval``.

There are 600 labelled test images, all that the set leaves after training and calibration: its 1,797 images are split
as ``train.py`` does, so that no image is in two parts. Training images come from scikit-learn, the others are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.models.digits import demo_calibration, demo_data
from graphopt.models.tasks import Predict, item_limit, require

BATCH = 32
SEED = 7
TEST, CALIBRATION = 600, 200


def calibration(limit: int | None = None) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield 200 images in batches of 32; disjoint from training and test images."""
    images, _ = _load(demo_calibration(), limit)
    for start in range(0, len(images), BATCH):
        yield {"image": images[start : start + BATCH]}


def train(limit: int | None = None) -> Iterator[tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]]:
    """Yield the 997 images that the network was trained on with their labels, in batches of 32.

    Raises:
        ProviderError: scikit-learn, which holds the images, is not installed.
    """
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))[TEST + CALIBRATION :]
    mine = order[: item_limit(limit, len(order))]
    images, labels = digits.images[mine, None].astype(np.float32), digits.target[mine].astype(np.int64)
    for start in range(0, len(mine), BATCH):
        yield {"image": images[start : start + BATCH]}, labels[start : start + BATCH]


def accuracy(predict: Predict, limit: int | None = None) -> npt.NDArray[np.float64]:
    """Return, for each held-out image, 1.0 where the largest logit is the label's, else 0.0."""
    images, labels = _load(demo_data(), limit)
    logits = [predict({"image": images[i : i + BATCH]})["logits"] for i in range(0, len(images), BATCH)]
    return np.asarray(np.concatenate(logits).argmax(axis=1) == labels, np.float64)


def _load(path: Path, limit: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    with np.load(path) as archive:
        count = item_limit(limit, len(archive["label"]))
        return archive["image"][:count], archive["label"][:count]
