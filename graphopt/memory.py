"""A model -> the peak memory of a process that loads it and runs it once.

Measured in a process of its own, since a process never gives back all it once had.  The peak is that of the
resident set after the imports: Linux's `VmHWM` (`ru_maxrss` starts at the parent's peak there, and says nothing),
elsewhere `ru_maxrss`.  File pages that a runtime maps count, as far as they were touched.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import InternalError
from graphopt.runtime import Feeds, Session

_CHILD = "import sys; sys.path[:0] = {path!r}; from graphopt.memory import _child; _child(sys.argv[1])"


def peak_memory(
    path: Path, feeds: Feeds, *, threads: int = 1, provider: str = "cpu", custom_ops: Sequence[Path] = ()
) -> int | None:
    """Return the bytes that loading the model at `path` and one run need at their peak, above the imports.

    None where the system does not tell (Windows).

    Raises:
        InternalError: the process died.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        job = Path(folder) / "job"
        request = {
            "path": path,
            "feeds": dict(feeds),
            "threads": threads,
            "provider": provider,
            "custom_ops": list(custom_ops),
        }
        job.write_bytes(pickle.dumps(request))
        command = [sys.executable, "-c", _CHILD.format(path=sys.path), str(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (our own child)
    if done.returncode != 0:
        raise InternalError(f"the process that measures memory died ({done.returncode}): {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _child(job: str) -> None:
    """Load, run once, print the growth of the peak (a JSON number or null)."""
    request: dict[str, Any] = pickle.loads(Path(job).read_bytes())  # noqa: S301  (written by our parent)
    feeds = request.pop("feeds")
    before = resident_bytes()
    Session(request.pop("path"), **request).run(feeds)
    after = peak_resident_bytes()
    growth = None if before is None or after is None else max(0, after - before)
    sys.stdout.write(json.dumps(growth))


def resident_bytes() -> int | None:
    """Return the present resident set of this process (where only the peak is known: that)."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int | None:
    """Return the largest resident set this process had, None where the system does not tell."""
    found = _status("VmHWM")
    if found is not None:
        return found
    try:
        import resource  # noqa: PLC0415  (not on Windows)
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(key + ":")]
    return int(values[0]) * 1024 if values else None
