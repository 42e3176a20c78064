"""Shared fixtures: hypothesis without deadlines and with fixed seeds, the command line in-process."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "graphopt",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("graphopt")
