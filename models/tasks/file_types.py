"""Contents of files of known types, made from a seed: (label, bytes).

Labels are those of magika. Text types are put together from templates (file_templates.toml), data and binary
types are written by the standard library, NumPy, ONNX and Pillow.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import keyword
import lzma
import marshal
import pickle
import sqlite3
import string
import tarfile
import tomllib
import wave
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from graphopt.models.tasks import require
from graphopt.models.tasks.text import words

Rng = np.random.Generator


@dataclass(frozen=True)
class Template:
    """How a text file of some type starts, pieces that it is made of, and how it ends."""

    start: str
    pieces: tuple[str, ...]
    end: str
    crlf: bool


@functools.cache
def templates() -> dict[str, Template]:
    """Return the templates of the text types by label."""
    with Path(__file__).with_name("file_templates.toml").open("rb") as stream:
        table = tomllib.load(stream)
    return {
        label: Template(row["start"], tuple(row["pieces"]), row.get("end", ""), row.get("line_ends") == "crlf")
        for label, row in table.items()
    }


def types() -> tuple[str, ...]:
    """Return the labels of all types that can be made."""
    return (*templates(), *_MAKERS)


def make(label: str, rng: Rng) -> bytes:
    """Return the content of a file of the type."""
    return _source(label, rng).encode() if label in templates() else _MAKERS[label](rng)


def _source(label: str, rng: Rng) -> str:
    template = templates()[label]
    count = int(rng.integers(4, 30))
    pieces = [template.pieces[int(i)] for i in rng.integers(len(template.pieces), size=count)]
    texts = [template.start, *pieces, template.end]
    filled = (string.Template(text).safe_substitute(_fillings(rng, i)) for i, text in enumerate(texts))
    return "".join(filled).replace("\n", "\r\n" if template.crlf else "\n")


def _fillings(rng: Rng, index: int) -> dict[str, str]:
    a, b, c, d = words(rng, 4)
    names = {"a": a, "b": f"{b}_{c}" if rng.random() < 0.5 else b, "c": c, "A": b.title() + a.title(), "B": d.title()}
    numbers = {key: str(int(rng.integers(2, 900))) for key in "nm"}
    clock = {"u": f"{index // 12:02d}", "v": f"{index % 12 * 5:02d}", "w": "000", "x": "900", "i": str(index)}
    return (
        names | numbers | clock | {"s": _sentence(rng), "t": " ".join(words(rng, 3)).title(), "d": str(index % 9 + 1)}
    )


def _sentence(rng: Rng) -> str:
    return " ".join(words(rng, int(rng.integers(5, 12)))).capitalize() + "."


def _record(rng: Rng) -> dict[str, Any]:
    a, b, c = words(rng, 3)
    number = float(np.round(rng.normal() * 100, 3))
    return {"id": int(rng.integers(10_000)), "name": f"{a} {b}".title(), c: number, "tags": [b, c], "active": True}


def _json(rng: Rng) -> bytes:
    document = {"version": 2, words(rng, 1)[0]: [_record(rng) for _ in range(int(rng.integers(3, 20)))]}
    return json.dumps(document, indent=2).encode()


def _jsonl(rng: Rng) -> bytes:
    return "\n".join(json.dumps(_record(rng)) for _ in range(int(rng.integers(8, 40)))).encode()


def _table(rng: Rng, delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(["id", "name", *words(rng, 3), "date"])
    for index in range(int(rng.integers(10, 60))):
        numbers = np.round(rng.normal(size=3) * 50, 2).tolist()
        writer.writerow([index, " ".join(words(rng, 2)).title(), *numbers, f"2024-{index % 12 + 1:02d}-11"])
    return stream.getvalue().encode()


def _ipynb(rng: Rng) -> bytes:
    cells: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(2, 8))):
        a, b = words(rng, 2)
        source = [f"import {a}\n", f"{b} = {a}.load({int(rng.integers(99))})\n", f"print({b})"]
        code: dict[str, Any] = {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": source,
        }
        cells += [{"cell_type": "markdown", "metadata": {}, "source": [f"# {_sentence(rng)}"]}, code]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1).encode()


def _names(rng: Rng, count: int) -> list[str]:
    """Return words that Python takes as names."""
    return [f"{word}s" if keyword.iskeyword(word) else word for word in words(rng, count)]


def _python(rng: Rng) -> bytes:
    lines = [f'"""{_sentence(rng)}"""', "", "import os", f"from {_names(rng, 1)[0]} import {_names(rng, 1)[0]}", ""]
    for _ in range(int(rng.integers(3, 15))):
        a, b, c = _names(rng, 3)
        lines += ["", f"def {a}_{b}(self, {c}=None, *args):", f'    """{_sentence(rng)}"""', f"    if not {c}:"]
        lines += [f"        raise ValueError('{_sentence(rng)}')", f"    {b} = [x for x in {c} if x is not None]"]
        lines += [f"    return {{'{a}': len({b}), '{c}': os.path.join({c}, '{b}')}}", ""]
    return "\n".join([*lines, "", 'if __name__ == "__main__":', f"    print({_names(rng, 1)[0]}())", ""]).encode()


def _bytecode(rng: Rng) -> bytes:
    code = compile(_python(rng), f"{words(rng, 1)[0]}.py", "exec")
    return MAGIC_NUMBER + bytes(4) + int(rng.integers(2**31)).to_bytes(8, "little") + marshal.dumps(code)


def _picture(rng: Rng) -> Any:
    height, width = (int(n) for n in rng.integers(24, 160, 2))
    slopes = rng.uniform(-2, 2, (2, 3))
    rows, columns = np.indices((height, width))
    pixels = rng.uniform(0, 255, 3) + rows[..., None] * slopes[0] + columns[..., None] * slopes[1]
    pixels = pixels + rng.normal(0, rng.uniform(0, 20), pixels.shape)
    return require("PIL.Image", "pillow").fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _saved(form: str) -> Callable[[Rng], bytes]:
    def maker(rng: Rng) -> bytes:
        stream = io.BytesIO()
        _picture(rng).save(stream, format=form)
        return stream.getvalue()

    return maker


def _payload(rng: Rng) -> bytes:
    return _source("txt" if rng.random() < 0.5 else "html", rng).encode()


def _zip(rng: Rng) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in words(rng, int(rng.integers(1, 6))):
            archive.writestr(f"{name}.txt", _payload(rng))
    return stream.getvalue()


def _tar(rng: Rng) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in words(rng, int(rng.integers(1, 4))):
            content = _payload(rng)
            entry = tarfile.TarInfo(f"{name}/{name}.txt")
            entry.size, entry.mtime = len(content), int(rng.integers(1_500_000_000, 1_700_000_000))
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def _wav(rng: Rng) -> bytes:
    stream = io.BytesIO()
    time = np.arange(int(rng.integers(2000, 9000)))
    sound = 9000 * np.sin(time * rng.uniform(0.01, 0.3)) + rng.normal(0, 300, time.size)
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(int(rng.choice([8000, 16000, 44100])))
        file.writeframes(sound.astype("<i2").tobytes())
    return stream.getvalue()


def _array(rng: Rng) -> np.ndarray[Any, Any]:
    return rng.normal(size=tuple(rng.integers(4, 40, 2))).astype(rng.choice(["float32", "float64"]))


def _npy(rng: Rng) -> bytes:
    stream = io.BytesIO()
    np.save(stream, _array(rng))
    return stream.getvalue()


def _npz(rng: Rng) -> bytes:
    stream = io.BytesIO()
    arrays = {name: _array(rng) for name in words(rng, int(rng.integers(1, 5)))}
    np.savez(stream, **arrays)  # type: ignore[arg-type]  # its other keyword is a flag
    return stream.getvalue()


def _sqlite(rng: Rng) -> bytes:
    database = sqlite3.connect(":memory:")
    for name in words(rng, 2):
        database.execute(f"CREATE TABLE IF NOT EXISTS {name}_rows (id INTEGER PRIMARY KEY, title TEXT, value REAL)")
        rows = [(_sentence(rng), float(rng.normal())) for _ in range(int(rng.integers(5, 60)))]
        database.executemany(f"INSERT INTO {name}_rows (title, value) VALUES (?, ?)", rows)  # noqa: S608 (own words)
    database.commit()
    return database.serialize()


def _onnx(rng: Rng) -> bytes:
    names = [f"{name}_{index}" for index, name in enumerate(words(rng, int(rng.integers(3, 9))))]
    operators = [str(rng.choice(["Relu", "Sigmoid", "Tanh", "Exp"])) for _ in names[1:]]
    nodes = [helper.make_node(o, [x], [y]) for o, x, y in zip(operators, names, names[1:], strict=False)]
    shape = [int(n) for n in rng.integers(1, 99, 2)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (names[0], names[-1])]
    model = helper.make_model(helper.make_graph(nodes, words(rng, 1)[0], ends[:1], ends[1:]), producer_name="pytorch")
    return bytes(model.SerializeToString())


_MAKERS: dict[str, Callable[[Rng], bytes]] = {
    "json": _json,
    "jsonl": _jsonl,
    "csv": lambda rng: _table(rng, ","),
    "tsv": lambda rng: _table(rng, "\t"),
    "ipynb": _ipynb,
    "python": _python,
    "pythonbytecode": _bytecode,
    "png": _saved("PNG"),
    "jpeg": _saved("JPEG"),
    "gif": _saved("GIF"),
    "bmp": _saved("BMP"),
    "tiff": _saved("TIFF"),
    "webp": _saved("WEBP"),
    "ico": _saved("ICO"),
    "jp2": _saved("JPEG2000"),
    "pdf": _saved("PDF"),
    "postscript": _saved("EPS"),
    "zip": _zip,
    "gzip": lambda rng: gzip.compress(_payload(rng), mtime=int(rng.integers(2**31))),
    "bzip": lambda rng: bz2.compress(_payload(rng)),
    "xz": lambda rng: lzma.compress(_payload(rng)),
    "zlibstream": lambda rng: zlib.compress(_payload(rng)),
    "tar": _tar,
    "wav": _wav,
    "npy": _npy,
    "npz": _npz,
    "pickle": lambda rng: pickle.dumps([_record(rng) for _ in range(int(rng.integers(2, 30)))]),
    "sqlite": _sqlite,
    "onnx": _onnx,
    "randombytes": lambda rng: rng.bytes(int(rng.integers(1000, 9000))),
}
