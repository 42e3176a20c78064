"""Models to measure on: a manifest and fetcher of public ones, a small one of our own, and labelled tasks.

The folder installs as ``graphopt.models``; nothing in ``graphopt`` itself imports it but the commands
``zoo`` and ``demo``.
"""

if __name__ != "graphopt.models":
    raise ImportError(
        f"this folder is the package 'graphopt.models', not '{__name__}': "
        "install the project (pip install -e .) and import graphopt.models"
    )

from .digits import demo_calibration, demo_data, demo_model
from .zoo import Entry, feeds, fetch, get, names

__all__ = ["Entry", "demo_calibration", "demo_data", "demo_model", "feeds", "fetch", "get", "names"]
