"""The command `graphopt factorize`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli_lossy import Common
from graphopt.console import working
from graphopt.options import Globs, Halves, ModelPath
from graphopt.setting_options import offers


@offers(common=Common)
def factorize(
    *,
    model: ModelPath,
    data: Halves = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="largest relative error of every output; without samples, of each weight"),
    ] = None,
    target_latency: Annotated[
        float | None, typer.Option(metavar="X", help="part of the lossless model's measured time that stays")
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="the same rank for every layer")] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="X", help="part of its outputs' power that each layer keeps: 0.99")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="factorise embedding tables, too: smaller, not faster")
    ] = False,
    only: Globs = None,
    skip: Globs = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="time layers, factors and the result; without, count MACs")
    ] = True,
    common: Common,
) -> None:
    """Make two thin layers of those whose outputs have low rank, where that is faster and within the bound.

    Without a bound, what is asked of an output follows from what it looks like: classes, a mask, rows of numbers.
    """
    from graphopt.factorization_report import render  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.factorizer import factorize as run_factorize  # noqa: PLC0415

    source = common.loaded(model, data=data)
    with working(f"factorizing {model.name}", common.as_json) as progress:
        result = run_factorize(
            source, data=data, max_error=max_error, rank=rank, energy=energy, target_latency=target_latency,
            embeddings=embeddings, only=tuple(only or ()), skip=tuple(skip or ()), measure=measure, progress=progress,
            **common.arguments(),
        )  # fmt: skip
    common.finish(result, render(result.report, everything=common.everything))
