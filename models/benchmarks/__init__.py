"""Benchmark scripts whose output stands in docs/."""
