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
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=1,3,224,224",
        help="shape of an input, for random feeds; a NAME given again begins another set, and all sets are timed",
    ),
]
ThreadCounts = Annotated[
    list[str] | None,
    typer.Option("--threads", metavar="N[,N…]", help="intra-op threads to time with [default: 1, and all cores]"),
]
Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        help="time what optional passes bring, leave out what does not pay, and keep the input where the result is "
        "slower [default: measure; not with --elsewhere, --stage canonical, --decisions]",
        show_default=False,
    ),
]
Budget = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="time that measuring may take, about")]
StageOption = Annotated[
    Literal["canonical", "lowering"],
    typer.Option(help="where to stop: canonical keeps to one spelling, for later work; lowering suits the target"),
]
Contrib = Annotated[bool, typer.Option("--contrib", help="allow operators of ONNX Runtime's own domains")]
Elsewhere = Annotated[
    bool, typer.Option("--elsewhere", help="the result will run on another machine: time nothing, use static defaults")
]
DecisionsFile = Annotated[
    Path | None, typer.Option("--decisions", metavar="FILE", help="do what an earlier run decided, without measuring")
]
WriteDecisions = Annotated[
    Path | None, typer.Option("--write-decisions", metavar="FILE", help="write what was decided, for --decisions")
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--eval", metavar="FILE.py:FUNCTION",
        help="the task's metric, to be kept: gets predict(feeds) -> outputs, returns a number or one per item; higher "
        "is better",
    ),
]  # fmt: skip
MaxDrop = Annotated[
    str | None, typer.Option(metavar="X|X%", help="largest drop of the metric [default: 1%]", show_default=False)
]
MinSqnr = Annotated[
    float | None,
    typer.Option(metavar="DB", help="least signal to noise of every float output; 20: noise of a tenth of the signal"),
]
MinCosine = Annotated[
    float | None, typer.Option(metavar="X", help="least mean cosine of an output's rows with the float model's")
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="least part of rows whose largest score stays the largest; of masks: overlap above 0.5"
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="largest mean loss of probability where another class wins; 0.003 is 0.3 points of accuracy"
    ),
]
Seconds = Annotated[
    float,
    typer.Option(
        "--budget", min=1, metavar="SECONDS", help="time for timing, about; calibrating and judging come on top"
    ),
]
TimedThreads = Annotated[
    list[str] | None,
    typer.Option(metavar="N[,N…]", help="intra-op threads to time with, all of them [default: 1]", show_default=False),
]
Halves = Annotated[
    str | None,
    typer.Option(
        metavar="SAMPLES",
        help="representative samples: .npz, folder of .npz, test_data_set folder, or file.py:function; half of them "
        "choose and fit, the others judge",
    ),
]
Globs = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="names as in the table of the report; may be repeated")
]
