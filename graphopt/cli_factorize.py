"""The command `graphopt factorize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from graphopt.arguments import load_plugins, shapes, thread_counts
from graphopt.console import emit, working
from graphopt.errors import SpecError
from graphopt.options import (
    AsJson,
    Batch,
    Contrib,
    CustomOps,
    DecisionsFile,
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

Samples = Annotated[
    str | None,
    typer.Option(
        metavar="SAMPLES",
        help="representative samples: .npz, folder of .npz, test_data_set folder, or file.py:function; half of them "
        "choose, the others judge",
    ),
]
Names = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="layers by name; may be repeated")]


def factorize(
    model: ModelPath,
    output: Output = None,
    data: Samples = None,
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
    only: Names = None,
    skip: Names = None,
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
    from graphopt.decisions import save_decisions  # noqa: PLC0415
    from graphopt.factorization_report import render  # noqa: PLC0415
    from graphopt.factorizer import factorize as run_factorize  # noqa: PLC0415
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.quality import Bound  # noqa: PLC0415

    files: dict[str, Path | str | None] = {
        "MODEL": model, "--data": data, "--decisions": decisions, "--output": output,
        "--write-decisions": write_decisions,
    }  # fmt: skip
    destinations.check(files, output, write_decisions)
    load_plugins(plugin)
    if max_drop is not None and evaluate is None:
        raise SpecError("--max-drop needs a metric", hint="--eval FILE.py:FUNCTION")
    with working(f"factorizing {model.name}", as_json) as progress:
        result = run_factorize(
            load(model, custom_ops=custom_ops or ()), data=data, max_error=max_error,
            bound=Bound(min_sqnr, min_cosine, min_agreement, evaluate, max_drop, max_loss), rank=rank, energy=energy,
            target_latency=target_latency, embeddings=embeddings, only=tuple(only or ()), skip=tuple(skip or ()),
            measure=measure, provider=provider, threads=thread_counts(threads) or 1, contrib=contrib,
            shapes=shapes(shape), batch=batch, budget=budget, seed=seed, decisions=decisions, progress=progress,
        )  # fmt: skip
    if output is not None:
        result.save(output)
    if write_decisions is not None:
        save_decisions(write_decisions, result.report.decisions or {})
    document = {**result.report.to_dict(), "output": str(output) if output else None}
    written = [f"wrote {output}" if output else "nothing written: give -o OUT"]
    written += [f"wrote {write_decisions}"] if write_decisions else []
    emit(document, as_json, render(result.report, everything=everything), *map(Text, written))
