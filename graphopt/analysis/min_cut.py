"""Minimum cuts of small directed graphs, by Dinic's algorithm; large ones are left to SciPy.

SciPy takes 0.2 s to import and 2 ms per call, which is more than most graphs here take in Python.
Source: E. A. Dinic, Soviet Math. Doklady 11 (1970), pp. 1277-1280.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

import numpy as np

SMALL = 4096
"""Edges up to which Python is used."""

NEVER = 1 << 30
"""A capacity that no cut takes."""

Edges = Mapping[tuple[int, int], int]
"""(from, to) -> capacity, at least 0."""


def sink_side(edges: Edges, source: int, sink: int) -> set[int]:
    """Return the nodes that can still reach `sink` when a maximum flow from `source` runs: the smallest such side.

    Every maximum flow leaves the same nodes.
    """
    if len(edges) > SMALL:
        return _by_scipy(edges, source, sink)
    ways = _Ways(edges)
    while True:
        level = ways.levels(sink)
        if source not in level:
            return set(level)
        ways.saturate(source, sink, level)


class Network:
    """Edges under construction, for a graph whose tensors cost something where their two ends are on different sides.

    Args:
        taken: numbers that are nodes already, from 0 on.
    """

    def __init__(self, taken: int) -> None:
        self.edges: dict[tuple[int, int], int] = {}
        self._free = taken

    def add(self, a: int, b: int, capacity: int) -> None:
        """Add capacity to an edge."""
        if a != b and capacity:
            self.edges[a, b] = min(self.edges.get((a, b), 0) + capacity, NEVER)

    def tensor(self, made: int, read: Collection[int], price: int) -> None:
        """Add a tensor: `price` is paid once if any reader is on another side than its maker.

        Where it has several readers, it gets a node of its own for each direction.
        """
        if len(read) == 1:
            (only,) = read
            self.add(made, only, price)
            self.add(only, made, price)
            return
        there, back = self._free, self._free + 1
        self._free += 2
        for reader in read:
            self.add(there, reader, NEVER)
            self.add(reader, back, NEVER)
        self.add(made, there, price)
        self.add(back, made, price)


class _Ways:
    """Residual capacities: `to[i]`, `room[i]` are those of way i, whose reverse is way i ^ 1."""

    def __init__(self, edges: Edges) -> None:
        self.to: list[int] = []
        self.room: list[int] = []
        self.of: dict[int, list[int]] = {}
        for (a, b), capacity in edges.items():
            for end, other, room in ((a, b, capacity), (b, a, 0)):
                self.of.setdefault(end, []).append(len(self.to))
                self.to.append(other)
                self.room.append(room)

    def levels(self, sink: int) -> dict[int, int]:
        """Return how many ways each node that can reach the sink is away from it."""
        found = {sink: 0}
        waiting = deque([sink])
        while waiting:
            node = waiting.popleft()
            for way in self.of.get(node, ()):
                before = self.to[way]
                if self.room[way ^ 1] > 0 and before not in found:
                    found[before] = found[node] + 1
                    waiting.append(before)
        return found

    def saturate(self, source: int, sink: int, level: Mapping[int, int]) -> None:
        """Send flow along shortest paths until each of them has a full way."""
        left = {node: list(ways) for node, ways in self.of.items()}
        path: list[int] = []
        node = source
        while True:
            if node == sink:
                least = min(self.room[way] for way in path)
                for way in path:
                    self.room[way] -= least
                    self.room[way ^ 1] += least
                path, node = [], source
            ways = left[node]
            while ways and not (self.room[ways[-1]] > 0 and level.get(self.to[ways[-1]], -1) == level[node] - 1):
                ways.pop()
            if ways:
                path.append(ways[-1])
                node = self.to[ways[-1]]
            elif path:
                node = self.to[path.pop() ^ 1]
                left[node].pop()
            else:
                return


def _by_scipy(edges: Edges, source: int, sink: int) -> set[int]:
    from scipy.sparse import coo_array  # noqa: PLC0415  (0.2 s, for those who need it)
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow  # noqa: PLC0415  (as above)

    both = {**dict.fromkeys(((b, a) for a, b in edges), 0), **edges}
    pairs = np.array(list(both), np.int32)
    count = int(max(pairs.max(), source, sink)) + 1
    graph = coo_array((np.array(list(both.values()), np.int32), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    residual = (graph.tocsr() - maximum_flow(graph.tocsr(), source, sink).flow).tocsr()
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    return set(breadth_first_order(residual.T.tocsr(), sink, return_predecessors=False).tolist())
