"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="an .onnx file")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="where the result is written (may be MODEL itself)")
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SAMPLES", help=".npz, folder of .npz, test_data_set folder, or file.py:function; default: random feeds"
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="rows of an .npz sample array in one feed")]
Shape = Annotated[
    list[str] | None, typer.Option(metavar="NAME=1,3,224,224", help="shape of an input, for random feeds")
]
Seed = Annotated[int, typer.Option(help="for everything random")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Threads = Annotated[int, typer.Option(min=1, help="ONNX Runtime's intra-op threads")]
Provider = Annotated[str, typer.Option(help="cpu, cuda, openvino, …")]
VerifyOption = Annotated[
    Literal["each", "end", "off"], typer.Option(help="numeric check after each pass, at the end, or never")
]
FailureOption = Annotated[Literal["continue", "stop"], typer.Option(help="leave a failing pass out and go on, or stop")]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", metavar="FILE_OR_FOLDER", help="Python files with passes of your own")
]
PrintAfter = Annotated[
    list[str] | None, typer.Option(metavar="PASS|all", help="print what a pass changed, as a text diff (stderr)")
]
StopAfter = Annotated[str | None, typer.Option(metavar="PASS", help="end the pipeline after this pass")]
Reproducers = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="where reproducers of failing passes are written [default: OUT.reproducers]"),
]
CustomOps = Annotated[
    list[Path] | None,
    typer.Option(metavar="LIBRARY", help="library of custom operators that ONNX Runtime may load"),
]
Measure = Annotated[
    bool, typer.Option("--measure/--no-measure", help="time the result; keep the input where it is not faster")
]
