"""The command `graphopt sparsify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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


def sparsify(
    model: ModelPath,
    output: Output = None,
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
    evaluate: Metric = None,
    max_drop: MaxDrop = None,
    min_sqnr: MinSqnr = None,
    min_cosine: MinCosine = None,
    min_agreement: MinAgreement = None,
    max_loss: MaxLoss = None,
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
    """Set weights to zero, so that the file is smaller; ONNX Runtime takes as long as before.

    Say how many: an amount or a pattern.  Without, the most is taken that keeps the bound on the accuracy (--eval, or
    a limit on the outputs; by default what suits them).
    """
    from graphopt import destinations, sparsifier  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.sparsity_report import render  # noqa: PLC0415

    files: dict[str, Path | str | None] = {
        "MODEL": model, "--data": data, "--gradients": gradients, "--decisions": decisions, "--output": output,
        "--write-decisions": write_decisions,
    }  # fmt: skip
    destinations.check(files, output, write_decisions)
    load_plugins(plugin)
    with working(f"sparsifying {model.name}", as_json) as progress:
        result = sparsifier.sparsify(
            load(model, custom_ops=custom_ops or ()), data=data,
            bound=bound_of(min_sqnr, min_cosine, min_agreement, evaluate, max_drop, max_loss), amount=amount,
            criterion=criterion, scope=scope, pattern=pattern, only=only or (), skip=skip or (), gradients=gradients,
            storage=storage, optimize=optimize, measure=measure, provider=provider,
            threads=thread_counts(threads) or 1, contrib=contrib, shapes=shapes(shape), batch=batch, budget=budget,
            seed=seed, decisions=decisions, progress=progress,
        )  # fmt: skip
    shown = render(result.report, everything=everything)
    finish(result, shown, output=output, write_decisions=write_decisions, as_json=as_json)
