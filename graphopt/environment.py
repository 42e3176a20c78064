"""What a measurement was taken on: processor, versions, providers, how busy the machine was."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from graphopt import runtime

FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Processor features that decide which of ORT's kernels run."""

PACKAGES = ("graphopt", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "scipy")


def describe(*, threads: int | None = None, provider: str | None = None) -> dict[str, Any]:
    """Return the environment as plain values; what this system does not tell is None.

    Args:
        threads: ORT's intra-op threads of the measurement, when there was one.
        provider: its provider.
    """
    info = _cpu_info()
    found: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "features": _features(info),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "runtime": runtime.distributions(),
        "providers": runtime.available_providers(),
        "load_average": load_average(),
    }
    if threads is not None:
        found["threads"] = threads
    if provider is not None:
        found["provider"] = provider
    return found


def summary(found: dict[str, Any]) -> str:
    """Return the environment in one line."""
    packages = found.get("packages", {})
    load = found.get("load_average")
    parts = [
        f"{found['cpu']}, {found['usable_cores']} of {found['cores']} cores",
        " ".join(f for f in found["features"] if f.startswith(("avx512_vnni", "avx_vnni", "amx", "i8mm"))),
        f"onnxruntime {packages.get('onnxruntime') or ', '.join(found['runtime'])}",
        f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}" if "threads" in found else "",
        f"provider {found['provider']}" if "provider" in found else "",
        f"load {load[0]:.2f}" if load else "",
    ]
    return ", ".join(part for part in parts if part)


def load_average() -> list[float] | None:
    """Return the load averages of the last 1, 5 and 15 minutes, None where the system keeps none."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def usable_cores() -> int | None:
    """Return how many cores this process may use, a container's quota counted."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


@functools.cache  # the system looks at every core to write it: milliseconds
def _cpu_info() -> dict[str, str]:
    """Return the first processor of /proc/cpuinfo, empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _features(info: dict[str, str]) -> list[str]:
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name in FEATURES if name in flags]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


@functools.cache  # looked up in the files of the installation, which takes a millisecond each
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
