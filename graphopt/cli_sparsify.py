"""The command `graphopt sparsify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from graphopt.cli_lossy import Common
from graphopt.console import working
from graphopt.options import Globs, Halves, ModelPath
from graphopt.setting_options import offers


@offers(common=Common)
def sparsify(
    *,
    model: ModelPath,
    data: Halves = None,
    amount: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="part of the weights that becomes zero [default: the most that keeps the bound]",
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        str, typer.Option(metavar="N:M", help="leave N of every M inputs, in place of --amount", show_default=False)
    ] = "",
    criterion: Annotated[
        Literal["magnitude", "random", "gradient", "wanda", "sparsegpt"] | None,
        typer.Option(
            help="what goes first; wanda and sparsegpt look at the samples, sparsegpt makes up for what goes "
            "[default: sparsegpt with --data, else magnitude]",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        Literal["global", "per-layer"], typer.Option(help="rank all layers together, or take the same part of each")
    ] = "global",
    only: Globs = None,
    skip: Globs = None,
    gradients: Annotated[
        Path | None, typer.Option(metavar="FILE", help="gradients of the task's loss, for the criterion gradient")
    ] = None,
    storage: Annotated[
        Literal["sparse", "dense"],
        typer.Option(help="save sparse weights in sparse form where that is smaller, or dense as any other"),
    ] = "sparse",
    optimize: Annotated[
        bool, typer.Option("--optimize/--no-optimize", help="run the lossless engine, too, or keep the graph as it is")
    ] = True,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="time what of it pays, or use static defaults")
    ] = True,
    common: Common,
) -> None:
    """Set weights to zero, so that the file is smaller; ONNX Runtime takes as long as before.

    Say how many: an amount or a pattern.  Without, the most is taken that keeps the bound on the accuracy (--eval, or
    a limit on the outputs; by default what suits them).
    """
    from graphopt import sparsifier  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.sparsity_report import render  # noqa: PLC0415

    source = common.loaded(model, data=data, gradients=gradients)
    with working(f"sparsifying {model.name}", common.as_json) as progress:
        result = sparsifier.sparsify(
            source, data=data, amount=amount, criterion=criterion, scope=scope, pattern=pattern, only=only or (),
            skip=skip or (), gradients=gradients, storage=storage, optimize=optimize, measure=measure,
            progress=progress, **common.arguments(),
        )  # fmt: skip
    common.finish(result, render(result.report, everything=common.everything))
