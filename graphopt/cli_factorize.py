"""The command `graphopt factorize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.arguments import load_plugins, shapes, thread_counts
from graphopt.cli_lossy import bound_of, finish
from graphopt.console import working
from graphopt.options import (
    AsJson,
    Batch,
    Contrib,
    CustomOps,
    DecisionsFile,
    Globs,
    Halves,
    MaxDrop,
    MaxLoss,
    Metric,
    MinAgreement,
    MinCosine,
    MinSqnr,
    ModelPath,
    Output,
    Plugins,
    Provider,
    Seconds,
    Seed,
    Shape,
    TimedThreads,
    WriteDecisions,
)


def factorize(
    model: ModelPath,
    output: Output = None,
    data: Halves = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="largest relative error of every output; without samples, of each weight"),
    ] = None,
    evaluate: Metric = None,
    max_drop: MaxDrop = None,
    min_sqnr: MinSqnr = None,
    min_cosine: MinCosine = None,
    min_agreement: MinAgreement = None,
    max_loss: MaxLoss = None,
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
    provider: Provider = "cpu",
    threads: TimedThreads = None,
    contrib: Contrib = False,
    budget: Seconds = 60.0,
    decisions: DecisionsFile = None,
    write_decisions: WriteDecisions = None,
    shape: Shape = None,
    batch: Batch = 1,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    everything: Annotated[bool, typer.Option("--all", help="every layer in the table")] = False,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Make two thin layers of those whose outputs have low rank, where that is faster and within the bound.

    Without a bound, what is asked of an output follows from what it looks like: classes, a mask, rows of numbers.
    """
    from graphopt import destinations  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.factorization_report import render  # noqa: PLC0415
    from graphopt.factorizer import factorize as run_factorize  # noqa: PLC0415
    from graphopt.model import load  # noqa: PLC0415

    files: dict[str, Path | str | None] = {
        "MODEL": model, "--data": data, "--decisions": decisions, "--output": output,
        "--write-decisions": write_decisions,
    }  # fmt: skip
    destinations.check(files, output, write_decisions)
    load_plugins(plugin)
    with working(f"factorizing {model.name}", as_json) as progress:
        result = run_factorize(
            load(model, custom_ops=custom_ops or ()), data=data, max_error=max_error,
            bound=bound_of(min_sqnr, min_cosine, min_agreement, evaluate, max_drop, max_loss), rank=rank, energy=energy,
            target_latency=target_latency, embeddings=embeddings, only=tuple(only or ()), skip=tuple(skip or ()),
            measure=measure, provider=provider, threads=thread_counts(threads) or 1, contrib=contrib,
            shapes=shapes(shape), batch=batch, budget=budget, seed=seed, decisions=decisions, progress=progress,
        )  # fmt: skip
    shown = render(result.report, everything=everything)
    finish(result, shown, output=output, write_decisions=write_decisions, as_json=as_json)
