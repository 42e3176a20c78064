"""Rendered lines to train on, by the thousand: drawn once, kept on disk at the height that networks read.

Their texts are those of the share that calibrates, so none of them chooses or judges, without those that calibration
draws.  A line looks as those of the other splits do (`render.line`) and depends on its seed and index alone.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt.models.tasks import render, require, text
from graphopt.models.wheels import cache_dir, replacing

CHUNK = 128
"""Lines in a file."""
CALIBRATING = 1024
"""Calibration lines whose texts are left out."""
_MADE_BY = ("training_lines.py", "render.py", "text.py", "words.toml")


@dataclass(frozen=True)
class Lines:
    """A source of lines.

    Attributes:
        name: of its files.
        seed: of its lines.
        calibration: seed of the lines that calibrate, whose texts these do not have.
        height: of pictures, in pixels.
        characters: part of the lines that are runs of random Chinese characters, beside those that there are anyway:
            a network that tells thousands of them apart keeps those that it is shown.
        widest: what wider pictures are squeezed to; 0: they stay as wide as they are.
    """

    name: str
    seed: int
    calibration: int
    height: int
    characters: float = 0.0
    widest: int = 0

    def first(self, count: int) -> Iterator[render.Line]:
        """Yield the first lines, the same every time; pictures have the height of this source."""
        for chunk in range(-(-count // CHUNK)):
            yield from itertools.islice(self._chunk(chunk), min(CHUNK, count - chunk * CHUNK))

    def _chunk(self, chunk: int) -> Iterator[render.Line]:
        path = cache_dir() / "tasks" / f"{self.name}-{self.characters:g}-{_made_by():08x}" / f"{chunk}.npz"
        if not path.exists():
            self._draw(chunk, path)
        with np.load(path, allow_pickle=False) as file:
            pixels, ends, texts = file["pixels"], file["ends"], bytes(file["texts"]).decode().split("\n")
        for line, picture in zip(texts, np.split(pixels, ends[:-1], axis=1), strict=True):
            yield render.Line(line, picture)

    def _draw(self, chunk: int, path: Path) -> None:
        lines = [self._line(index) for index in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
        pictures = [render.fitted(line.picture, self.height, self.widest) for line in lines]
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream, pixels=np.concatenate(pictures, axis=1), ends=np.cumsum([p.shape[1] for p in pictures]),
                texts=np.frombuffer("\n".join(line.text for line in lines).encode(), np.uint8),
            )  # fmt: skip

    def _line(self, index: int) -> render.Line:
        rng = np.random.default_rng([self.seed, index])
        while (line := self._any(rng)).text in calibrating(self.calibration):
            pass
        return line

    def _any(self, rng: np.random.Generator) -> render.Line:
        if self.characters and rng.random() < self.characters:
            return render.drawn(rng, "chinese", text.characters(rng, "calibration"))
        return render.line(rng, "calibration")


@functools.cache
def calibrating(seed: int) -> frozenset[str]:
    """Return the texts of the first calibration lines of a seed."""
    generators = (np.random.default_rng([seed, index]) for index in range(CALIBRATING))
    return frozenset(text.line(rng, render.script_of(rng), "calibration") for rng in generators)


@functools.cache
def _made_by() -> int:
    """Return a number that is another one when lines are drawn another way."""
    sources = (Path(__file__).with_name(name).read_bytes() for name in _MADE_BY)
    return zlib.crc32(b"".join(sources) + require("PIL", "pillow").__version__.encode())
