"""Natural crops of 224 x 224 pixels for image classifiers: agreement with a reference model.

There are no labels; what is asked is that the class with the largest logit stays the one the reference model
gives. Crops come from photographs that scikit-image and scikit-learn ship, and no photograph is in both the
calibration and the test set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.models import zoo
from graphopt.models.tasks import Feeds, Predict, Scores, item_limit, require, text

CALIBRATION_PHOTOS = ("sklearn:china.jpg", "skimage:coffee.png", "skimage:motorcycle_left.png", "skimage:grass.png")
TEST_PHOTOS = (
    *("sklearn:flower.jpg", "skimage:astronaut.png", "skimage:chelsea.png", "skimage:rocket.jpg"),
    *("skimage:camera.png", "skimage:coins.png", "skimage:brick.png", "skimage:hubble_deep_field.jpg"),
)
TEST_CROPS, CALIBRATION_CROPS = 2000, 128
SIZE, BATCH = 224, 8
_SEEDS: dict[text.Split, int] = {"calibration": 707, "test": 808}


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 8 crops, ``image``: N, 3, 224, 224, RGB, (x - 127) / 128."""
    yield from feeds("calibration", item_limit(limit, CALIBRATION_CROPS))


def held_out(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 8 crops of other photographs than those of ``calibration``, 2,000 crops in all."""
    yield from feeds("test", item_limit(limit, TEST_CROPS))


def agreement_with(reference: str | Path | Predict) -> Callable[..., Scores]:
    """Return an evaluation function: is the largest logit where the reference model has it?

    Args:
        reference: a model file with input ``image`` (N, 3, 224, 224), or a ``predict`` function.
    """
    known: dict[int, npt.NDArray[np.int64]] = {}

    def agreement(predict: Predict, limit: int | None = None) -> Scores:
        """Return 1.0 per test crop where the model and the reference agree, else 0.0."""
        count = item_limit(limit, TEST_CROPS)
        if count not in known:
            known[count] = _classes(_opened(reference), count)
        return np.asarray(_classes(predict, count) == known[count], np.float64)

    return agreement


def top1_agreement(predict: Predict, limit: int | None = None) -> Scores:
    """Return 1.0 per test crop where the model agrees with the zoo's EfficientNet-Lite0, else 0.0."""
    return _efficientnet_agreement()(predict, limit)


def feeds(split: text.Split, count: int) -> Iterator[Feeds]:
    """Yield the crops of a split, the same every time, in batches of 8."""
    for start in range(0, count, BATCH):
        batch = [_crop(split, index) for index in range(start, min(start + BATCH, count))]
        pixels = np.stack(batch).astype(np.float32).transpose(0, 3, 1, 2)
        yield {"image": (pixels - 127.0) / 128.0}


def _crop(split: text.Split, index: int) -> npt.NDArray[np.uint8]:
    """Return a square part of a photograph, mirrored one time in two, scaled to 224 x 224 x 3."""
    rng = np.random.default_rng([_SEEDS[split], index])
    photos = CALIBRATION_PHOTOS if split == "calibration" else TEST_PHOTOS
    photo = _photo(photos[index % len(photos)])
    side = int(min(photo.size) * rng.uniform(0.35, 1.0))
    left, top = (int(rng.integers(full - side + 1)) for full in photo.size)
    part = photo.resize((SIZE, SIZE), resample=2, box=(left, top, left + side, top + side))  # 2: bilinear
    pixels = np.asarray(part, np.uint8)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


@functools.cache
def _photo(name: str) -> Any:
    package, file = name.split(":")
    if package == "sklearn":
        folder = Path(str(require("sklearn.datasets", "scikit-learn").__file__)).parent / "images"
    else:
        folder = Path(str(require("skimage.data", "scikit-image").__file__)).parent
    return require("PIL.Image", "pillow").open(folder / file).convert("RGB")


def _classes(predict: Predict, count: int) -> npt.NDArray[np.int64]:
    logits = [next(iter(predict(feed).values())) for feed in feeds("test", count)]
    return np.asarray(np.concatenate(logits).argmax(axis=1), np.int64)


@functools.cache
def _efficientnet_agreement() -> Callable[..., Scores]:
    return agreement_with(zoo.fetch("efficientnet-lite0-torchscript"))


def _opened(reference: str | Path | Predict) -> Predict:
    if callable(reference):
        return reference
    from graphopt.runtime import Session  # noqa: PLC0415 (tasks that only predict need no session)

    return Session(Path(reference)).run
