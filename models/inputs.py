"""Feeds for zoo models: an input's shape, dtype and kind -> an array that looks like the real thing.

White noise drives image and audio networks into states that no real input reaches; these signals are cheap
and smooth in space or time as real ones are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class InputSpec:
    """One input of a zoo model: shape and dtype to run and time at, what fills it, what it means."""

    shape: tuple[int, ...]
    dtype: str
    fill: str
    means: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> InputSpec:
        """Read a row of the manifest."""
        return cls(tuple(row["shape"]), row["dtype"], row["fill"], row["means"])


def make(spec: InputSpec, rng: np.random.Generator, shape: tuple[int, ...] | None = None) -> Array:
    """Return one array for the input, of its dtype, at ``shape`` or the shape of the manifest."""
    wanted = spec.shape if shape is None else shape
    return np.asarray(_FILLS[spec.fill](rng, wanted)).astype(spec.dtype)


def _image(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Smooth fields of three sizes and a little noise; about zero mean and unit variance."""
    image = 0.2 * rng.standard_normal(shape)
    for sigma in (2.0, 8.0, 32.0):
        smooth = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 0.3, sigma, sigma), mode="wrap")
        image += smooth / smooth.std()
    return image / 2.0


def _page(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Dark strokes in rows on a light page, in -1..1; the rows are 48 pixels high."""
    batch, _, height, width = shape
    page = rng.uniform(0.7, 1.0, (batch, 1, 1, 1)) + 0.02 * rng.standard_normal(shape)
    for item in range(batch):
        for top in range(0, height - 40, 48):
            stop = int(width * rng.uniform(0.5, 0.95))
            ink = ndimage.gaussian_filter(rng.standard_normal((24, stop)), 1.5) > 0.04
            blurred = ndimage.gaussian_filter(ink.astype(np.float64), 0.7)
            page[item, :, top + 12 : top + 36, 8 : 8 + stop] -= 1.6 * blurred[:, : width - 8]
    return np.clip(page, -1.0, 1.0)


def _audio(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A voiced sound at 16 kHz: harmonics of a gliding pitch under a slow envelope, and breath noise."""
    frames, samples = shape
    time = np.arange(frames * samples) / 16_000
    pitch = rng.uniform(90.0, 250.0) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 3) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    sound = np.asarray(sum(np.sin(k * phase + rng.uniform(0, 6.28)) / k for k in range(1, 16)))
    sound *= 0.15 * (1.1 + np.sin(2 * np.pi * rng.uniform(2, 5) * time))
    return (sound + 0.01 * rng.standard_normal(time.size)).reshape(shape)


def _bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Printable text in the first half, padding (256) then text in the second, as for short files."""
    tokens = rng.choice(np.frombuffer(b"  eeettaoinshrdlu_(){};=.,\n0123", np.uint8).astype(np.int32), shape)
    half = shape[1] // 2
    for row in tokens:
        length = int(rng.integers(half // 4, half + 1))
        row[length:half] = 256
        row[half : shape[1] - length] = 256
    return tokens


def _tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """WordPiece ids: [CLS] (101), whole words, [SEP] (102)."""
    ids = rng.integers(2_000, 20_000, shape)
    ids[:, 0], ids[:, -1] = 101, 102
    return ids


_FILLS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "image": _image,
    "page": _page,
    "audio": _audio,
    "state": lambda rng, shape: np.tanh(0.3 * rng.standard_normal(shape)),
    "rate": lambda _rng, shape: np.full(shape, 16_000),
    "bytes": _bytes,
    "tokens": _tokens,
    "ones": lambda _rng, shape: np.ones(shape),
}
