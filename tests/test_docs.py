"""README and docs: every command runs, prints what the page shows (numbers aside), and every link leads somewhere.

A fenced block marked `console` holds commands (`$ …`) and what they print; one marked `python` that follows a
comment `<!-- file: NAME -->` is written to NAME first, other python blocks are run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = ("pip ", "git ", "pytest", "python -m graphopt.models.benchmarks", "python -m venv", "cd ")
"""Commands that CI runs as its own steps, or that take long."""

BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?\s?(?:kB|MB|GB|B|ms|%)?")

DOUBLE = """
    <ir_version: 8, opset_import: ["": 17]>
    double (float[N, 4] x) => (float[N, 4] y) { once = Relu(x)  y = Relu(once) }
"""


def commands(body: str) -> list[tuple[str, str]]:
    """Return (command, expected output) pairs of a console block."""
    found: list[tuple[str, str]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif found and found[-1][0].endswith("\\"):
            found[-1] = (found[-1][0][:-1].rstrip() + " " + line.strip(), "")
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def masked(text: str) -> list[str]:
    """Return the text's lines, numbers as N and runs of spaces as one."""
    lines = (re.sub(r"\s+", " ", NUMBER.sub("N", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with the models that the pages name."""
    onnx.save(onnx.parser.parse_model(DOUBLE), tmp_path / "double.onnx")
    return tmp_path


def fetched(command: str, desk: Path) -> None:
    """Put `det.onnx` from the zoo beside the others when a command names it."""
    if "det.onnx" in command and not (desk / "det.onnx").exists():
        from graphopt.models import zoo

        shutil.copy(zoo.fetch("ppocr-det"), desk / "det.onnx")


@pytest.mark.zoo
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run_and_print_what_the_page_shows(page: Path, desk: Path) -> None:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for block in BLOCK.finditer(page.read_text()):
        if block["file"]:
            (desk / block["file"]).write_text(block["body"])
        elif block["kind"] == "python":
            fetched(block["body"], desk)
            (desk / "block.py").write_text(block["body"])
            ran = subprocess.run(
                [sys.executable, "block.py"], cwd=desk, env=environment, capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, f"{page.name}: {block['body']}\n{ran.stderr}"
        elif block["kind"] == "console":
            for command, expected in commands(block["body"]):
                if command.startswith(ELSEWHERE):
                    continue
                fetched(command, desk)
                ran = subprocess.run(
                    command, shell=True, cwd=desk, env=environment, capture_output=True, text=True, check=False
                )
                printed = ran.stdout + ran.stderr
                assert ran.returncode in (0, 1), f"$ {command}\n{printed}"
                missing = [line for line in masked(expected) if line not in masked(printed)]
                assert not missing, f"{page.name}: $ {command}\nthe page shows {missing}\nit prints:\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
