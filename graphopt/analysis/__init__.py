"""Read-only views of a graph, computed when asked for."""
