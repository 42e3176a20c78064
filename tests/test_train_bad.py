"""Training with bad input: one clear error, the right exit code, and nothing written."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.models import digits

pytest.importorskip("torch")

Array = np.ndarray[Any, Any]
Cli = Callable[..., Any]

DIGITS = str(digits.demo_model())


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Path]:
    """Samples of the digits, good ones and bad ones, by what they are."""
    with np.load(digits.demo_calibration()) as archive:
        images, labels = archive["image"][:40], archive["label"][:40]
    made: dict[str, dict[str, Array]] = {
        "good": {"image": images, "label": labels},
        "unlabelled": {"image": images},
        "empty": {"image": images[:0], "label": labels[:0]},
        "too-few-labels": {"image": images, "label": labels[:30]},
        "wrong-shape": {"image": images, "label": np.zeros((40, 3), np.float32)},
        "out-of-range": {"image": images, "label": labels + 5},
        "negative": {"image": images, "label": labels - 3},
        "nan": {
            "image": np.where(labels.reshape(-1, 1, 1, 1) == 3, np.nan, images).astype(np.float32),
            "label": labels,
        },
        "other-input": {"picture": images, "label": labels},
        "other-size": {"image": images[:, :, :5], "label": labels},
    }
    for name, arrays in made.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]  # stub of savez
    return {name: tmp_path / f"{name}.npz" for name in made}


def model(text: str, path: Path) -> Path:
    """Write a model given as text."""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def refused(cli: Cli, folder: Path, *args: str | Path, code: int = 2) -> str:
    """Run a command that must fail, and write nothing; return what it says."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ran = cli(*args)
    assert ran.code == code, ran.err
    assert ran.err.startswith("error: "), ran.err
    assert "Traceback" not in ran.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return str(ran.err)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("unlabelled", "label"),
        ("empty", "empty"),
        ("too-few-labels", "different numbers"),
        ("wrong-shape", "shape"),
        ("out-of-range", "14|range|classes"),
        ("negative", "-3|range|classes"),
        ("nan", "finite|NaN"),
        ("other-input", "image"),
        ("other-size", "shape|5"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    data: str, said: str, given: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:

    out = tmp_path / "out.onnx"
    text = refused(cli, tmp_path, "finetune", DIGITS, "--train", given[data], "--epochs", "1", "-o", out)
    assert re.search(said, text), text
    assert "hint:" in text or "at:" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "what to train on"),
        (["--train", "GOOD", "--data", "GOOD"], "what to train on"),
        (["--data", "GOOD"], "need a teacher"),
        (["--train", "GOOD", "--temperature", "3"], "learning from a teacher"),
        (["--train", "GOOD", "--qat"], "not quantized"),
        (["--train", "GOOD", "--resume"], "no checkpoint"),
        (["--train", "GOOD", "--held-out", "1"], "held out"),
        (["--train", "GOOD", "--optimizer", "adma"], "did you mean 'adam'"),
        (["--train", "GOOD", "--rate", "nan"], "rate is at least 0"),
        (["--train", "GOOD", "--only", "nothing.*"], "nothing"),
        (["--train", "GOOD", "--freeze", "*"], "freeze|nothing|no tensor"),
        (["--train", "nowhere.npz"], "nowhere.npz"),
        (["--train", "GOOD", "--loss", "nowhere.py:loss"], "nowhere.py"),
        (["--train", "GOOD", "--augment", "fly=3"], "fly"),
        (["--train", "GOOD", "--loss", "ctc"], "ctc|shape|steps"),
        (["--train", "GOOD", "--history", "no-such-folder/h.json"], "no-such-folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    args: list[str], said: str, given: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:

    filled = [str(given["good"]) if arg == "GOOD" else arg for arg in args]
    text = refused(cli, tmp_path, "finetune", DIGITS, *filled, "--epochs", "1", "-o", tmp_path / "out.onnx")
    assert re.search(said, text), text


def test_a_rate_that_blows_up_keeps_the_best(given: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    """The loss is no number soon: what was best before is what comes out, and the report says so."""
    out = tmp_path / "out.onnx"
    ran = cli(
        "finetune", DIGITS, "--train", given["good"], "--rate", "1e18", "--optimizer", "sgd", "--warmup", "0",
        "--batch", "8", "--schedule", "constant", "--epochs", "5", "--no-measure", "--json", "-o", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["history"]["failed"]
    assert "rate" in ran.json["reason"] or "loss" in ran.json["reason"]
    weights = onnx.load(out).graph.initializer
    assert all(np.isfinite(onnx.numpy_helper.to_array(w)).all() for w in weights if w.data_type == 1)


def test_a_graph_without_weights_is_refused(cli: Cli, tmp_path: Path) -> None:
    bare = model(
        '<ir_version: 8, opset_import: ["": 17]> net (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }',
        tmp_path / "bare.onnx",
    )
    np.savez(tmp_path / "x.npz", x=np.ones((8, 4), np.float32), label=np.ones((8, 4), np.float32))
    text = refused(cli, tmp_path, "finetune", bare, "--train", tmp_path / "x.npz", "-o", tmp_path / "out.onnx")
    assert "no tensor that could be trained" in text


def test_an_operator_that_cannot_be_trained_is_named(cli: Cli, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "my.domain": 1]>
        net (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}>
        { a = Mul(x, w)  y = my.domain.Fancy(a) }"""
    strange = model(text, tmp_path / "strange.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((8, 4), np.float32), label=np.ones((8, 4), np.float32))
    text = refused(cli, tmp_path, "finetune", strange, "--train", tmp_path / "x.npz", "-o", tmp_path / "out.onnx")
    assert "Fancy" in text
    assert "hint:" in text


def test_a_teacher_of_another_task_is_refused(given: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    other = model(
        '<ir_version: 8, opset_import: ["": 17]> net (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }',
        tmp_path / "other.onnx",
    )
    text = refused(
        cli, tmp_path, "distill", DIGITS, "--teacher", other, "--data", given["good"], "-o", tmp_path / "out.onnx"
    )
    assert "'x'" in text


def test_a_bound_that_is_missed_writes_nothing(given: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    """The metric that chooses takes the last weights, which are worse than the teacher's."""
    student = tmp_path / "student.onnx"
    student.write_bytes(digits.demo_model().read_bytes())
    (tmp_path / "later.py").write_text("calls = []\ndef better(predict):\n    calls.append(1)\n    return len(calls)\n")
    asked = ("distill", student, "--teacher", DIGITS, "--data", given["good"], "--min-sqnr", "200", "--held-out", "0.5")
    text = refused(cli, tmp_path, *asked, "--select", "nowhere.py:worse", "-o", tmp_path / "out.onnx")
    assert "nowhere.py" in text
    text = refused(
        cli, tmp_path, *asked, "--rate", "0.05", "--epochs", "1", "--select", f"{tmp_path / 'later.py'}:better",
        "--no-measure", "-o", tmp_path / "out.onnx", code=1,
    )  # fmt: skip
    assert "misses the bound" in text


def test_without_torch_it_says_what_to_install(given: dict[str, Path], tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from graphopt.cli import main; main()"
    out = tmp_path / "out.onnx"
    ran = subprocess.run(
        [sys.executable, "-c", program, "finetune", DIGITS, "--train", str(given["good"]), "-o", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "pip install 'graphopt[train]'" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not out.exists()


NAN = "def nan(outputs, labels):\n    return outputs['logits'].sum() * float('nan')\n"
CUT = "def cut(feeds, rng):\n    return {name: value[..., :5] for name, value in feeds.items()}\n"


@pytest.mark.parametrize(
    ("option", "function", "text", "said"),
    [("--loss", "nan", NAN, "training failed: the loss of update 1 is nan"), ("--augment", "cut", CUT, "mine.py")],
)
def test_functions_that_give_nothing_usable_are_refused(
    option: str, function: str, text: str, said: str, given: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(text)
    found = refused(
        cli, tmp_path, "finetune", DIGITS, "--train", given["good"], option, f"{tmp_path / 'mine.py'}:{function}", "-o",
        tmp_path / "out.onnx",
    )  # fmt: skip
    assert said in found


def test_a_plot_of_no_known_kind_is_refused_at_once(given: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    text = refused(
        cli, tmp_path, "finetune", DIGITS, "--train", given["good"], "--plot", tmp_path / "plot.txt", "-o",
        tmp_path / "out.onnx",
    )  # fmt: skip
    assert ".png" in text
