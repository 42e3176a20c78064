"""Predicted latency of channel counts: tables that add up, blocks that save nothing, corrections that are met; and one
pass through ORT's profiles, of which only the places are checked: times are for benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from graphopt.analysis.channels import Group, Site
from graphopt.channel_choice import allocate
from graphopt.channel_costs import MacsModel, Width
from graphopt.channel_losses import Curve
from graphopt.channel_times import Cell, ChannelTimes, Timed, _cell, _from_totals, _scaled, layouts, measure
from graphopt.errors import DataError
from graphopt.model import Model, load

SIZES = {"a": 64, "b": 24}

NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[1,16,8,8] x) => (float[1,5] y) {
  [first] c = Conv <pads=[1,1,1,1]> (x, w1, b1)
  r = Relu (c)
  [second] d = Conv <pads=[1,1,1,1]> (r, w2, b2)
  s = Sigmoid (d)
  g = GlobalAveragePool (s)
  f = Flatten (g)
  [last] y = Gemm (f, w3, b3)
}
"""


def network(counts: Mapping[str, int]) -> Model:
    first, second = counts.get("first", 64), counts.get("second", 32)
    rng = np.random.default_rng(0)
    shapes = {"w1": (first, 16, 3, 3), "b1": (first,), "w2": (second, first, 3, 3), "b2": (second,), "w3": (second, 5)}
    proto = onnx.parser.parse_model(NETWORK)
    for name, shape in {**shapes, "b3": (5,)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return load(proto)


def groups_of(model: Model) -> list[Group]:
    nodes = {n.name or n.op: n for n in model.graph.nodes}

    def group(maker: str, reader: str, axis: int, carried: tuple[str, ...]) -> Group:
        size = int(nodes[maker].inputs[1].shape[0])
        units = np.arange(size)
        sites = [
            Site(nodes[maker].inputs[1], 0, units, "makes", nodes[maker], 1),
            Site(nodes[maker].inputs[2], 0, units, "holds", nodes[maker], 2),
            *(Site(nodes[name].outputs[0], 1, units, "carries", nodes[name], 0) for name in carried),
            Site(nodes[reader].inputs[1], axis, units, "reads", nodes[reader], 1),
        ]
        return Group(maker, size, tuple(sites))

    one = group("first", "second", 1, ("first", "Relu"))
    return [one, group("second", "last", 0, ("second", "Sigmoid", "GlobalAveragePool"))]


def times(*, gain: float = 1.0) -> ChannelTimes:
    """A layer from a to b in blocks, something on a that is not, and what is fixed."""
    a, b = Width(0.0, (("a", 1.0),)), Width(0.0, (("b", 1.0),))
    cells = (
        Cell("layer", (a, b), True, (1e-6, 0.0, 1e-8, 1e-7)),
        Cell("tensor", (a,), False, (2e-6, 3e-8)),
        Cell("", (), False, (5e-6,)),
    )
    return ChannelTimes(SIZES, {"a": 16, "b": 16}, cells, scale=1.1, gain=gain)


def test_a_prediction_is_the_sum_of_its_cells() -> None:
    found = times()
    whole = 1e-6 + 1e-8 * 32 + 1e-7 * 64 * 32 + 2e-6 + 3e-8 * 64 + 5e-6
    assert found.at({}) == pytest.approx(1.1 * whole)
    cut = 1e-6 + 1e-8 * 16 + 1e-7 * 48 * 16 + 2e-6 + 3e-8 * 40 + 5e-6
    assert found.predict({"a": 40, "b": 16}) == pytest.approx(1.1 * cut)
    assert found.ratio({"a": 40, "b": 16}) == pytest.approx(cut / whole)


@pytest.mark.parametrize("gain", [1.0, 0.7])
def test_tables_add_up_to_the_prediction(gain: float) -> None:
    found = times(gain=gain)
    options = {"a": [64, 40, 16, 4], "b": [24, 16, 8]}
    tables = found.tables(options)
    for a, b in itertools.product(*options.values()):
        counts = {"a": a, "b": b}
        total = sum(table[tuple(counts[g] for g in groups)] for groups, table in tables.items())
        assert total == pytest.approx(found.at(counts))


def test_a_cut_within_a_block_saves_nothing_and_is_not_chosen() -> None:
    """b at 24 runs as 32: leaving 20 of it costs as much, and 16 is a block less."""
    blocked = ChannelTimes(SIZES, {"b": 16}, (Cell("layer", (Width(0.0, (("b", 1.0),)),), True, (0.0, 1e-6)),))
    assert blocked.at({"b": 20}) == blocked.at({})
    assert blocked.at({"b": 16}) == pytest.approx(blocked.at({}) / 2)
    groups = [group for group in groups_of(network({})) if group.name == "second"]
    group = Group("b", 24, groups[0].sites)
    curve = Curve(np.arange(24), np.linspace(0, 1, 25))
    found = allocate([group], {"b": curve}, blocked, 0.9 * blocked.at({}), round_to=4)
    assert found.counts == {"b": 16}


def test_a_correction_is_met_and_others_follow_it() -> None:
    found = times()
    counts, other = {"a": 32, "b": 16}, {"a": 48, "b": 16}
    measured = 1.0 - 0.6 * (1.0 - found.ratio(counts))
    corrected = found.corrected(counts, measured)
    assert corrected.ratio(counts) == pytest.approx(measured)
    assert corrected.at({}) == pytest.approx(found.at({}))
    assert found.ratio(other) < corrected.ratio(other) < 1.0


def test_a_correction_by_what_was_not_cut_changes_nothing() -> None:
    found = times()
    assert found.corrected({}, 1.02) is found


def test_layers_are_explained_the_slowest_first() -> None:
    rows = times().explain({"a": 32})
    assert [row.name for row in rows] == ["layer", "", "tensor"]
    assert rows[0].cut_us < rows[0].whole_us
    assert rows[1].cut_us == rows[1].whole_us


def test_coefficients_are_found_again() -> None:
    """Exact times of a sum of the terms: the fit returns it, but for the weak prior."""
    a, b = Width(0.0, (("a", 1.0),)), Width(0.0, (("b", 1.0),))
    sizes = {"a": 64, "b": 64}
    options = {name: [64, 48, 32, 16] for name in sizes}
    chosen = layouts(options, seed=3)
    seconds = np.array([2e-5 + 1e-6 * c["b"] + 1e-7 * c["a"] * c["b"] for c in chosen])
    cell = _cell("layer", (a, b), seconds, True, chosen, sizes, {"a": 16, "b": 16})
    found = ChannelTimes(sizes, {}, (cell,))
    for counts, value in zip(chosen, seconds, strict=True):
        assert found.at(counts) == pytest.approx(value, rel=0.03)
    assert all(each >= 0.0 for each in cell.seconds)


def test_whole_runs_scale_what_profiles_say() -> None:
    found = times()
    chosen = [{"a": 64, "b": 24}, {"a": 32, "b": 16}, {"a": 48, "b": 8}]
    totals = [0.9 * found.at({}) - 0.8 * (found.at({}) - found.at(c)) for c in chosen]
    measured = tuple(Timed(c, t) for c, t in zip(chosen, totals, strict=True))
    scaled = _scaled(ChannelTimes(SIZES, found.blocks, found.cells, measured=measured))
    for timed in measured:
        assert scaled.ratio(timed.counts) == pytest.approx(timed.seconds / totals[0], abs=0.02)


def test_layouts_are_drawn_independently_whole_first() -> None:
    options = {f"g{i}": [64, 48, 32, 16] for i in range(8)}
    found = layouts(options, seed=1)
    assert found[0] == dict.fromkeys(options, 64)
    assert len(found) == len({tuple(c.items()) for c in found}) > 5
    assert all(count >= 0.4 * 64 for counts in found for count in counts.values())
    assert any(counts["g0"] != counts["g1"] for counts in found)
    assert found == layouts(options, seed=1) != layouts(options, seed=2)


def test_without_a_profile_time_goes_with_macs() -> None:
    model = network({})
    macs = MacsModel.of(model, groups_of(model))
    chosen = [{"first": 64, "second": 32}, {"first": 32, "second": 16}, {"first": 64, "second": 16}]
    measured = tuple(Timed(c, 1e-4 + 1e-10 * macs.macs(c)) for c in chosen)
    found = _from_totals(macs, measured)
    assert found.source == "totals"
    for timed in measured:
        assert found.at(timed.counts) == pytest.approx(timed.seconds)


def test_kernels_are_put_down_to_their_layers() -> None:
    model = network({})
    groups = groups_of(model)
    feeds = [{"x": np.zeros((1, 16, 8, 8), np.float32)}]
    found = measure(model, groups, network, MacsModel.of(model, groups), feeds, budget=0.5)
    assert found.source == "kernels"
    assert found.measured[0].counts == {"first": 64, "second": 32}
    cells = {cell.name: cell for cell in found.cells}
    assert {"first", "second"} <= set(cells)
    assert [len(cells[name].widths) for name in ("first", "second")] == [1, 2]
    assert cells["second"].blocked
    assert found.at({"first": 16, "second": 16}) <= found.at({})


def test_no_feeds() -> None:
    model = network({})
    groups = groups_of(model)
    with pytest.raises(DataError, match="no samples to time on"):
        measure(model, groups, network, MacsModel.of(model, groups), [])
