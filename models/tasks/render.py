"""Text -> pictures: one line, or a page with several and their boxes; with noise, blur and rotation.

Latin fonts are those that matplotlib ships, Chinese ones come from the zoo's assets (Noto Sans SC, Noto Serif
SC). Pictures are RGB, uint8, height x width x 3.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.models import zoo
from graphopt.models.tasks import require, text

Picture = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

_LATIN_FONTS = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf"),
    *("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "STIXGeneral.ttf"),
)
_CHINESE_FONTS = ("font-noto-sans-sc", "font-noto-serif-sc")


@dataclass(frozen=True)
class Line:
    """A rendered line of text."""

    text: str
    picture: Picture


def script_of(rng: np.random.Generator) -> text.Script:
    """Return the script that a line drawn from this generator next has: Latin or Chinese with equal chance."""
    return "latin" if rng.random() < 0.5 else "chinese"


def line(rng: np.random.Generator, split: text.Split) -> Line:
    """Return a rendered line, Latin or Chinese with equal chance, worn by noise, blur and a small rotation."""
    script = script_of(rng)
    return drawn(rng, script, text.line(rng, script, split))


def drawn(rng: np.random.Generator, script: text.Script, words: str) -> Line:
    """Return a text as a line, worn as `line` wears it."""
    font = _font(script, rng, int(rng.integers(26, 45)))
    left, top, right, bottom = (int(edge) for edge in font.getbbox(words))
    margin = (int(rng.integers(4, 12)), int(rng.integers(3, 8)))
    size = (right - left + 2 * margin[0], bottom - top + 2 * margin[1])
    paper, ink = _colours(rng)
    image = require("PIL.Image", "pillow").new("RGB", size, paper)
    draw = require("PIL.ImageDraw", "pillow").Draw(image)
    draw.text((margin[0] - left, margin[1] - top), words, fill=ink, font=font)
    image = image.rotate(rng.uniform(-1.0, 1.0), resample=2, fillcolor=paper)  # 2: bilinear
    return Line(words, _worn(image, rng))


def page(rng: np.random.Generator, split: text.Split, size: int) -> tuple[Picture, list[Box]]:
    """Return a square page of ``size`` pixels with lines at free places, and their boxes.

    Boxes are (left, top, right, bottom) in pixels, tight around the ink; lines keep clear of each other.
    """
    paper, ink = _colours(rng)
    image = require("PIL.Image", "pillow").new("RGB", (size, size), paper)
    draw = require("PIL.ImageDraw", "pillow").Draw(image)
    boxes: list[Box] = []
    for _ in range(int(rng.integers(6, 20))):
        script: text.Script = "latin" if rng.random() < 0.5 else "chinese"
        words = text.line(rng, script, split)
        font = _font(script, rng, int(rng.integers(14, 31)))
        left, top, right, bottom = (int(edge) for edge in font.getbbox(words))
        width, height = right - left, bottom - top
        if width > size - 16:
            continue
        x, y = int(rng.integers(8, size - width - 7)), int(rng.integers(8, size - height - 7))
        box = (x, y, x + width, y + height)
        if any(_near(box, other) for other in boxes):
            continue
        draw.text((x - left, y - top), words, fill=ink, font=font)
        boxes.append(box)
    return _worn(image, rng), boxes


def network_input(pictures: list[Picture], height: int, width: int) -> npt.NDArray[np.float32]:
    """Return pictures as PaddleOCR's networks take them: N, 3, height, width, BGR, (x / 255 - 0.5) / 0.5.

    Each is scaled to ``height``, keeping its shape where ``width`` allows, and padded with zeros on the right.
    """
    batch = np.zeros((len(pictures), 3, height, width), np.float32)
    for row, picture in zip(batch, pictures, strict=True):
        resized = fitted(picture, height, width)
        row[:, :, : resized.shape[1]] = resized.astype(np.float32)[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1.0
    return batch


def fitted(picture: Picture, height: int, widest: int = 0) -> Picture:
    """Return a picture scaled to ``height``, keeping its shape where ``widest`` (0: any width) allows."""
    width = min(widest or sys.maxsize, scaled_width(picture, height))
    resized = require("PIL.Image", "pillow").fromarray(picture).resize((width, height), resample=2)  # 2: bilinear
    return np.asarray(resized)


def scaled_width(picture: Picture, height: int) -> int:
    """Return the width that a picture has when scaled to ``height``."""
    return int(np.ceil(height * picture.shape[1] / picture.shape[0]))


def _near(box: Box, other: Box, gap: int = 8) -> bool:
    apart = box[0] > other[2] + gap or other[0] > box[2] + gap
    return not (apart or box[1] > other[3] + gap or other[1] > box[3] + gap)


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return paper and ink: dark on light, or one time in seven light on dark."""
    light = tuple(int(c) for c in rng.integers(190, 256, 3))
    dark = tuple(int(c) for c in rng.integers(0, 80, 3))
    return (dark, light) if rng.random() < 1 / 7 else (light, dark)


def _worn(image: Any, rng: np.random.Generator) -> Picture:
    blur = require("PIL.ImageFilter", "pillow").GaussianBlur(rng.uniform(0.0, 1.1))
    pixels = np.asarray(image.filter(blur), np.float32)
    left, right = rng.uniform(-18, 18, 2)
    shade = np.linspace(left, right, pixels.shape[1], dtype=np.float32)[None, :, None]
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(0, 14))
    return np.asarray(np.clip(pixels + shade + noise, 0, 255), np.uint8)


def _font(script: text.Script, rng: np.random.Generator, size: int) -> Any:
    files = _files(script)
    return _sized(files[int(rng.integers(len(files)))], size)


@functools.lru_cache(maxsize=256)
def _sized(path: Path, size: int) -> Any:
    return require("PIL.ImageFont", "pillow").truetype(str(path), size)


@functools.cache
def _files(script: text.Script) -> tuple[Path, ...]:
    if script == "chinese":
        return tuple(zoo.fetch(name) for name in _CHINESE_FONTS)
    folder = Path(require("matplotlib", "matplotlib").get_data_path()) / "fonts" / "ttf"
    return tuple(folder / name for name in _LATIN_FONTS)
