"""The command `graphopt quantize`."""

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
        help="representative samples, which int8 needs: .npz, folder of .npz, test_data_set folder, or "
        "file.py:function; half of them calibrate, the others judge",
    ),
]
Isa = Annotated[
    Literal["vnni", "avx512", "avx2"],
    typer.Option(help="what the machine that runs the result has: without VNNI, 8-bit products may saturate"),
]


def quantize(
    model: ModelPath,
    output: Output = None,
    data: Samples = None,
    evaluate: Metric = None,
    max_drop: MaxDrop = None,
    min_sqnr: MinSqnr = None,
    min_cosine: MinCosine = None,
    min_agreement: MinAgreement = None,
    max_loss: MaxLoss = None,
    precision: Annotated[
        Literal["int8", "fp16"], typer.Option(help="of arithmetic: int8 where it pays, or fp16 as asked, for GPUs")
    ] = "int8",
    weight_only: Annotated[
        Literal["int8", "int4", "nf4", "codebook"] | None,
        typer.Option(help="store weights in this form, compute in float; needs no samples, int4 uses them"),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            min=0, help="with --weight-only: weights that share a scale; 0: one per channel [default: 32 for int4]"
        ),
    ] = None,
    objective: Annotated[
        Literal["latency", "size"],
        typer.Option(help="fastest, or smallest file (weight-only forms, which may be slower)"),
    ] = "latency",
    isa: Isa = "vnni",
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
    """Quantize what gets faster by it and keeps the accuracy; else return the lossless model, and say why.

    Without --eval and limits, what is asked of an output follows from what it looks like: classes, a mask, rows of
    numbers.
    """
    from graphopt import destinations  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.quantization_report import render  # noqa: PLC0415
    from graphopt.quantizer import quantize as run_quantize  # noqa: PLC0415

    files: dict[str, Path | str | None] = {
        "MODEL": model, "--data": data, "--decisions": decisions, "--output": output,
        "--write-decisions": write_decisions,
    }  # fmt: skip
    destinations.check(files, output, write_decisions)
    load_plugins(plugin)
    bound = bound_of(min_sqnr, min_cosine, min_agreement, evaluate, max_drop, max_loss)
    with working(f"quantizing {model.name}", as_json) as progress:
        result = run_quantize(
            load(model, custom_ops=custom_ops or ()), data=data, bound=bound, precision=precision,
            weight_only=weight_only, block=block, objective=objective, isa=isa, provider=provider,
            threads=thread_counts(threads) or 1, contrib=contrib, shapes=shapes(shape), batch=batch, budget=budget,
            seed=seed, decisions=decisions, progress=progress,
        )  # fmt: skip
    shown = render(result.report, everything=everything)
    finish(result, shown, output=output, write_decisions=write_decisions, as_json=as_json)
