"""The command `graphopt quantize`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from graphopt.cli_lossy import Common
from graphopt.console import working
from graphopt.options import ModelPath
from graphopt.setting_options import offers

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


@offers(common=Common)
def quantize(
    *,
    model: ModelPath,
    data: Samples = None,
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
    common: Common,
) -> None:
    """Quantize what gets faster by it and keeps the accuracy; else return the lossless model, and say why.

    Without --eval and limits, what is asked of an output follows from what it looks like: classes, a mask, rows of
    numbers.
    """
    from graphopt.quantization_report import render  # noqa: PLC0415  (heavy imports only when needed)
    from graphopt.quantizer import quantize as run_quantize  # noqa: PLC0415

    source = common.loaded(model, data=data)
    with working(f"quantizing {model.name}", common.as_json) as progress:
        result = run_quantize(
            source, data=data, precision=precision, weight_only=weight_only, block=block, objective=objective, isa=isa,
            progress=progress, **common.arguments(),
        )  # fmt: skip
    common.finish(result, render(result.report, everything=common.everything))
