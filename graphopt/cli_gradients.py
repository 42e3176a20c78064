"""The command `graphopt gradients`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from graphopt.console import emit, working
from graphopt.errors import DataError, SpecError
from graphopt.options import AsJson, CustomOps, Globs, ModelPath, Seed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

LARGEST = 10
"""Rows of the table."""


def gradients(
    model: ModelPath,
    train: Annotated[
        str, typer.Option(metavar="SAMPLES", help="feeds with labels: file.py:function yielding pairs of them, or .npz")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT.npz", help="where the gradients are written, by initializer")
    ],
    loss: Annotated[
        str,
        typer.Option(
            help="of outputs against labels: auto, cross-entropy, binary-cross-entropy, mse, l1, smooth-l1, ctc, or "
            "file.py:function"
        ),
    ] = "auto",
    moment: Annotated[
        Literal["first", "second"],
        typer.Option(
            help="first: the mean over batches; second: the root of the mean square over batches, which does not fade "
            "where a model is trained to its end"
        ),
    ] = "first",
    batch: Annotated[int, typer.Option(min=1, help="rows of one batch")] = 32,
    subset: Annotated[int, typer.Option(min=0, help="samples drawn at random; 0: all")] = 0,
    only: Globs = None,
    freeze: Globs = None,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    as_json: AsJson = False,
) -> None:
    """Take gradients of a task's loss by the weights, for `prune` and `sparsify --gradients`."""
    from graphopt import destinations  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.gradients import save_gradients  # noqa: PLC0415
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.training import TrainSettings  # noqa: PLC0415

    if output.suffix != ".npz":
        raise SpecError("gradients are written as .npz", at=str(output), hint=f"-o {output.with_suffix('.npz')}")
    destinations.check({"MODEL": model, "--train": train, "--output": output}, output)
    settings = TrainSettings(
        loss=loss, batch=batch, subset=subset, only=tuple(only or ()), freeze=tuple(freeze or ())
    )  # fmt: skip
    with working(f"gradients of {model.name}", as_json):
        from graphopt.bridge.gradient import gradients as take  # noqa: PLC0415  (torch, only when needed)

        loaded = load(model, custom_ops=custom_ops or ())
        held = {constant.name for constant in loaded.constants()}
        taken = take(loaded, train, settings, moment=moment, seed=seed)
        found = {name: values for name, values in taken.items() if name in held}
        try:
            save_gradients(output, loaded, found)
        except OSError as error:
            raise DataError(f"the gradients cannot be written: {error.strerror or error}", at=str(output)) from error
    emit(_document(found, moment, output), as_json, _table(found), f"wrote {output}")


def _document(found: Mapping[str, np.ndarray[Any, Any]], moment: str, output: Path) -> dict[str, Any]:
    tensors = {name: {"shape": list(values.shape), "norm": _norm(values)} for name, values in found.items()}
    return {"gradients": tensors, "moment": moment, "output": str(output)}


def _table(found: Mapping[str, np.ndarray[Any, Any]]) -> Table:
    """Return the initializers with the largest gradients."""
    table = Table(
        "initializer", "shape", "norm of the gradient", title=f"{len(found)} initializers", title_justify="left"
    )
    for name in sorted(found, key=lambda n: -_norm(found[n]))[:LARGEST]:
        table.add_row(name, "x".join(map(str, found[name].shape)), f"{_norm(found[name]):.4g}")
    return table


def _norm(values: np.ndarray[Any, Any]) -> float:
    return float((values.astype("float64") ** 2).sum() ** 0.5)
