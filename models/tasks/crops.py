"""Natural crops of 224 x 224 pixels for image classifiers: agreement with a reference model.

There are no labels; what is asked is that the class with the largest logit stays the one the reference model
gives. Crops come from photographs that scikit-image, scikit-learn, matplotlib and foolbox ship, and no photograph is in
two of the training, selection and test sets; those that calibrate train, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.models import zoo
from graphopt.models.tasks import Array, Feeds, Predict, Reference, Scores, answers_of, item_limit, require
from graphopt.models.tasks.kept import kept

CALIBRATION_PHOTOS = ("sklearn:china.jpg", "skimage:coffee.png", "skimage:motorcycle_left.png", "skimage:grass.png")
SELECTION_PHOTOS = (
    *("matplotlib:grace_hopper.jpg", "skimage:gravel.png", "skimage:moon.png"),
    *("skimage:retina.jpg", "skimage:ihc.png"),
)
TEST_PHOTOS = (
    *("sklearn:flower.jpg", "skimage:astronaut.png", "skimage:chelsea.png", "skimage:rocket.jpg"),
    *("skimage:camera.png", "skimage:coins.png", "skimage:brick.png", "skimage:hubble_deep_field.jpg"),
)
TRAINING_PHOTOS = (*(f"zoo:photo-{number:02}" for number in range(20)), *CALIBRATION_PHOTOS)
TEST_CROPS, SELECTION_CROPS, CALIBRATION_CROPS, TRAINING_CROPS = 2000, 400, 128, 1600
Split: TypeAlias = Literal["calibration", "training", "selection", "test"]
_COUNTS: dict[Split, int] = {
    "calibration": CALIBRATION_CROPS, "training": TRAINING_CROPS, "selection": SELECTION_CROPS, "test": TEST_CROPS,
}  # fmt: skip
SIZE, BATCH = 224, 8
_SEEDS: dict[Split, int] = {"calibration": 707, "training": 727, "selection": 717, "test": 808}
_PHOTOS: dict[Split, tuple[str, ...]] = {
    "calibration": CALIBRATION_PHOTOS, "training": TRAINING_PHOTOS, "selection": SELECTION_PHOTOS, "test": TEST_PHOTOS,
}  # fmt: skip
_NO_NOISE = 150.0  # dB


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 8 crops, ``image``: N, 3, 224, 224, RGB, (x - 127) / 128."""
    yield from feeds("calibration", item_limit(limit, CALIBRATION_CROPS))


def training(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 8 crops of 24 photographs, among them those of ``calibration``, 1,600 crops in all."""
    yield from feeds("training", item_limit(limit, TRAINING_CROPS))


def held_out(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 8 crops of other photographs than those of ``calibration``, 2,000 crops in all."""
    yield from feeds("test", item_limit(limit, TEST_CROPS))


def selection(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 8 crops of photographs that neither calibrate nor test, 400 crops in all."""
    yield from feeds("selection", item_limit(limit, SELECTION_CROPS))


def agreement_with(reference: Reference, split: Split = "test") -> Callable[..., Scores]:
    """Return an evaluation function: is the largest logit where the reference model has it?

    Args:
        reference: a model file with input ``image`` (N, 3, 224, 224), or a ``predict`` function.
        split: whose crops.
    """
    known = answers_of(reference, _classes)

    def agreement(predict: Predict, limit: int | None = None) -> Scores:
        """Return 1.0 per crop where the model and the reference agree, else 0.0."""
        count = item_limit(limit, _COUNTS[split])
        return np.asarray(_classes(predict, split, count) == known(split, count), np.float64)

    return agreement


def sqnr_with(reference: Reference, split: Split = "test") -> Callable[..., float]:
    """Return an evaluation function: signal to noise of all logits together, against the reference's, in dB.

    Equal logits score 150. Arguments are those of ``agreement_with``.
    """
    known = answers_of(reference, _logits)

    def sqnr(predict: Predict, limit: int | None = None) -> float:
        """Return 10 log10(sum a^2 / sum (a - b)^2) over the crops, a being the reference's logits."""
        count = item_limit(limit, _COUNTS[split])
        a = known(split, count).astype(np.float64)
        noise = float(np.square(a - _logits(predict, split, count)).sum())
        return min(_NO_NOISE, 10 * float(np.log10(np.square(a).sum() / noise))) if noise else _NO_NOISE

    return sqnr


def top1_agreement(predict: Predict, limit: int | None = None) -> Scores:
    """Return 1.0 per test crop where the model agrees with the zoo's EfficientNet-Lite0, else 0.0."""
    return _efficientnet_agreement("test")(predict, limit)


def top1_agreement_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 400 crops that choose."""
    return _efficientnet_agreement("selection")(predict, limit)


def logits_sqnr(predict: Predict, limit: int | None = None) -> float:
    """Return signal to noise of the logits for 2,000 crops against the zoo's EfficientNet-Lite0, in dB."""
    return _efficientnet_sqnr()(predict, limit)


def feeds(split: Split, count: int) -> Iterator[Feeds]:
    """Yield the crops of a split, the same every time, in batches of 8."""
    for start in range(0, count, BATCH):
        batch = [_crop(split, index) for index in range(start, min(start + BATCH, count))]
        pixels = np.stack(batch).astype(np.float32).transpose(0, 3, 1, 2)
        yield {"image": (pixels - 127.0) / 128.0}


@kept(lambda pixels: pixels.nbytes)
def _crop(split: Split, index: int) -> npt.NDArray[np.uint8]:
    """Return a square part of a photograph, mirrored one time in two, scaled to 224 x 224 x 3."""
    rng = np.random.default_rng([_SEEDS[split], index])
    photos = _PHOTOS[split]
    photo = _photo(photos[index % len(photos)])
    side = int(min(photo.size) * rng.uniform(0.35, 1.0))
    left, top = (int(rng.integers(full - side + 1)) for full in photo.size)
    part = photo.resize((SIZE, SIZE), resample=2, box=(left, top, left + side, top + side))  # 2: bilinear
    pixels = np.asarray(part, np.uint8)
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels


@functools.cache
def _photo(name: str) -> Any:
    package, file = name.split(":")
    path = zoo.fetch(file) if package == "zoo" else _folder(package) / file
    return require("PIL.Image", "pillow").open(path).convert("RGB")


def _folder(package: str) -> Path:
    if package == "sklearn":
        return Path(str(require("sklearn.datasets", "scikit-learn").__file__)).parent / "images"
    if package == "matplotlib":
        return Path(require("matplotlib", "matplotlib").get_data_path()) / "sample_data"
    return Path(str(require("skimage.data", "scikit-image").__file__)).parent


def _logits(predict: Predict, split: Split, count: int) -> Array:
    return np.concatenate([next(iter(predict(feed).values())) for feed in feeds(split, count)])


def _classes(predict: Predict, split: Split, count: int) -> npt.NDArray[np.int64]:
    return np.asarray(_logits(predict, split, count).argmax(axis=1), np.int64)


@functools.cache
def _efficientnet_agreement(split: Split) -> Callable[..., Scores]:
    return agreement_with(zoo.fetch("efficientnet-lite0-torchscript"), split)


@functools.cache
def _efficientnet_sqnr() -> Callable[..., float]:
    return sqnr_with(zoo.fetch("efficientnet-lite0-torchscript"))
