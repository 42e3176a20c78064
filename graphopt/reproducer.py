"""A folder with all that is needed to see one pass fail again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np

from graphopt import registry, spec
from graphopt.base import Pass
from graphopt.model import Model
from graphopt.validate import Reference


def save_reproducer(
    folder: Path, step: Pass, before: Model, after: Model, reference: Reference | None, detail: str, seed: int
) -> Path:
    """Write before.onnx, after.onnx (if it can be emitted), feeds.npz and README.txt with the command; return where."""
    target = _free(folder, step.name)
    target.mkdir(parents=True)
    before.save(target / "before.onnx")
    lines = [f"pass: {step.name}", "", detail, ""]
    try:
        after.save(target / "after.onnx")
    except Exception as error:  # noqa: BLE001  (a broken model is what is being reported)
        lines.append(f"after.onnx could not be emitted: {error}")
    data = ""
    if reference is not None:
        feeds = reference.first_feeds()
        plain = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        if plain:
            (target / "feeds").mkdir()
            np.savez(target / "feeds" / "0.npz", **plain)  # type: ignore[arg-type]
            data = " --data feeds"
    words = ["graphopt", "run", "before.onnx", "-p", spec.to_text([spec.PassStep(step.name, step.options())])]
    plugin = registry.plugin_of(step.name)
    words += ["--plugin", str(plugin)] if plugin else []
    words += [word for library in before.custom_ops for word in ("--custom-ops", str(library.resolve()))]
    if reference is not None:
        words += ["--provider", reference.provider, "--threads", str(reference.threads)]
    words += ["--seed", str(seed), "--verify", "each", "-o", "out.onnx"]
    lines += ["run in this folder:", f"  {shlex.join(words)}{data}"]
    (target / "README.txt").write_text("\n".join(lines) + "\n")
    return target


def _free(folder: Path, name: str) -> Path:
    stem = re.sub(r"[^\w-]", "_", name)
    number = 1
    while (folder / f"{stem}-{number}").exists():
        number += 1
    return folder / f"{stem}-{number}"
