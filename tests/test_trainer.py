"""`distill` and `finetune` end to end on the committed model: what comes out was trained, chosen and judged in ORT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt.model import Model, load
from graphopt.models import digits
from graphopt.models.digits import task
from graphopt.quality import Bound
from graphopt.runtime import Session
from graphopt.training import DistillSettings, TrainSettings

pytest.importorskip("torch")

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model with a third of its channels gone and nothing fitted."""
    path = tmp_path_factory.mktemp("cut") / "cut.onnx"
    graphopt.prune(digits.demo_model(), ratio=0.33, measure=False).save(path)
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with np.load(digits.demo_calibration()) as archive:
        path = tmp_path_factory.mktemp("samples") / "x.npz"
        np.savez(path, image=archive["image"])
    return path


def accuracy(model: Model | Path) -> float:
    return float(task.accuracy(Session(load(model)).run).mean())


def shell(path: Path) -> bytes:
    """Return a model without the values of its float initializers."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    return bytes(proto.SerializeToString(deterministic=True))


def test_a_cut_model_learns_from_its_teacher(cut: Path, samples: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ran = cli(
        "distill", cut, "--teacher", digits.demo_model(), "--data", samples, "--epochs", "12", "--batch", "16",
        "--evaluations", "0.25", "--no-measure", "--history", tmp_path / "h.json",
        "--plot", tmp_path / "h.png", "--json", "-o", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = ran.json
    teacher, before, after = found["stages"]
    assert [s["name"] for s in found["stages"]] == ["teacher", "before", "after"]
    assert after["loss"] < 0.3 * before["loss"]
    assert after["macs"] == before["macs"] < teacher["macs"]
    assert found["rows"] == {"train": 160, "choose": 20, "judge": 20}
    assert found["output"] == str(out)
    assert shell(out) == shell(cut)  # the graph is the same, and so is all but the weights
    assert accuracy(out) > accuracy(cut) + 0.3
    assert json.loads((tmp_path / "h.json").read_text())["rows"]
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_file(cut: Path, samples: Path, tmp_path: Path) -> None:
    settings = DistillSettings(epochs=1.0, batch=16)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        found = graphopt.distill(
            cut, teacher=digits.demo_model(), data=str(samples), settings=settings, seed=seed, measure=False
        )
        found.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_labels_teach_too(cut: Path) -> None:
    bound = Bound(metric=task.accuracy, defaults=False)
    found = graphopt.finetune(
        cut, train_on=task.train, bound=bound, measure=False,
        settings=TrainSettings(epochs=4.0, evaluations=0.5),
    )  # fmt: skip
    before, after = found.report.stages
    assert before.quality is not None
    assert after.quality is not None
    assert after.quality.evaluation is not None
    assert after.quality.evaluation.candidate > before.quality.evaluation.candidate + 0.3  # type: ignore[union-attr]
    assert after.quality.evaluation.candidate == pytest.approx(accuracy(found.model))


def test_a_student_starts_where_its_teacher_is_and_standardises(cut: Path, samples: Path) -> None:
    settings = DistillSettings(steps=1, rate=1e-9)
    same = graphopt.distill(
        cut, teacher=digits.demo_model(), data=str(samples), settings=settings, measure=False, start_from_teacher=True
    )
    assert "weights were the teacher's at first" in " ".join(same.report.notes)
    plain = graphopt.distill(
        cut, teacher=digits.demo_model(), data=str(samples), settings=settings, measure=False, standardize=True
    )
    assert len(list(plain.model.nodes())) > len(list(load(cut).nodes()))
    with np.load(samples) as archive:
        feeds = {"image": archive["image"][:8]}
    changed, before = (Session(load(m)).run(feeds)["logits"] for m in (plain.model, cut))
    assert np.abs(changed - before).max() > 0.01  # other inputs than its weights knew: to be trained


def test_training_that_helps_nothing_leaves_the_model_as_it_was(samples: Path) -> None:
    """At a rate that destroys, the weights before the first update are the best."""
    found = graphopt.distill(
        digits.demo_model(), teacher=load(digits.demo_model()), data=str(samples), measure=False,
        settings=DistillSettings(epochs=1.0, rate=1.0, warmup=0.0, schedule="constant", optimizer="adam"),
    )  # fmt: skip
    assert found.history.best_step == 0
    assert found.model.proto.SerializeToString(deterministic=True) == load(digits.demo_model()).proto.SerializeToString(
        deterministic=True
    )


def test_it_goes_on_from_a_checkpoint(cut: Path, samples: Path, cli: Cli, tmp_path: Path) -> None:
    """Broken off after a third of the updates and resumed, the file is that of one run."""
    asked = [
        "distill", cut, "--teacher", digits.demo_model(), "--data", samples, "--batch", "16", "--epochs", "3",
        "--no-measure", "--json",
    ]  # fmt: skip
    whole, resumed, folder = tmp_path / "whole.onnx", tmp_path / "resumed.onnx", tmp_path / "state"
    assert cli(*asked, "-o", whole).code == 0
    program = (
        "import graphopt.bridge.loop as loop\n"
        "from graphopt.cli import main\n"
        "import os\n"
        "tell = loop.Loop._tell\n"
        "def stop(self, *given):\n"
        "    tell(self, *given)\n"
        "    if self.step == 11: os._exit(9)\n"
        "loop.Loop._tell = stop\n"
        "main()"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, *map(str, asked), "--checkpoint", str(folder), "-o", str(resumed)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == 9, killed.stderr
    assert not resumed.exists()
    ran = cli(*asked, "--checkpoint", folder, "--resume", "-o", resumed)
    assert ran.code == 0, ran.err
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_two_processes_write_one_model(cut: Path, samples: Path, tmp_path: Path) -> None:
    """torchrun with two processes of batch 8 equals one of batch 16, within float noise; one report is printed."""
    asked = [
        "distill", str(cut), "--teacher", str(digits.demo_model()), "--data", str(samples), "--steps", "6",
        "--no-measure", "--json",
    ]  # fmt: skip
    bins = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    subprocess.run([bins / "graphopt", *asked, "--batch", "16", "-o", one], check=True, env=environment)
    ran = subprocess.run(
        [
            bins / "torchrun", "--nproc-per-node", "2", "--no-python",
            bins / "graphopt", *asked, "--batch", "8", "-o", two,
        ],
        check=False, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["stages"]) == 3
    first, second = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer} for p in (one, two)
    )
    for name, values in first.items():
        np.testing.assert_allclose(second[name], values, rtol=1e-3, atol=1e-5, err_msg=name)


def test_labels_and_a_teacher_teach_together(cut: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "task.py").write_text("from graphopt.models.digits.task import train\n")
    asked = (
        "finetune",
        cut,
        "--train",
        f"{tmp_path / 'task.py'}:train",
        "--teacher",
        digits.demo_model(),
        "--steps",
        "3",
    )
    both = cli(*asked, "--no-measure", "--json").json
    assert {"distill", "task"} <= set(both["history"]["rows"][-1]["terms"])
    assert both["settings"]["alpha"] == 0.5
    alone = cli(*asked, "--alpha", "1", "--no-measure", "--json").json
    assert "task" not in alone["history"]["rows"][-1]["terms"]


def test_few_samples_and_a_teacher_with_other_names_are_said(cut: Path, tmp_path: Path) -> None:
    other = load(digits.demo_model())
    other.graph.outputs[0].name = "scores"
    with np.load(digits.demo_calibration()) as archive:
        found = graphopt.distill(
            cut, teacher=other, data=[{"image": archive["image"][:4]}], settings=DistillSettings(steps=2), measure=False
        )
    said = " ".join(found.report.notes)
    assert "too few to hold any out" in said
    assert "other names" in said
