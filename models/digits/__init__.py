"""A small convolutional network of our own, trained on scikit-learn's digits, and data it never saw.

``digits.onnx`` is committed as the exporter wrote it, so that there is something to optimise; ``digits.npz``
holds the test images with their labels, ``calibration.npz`` other images for calibration. ``train.py`` makes
all three. The images are scikit-learn's ``load_digits``: the test part of the UCI "Optical Recognition of
Handwritten Digits" set (Alpaydin, Kaynak 1998), CC BY 4.0.
"""

from pathlib import Path

_HERE = Path(__file__).parent


def demo_model() -> Path:
    """Return the digits network: ``image`` (batch, 1, 8, 8; float32, 0..16) -> ``logits`` (batch, 10)."""
    return _HERE / "digits.onnx"


def demo_data() -> Path:
    """Return its held-out test set, never seen in training: ``image`` and ``label`` (int64), 600 of each."""
    return _HERE / "digits.npz"


def demo_calibration() -> Path:
    """Return 200 more images, neither trained nor tested on: ``image`` and ``label``."""
    return _HERE / "calibration.npz"
