"""Training that a kill cannot undo: a folder that holds all that the next update depends on.

    model.onnx   the best model so far, ready to be used
    state.npz    weights, moments of the optimizer, averages, best weights: arrays alone, nothing pickled
    state.json   where training stands, its history, and what it belongs to (model, settings, data size, seed)

The folder is written beside its place and moved there, the one before moved aside first: whenever the process dies, one
of the two is whole, and is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError, SpecError
from graphopt.fingerprint import structure_of
from graphopt.model import Model
from graphopt.training import TrainSettings

FORMAT = "graphopt training 1"
FILES = ("model.onnx", "state.npz", "state.json")

NEEDED = {"arrays", "belongs", "finished"}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beside the model: arrays by name, and what JSON can hold."""

    arrays: dict[str, Array]
    numbers: dict[str, Any]


WHOLE = {"model": "another model", "teacher": "another teacher", "data": "other samples, or in another order"}
"""What is known by a digest, and what is said where that differs."""


def identity(
    model: Model, tensors: Mapping[str, Array], settings: TrainSettings, *, teacher: Model | None,
    data: Mapping[str, Array], rows: int, seed: int, world: int,
) -> dict[str, Any]:  # fmt: skip
    """Return what training depends on beside its state: a checkpoint of anything else is refused."""
    taught = (
        None if teacher is None else _digest(structure_of(teacher), {c.name: c.values for c in teacher.constants()})
    )
    found = {
        "model": _digest(structure_of(model), tensors), "teacher": taught, "data": _digest("", data), "rows": rows,
        "seed": seed, "processes": world,
    }  # fmt: skip
    settings_held = {"kind": type(settings).__name__, **asdict(settings)}
    return json.loads(json.dumps({**found, "settings": settings_held}))  # type: ignore[no-any-return]


def _digest(text: str, tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:32]


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds anything but a checkpoint, or one that is not finished and would be lost.

    Raises:
        SpecError: says which, and what would do.
    """
    _recover(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise SpecError("a checkpoint is a folder, and this is none", at=str(folder), hint="name another place")
    others = sorted({path.name for path in folder.iterdir()} - set(FILES))
    if others:
        raise SpecError(
            f"the folder holds other files ({', '.join(others[:3])}), which a checkpoint would replace",
            at=str(folder), hint="name a folder that does not exist",
        )  # fmt: skip
    if not resume and any(folder.iterdir()) and not _numbers(folder)["finished"]:
        raise SpecError(
            "the folder holds training that was not finished", at=str(folder), hint="resume it, or remove the folder"
        )


def save(folder: Path, model: Model, state: State) -> None:
    """Write a checkpoint in the place of the one before.

    Raises:
        SpecError: the folder cannot be written.
    """
    fresh, old = _beside(folder, "partial"), _beside(folder, "old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        model.save(fresh / "model.onnx")
        with (fresh / "state.npz").open("wb") as file:
            np.savez(file, *state.arrays.values(), allow_pickle=False)  # by number: any name would not do in a zip
            _settle(file)
        with (fresh / "state.json").open("w", encoding="utf-8") as text:
            json.dump({"format": FORMAT, "arrays": list(state.arrays), **state.numbers}, text, indent=1)
            _settle(text)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise SpecError(f"cannot write the checkpoint: {error.strerror or error}", at=str(folder)) from error


def load(folder: Path, belongs: Mapping[str, Any]) -> State | None:
    """Return the state of a checkpoint, None where there is none.

    Args:
        folder: where it lies.
        belongs: what `identity` says of the training at hand.

    Raises:
        SpecError: it belongs to another training; says what differs.
        DataError: its files are damaged.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    numbers = _numbers(folder)
    differences = _differences(numbers["belongs"], belongs)
    if differences:
        raise SpecError(
            f"the checkpoint belongs to another training: {'; '.join(differences)}", at=str(folder),
            hint="give what it was made with, or name another folder",
        )  # fmt: skip
    try:
        with np.load(folder / "state.npz", allow_pickle=False) as held:
            return State({name: held[f"arr_{i}"] for i, name in enumerate(numbers["arrays"])}, numbers)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"the checkpoint is damaged: {error}", at=str(folder / "state.npz")) from error


def _numbers(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the checkpoint is damaged: {error}", at=str(path), hint="remove the folder") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or not document.keys() >= NEEDED:
        raise DataError("this is no checkpoint of graphopt", at=str(path), hint="name another folder")
    return document


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs in words, of models that they do."""
    found = []
    for key in sorted({*was, *now}):
        old, new = was.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new)
        elif old != new:
            found.append(
                f"another {key}" if key in {"model", "teacher"} else f"{key} was {_shown(old)}, is {_shown(new)}"
            )
    return found


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _recover(folder: Path) -> None:
    """Put the checkpoint back that a kill between two moves left aside."""
    old = _beside(folder, "old")
    if not folder.exists() and (old / "state.json").exists():
        old.rename(folder)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}")


def _settle(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
