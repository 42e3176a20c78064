"""Criteria against what they are defined as: on a small network whose sites are known, by plain NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from graphopt.analysis.channels import Group, Site
from graphopt.base import Context
from graphopt.data import load_samples
from graphopt.errors import DataError, SpecError
from graphopt.importance import COMBINES, CRITERIA, needs_data, scores
from graphopt.model import Model, load
from graphopt.observation import Observer
from graphopt.runtime import evaluate

UNITS = 8

NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,8,8] x) => (float[N,4,8,8] y) {
  [first] a = Conv <pads=[1,1,1,1]> (x, w1, b1)
  [norm] n = BatchNormalization (a, gamma, beta, mean, var)
  r = Relu (n)
  [second] y = Conv <pads=[1,1,1,1]> (r, w2, b2)
}
"""


def network(seed: int = 0, *, norm: bool = True) -> Model:
    rng = np.random.default_rng(seed)
    text = (
        NETWORK if norm else NETWORK.replace("[norm] n = BatchNormalization (a, gamma, beta, mean, var)", "n = Abs (a)")
    )
    proto = onnx.parser.parse_model(text)
    values = {
        "w1": rng.normal(size=(UNITS, 3, 3, 3)), "b1": rng.normal(size=UNITS), "w2": rng.normal(size=(4, UNITS, 3, 3)),
        "b2": rng.normal(size=4),
    }  # fmt: skip
    if norm:
        values |= {"gamma": rng.normal(size=UNITS), "beta": np.ones(UNITS), "mean": np.zeros(UNITS)}
        values["var"] = np.ones(UNITS)
    proto.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items())
    return load(proto)


def group_of(model: Model) -> Group:
    """The group of the channels between both convolutions."""
    nodes = {n.name: n for n in model.graph.nodes}
    units = np.arange(UNITS)
    sites = [
        Site(nodes["first"].inputs[1], 0, units, "makes", nodes["first"], 1),
        Site(nodes["first"].inputs[2], 0, units, "holds", nodes["first"], 2),
        Site(nodes["first"].outputs[0], 1, units, "carries", nodes["first"], 0),
        Site(nodes["second"].inputs[1], 1, units, "reads", nodes["second"], 1),
    ]
    if "norm" in nodes:
        sites[3:3] = [Site(nodes["norm"].inputs[port], 0, units, "holds", nodes["norm"], port) for port in (1, 2, 3, 4)]
    return Group("first", UNITS, tuple(sites))


def feeds() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    for _ in range(3):
        yield {"x": rng.normal(size=(4, 3, 8, 8)).astype(np.float32)}


def context(model: Model, *, data: bool = True) -> Context:
    found = Context(model, evaluate)
    if data:
        found.samples = load_samples(feeds, model)
        found.observer = Observer(model, found.samples)
    return found


def values(model: Model, name: str) -> np.ndarray:
    return next(np.asarray(c.values, np.float64) for c in model.constants() if c.name == name)


def activations(model: Model) -> np.ndarray:
    """What flows into the second convolution on all samples: (rows, units)."""
    found = [evaluate(model, feed, ["r"])["r"] for feed in feeds()]
    return np.moveaxis(np.concatenate(found), 1, -1).reshape(-1, UNITS).astype(np.float64)


def test_norms_of_the_filters() -> None:
    model = network()
    w1 = values(model, "w1").reshape(UNITS, -1)
    one = scores([group_of(model)], "l1", context(model), normalise="none")["first"]
    two = scores([group_of(model)], "l2", context(model), normalise="none")["first"]
    np.testing.assert_allclose(one, np.abs(w1).sum(axis=1))
    np.testing.assert_allclose(two, np.linalg.norm(w1, axis=1))


def test_random_is_seeded_and_of_the_group_alone() -> None:
    model = network()
    group = group_of(model)
    other = Group("other", UNITS, group.sites)
    alone = scores([group], "random", context(model), seed=1)["first"]
    beside = scores([other, group], "random", context(model), seed=1)
    np.testing.assert_array_equal(alone, beside["first"])
    assert not np.array_equal(beside["other"], beside["first"])
    assert not np.array_equal(alone, scores([group], "random", context(model), seed=2)["first"])


def test_scale_of_the_normalisation() -> None:
    model = network()
    found = scores([group_of(model)], "bn-scale", context(model), normalise="none")["first"]
    np.testing.assert_allclose(found, np.abs(values(model, "gamma")))


def test_no_normalisation_left() -> None:
    model = network(norm=False)
    with pytest.raises(SpecError, match="no channel group has a normalisation left"):
        scores([group_of(model)], "bn-scale", context(model))


def test_one_group_without_normalisation_is_noted() -> None:
    model, bare = network(), network(norm=False)
    plain = Group("bare", UNITS, group_of(bare).sites)
    asked = context(model)
    found = scores([group_of(model), plain], "bn-scale", asked)
    assert set(found) == {"first", "bare"}
    assert any("bare: no normalisation" in note for note in asked.notes)


def test_activation_and_wanda() -> None:
    model = network()
    x = activations(model)
    w2 = np.moveaxis(values(model, "w2"), 1, 0).reshape(UNITS, 4, 9)
    met = scores([group_of(model)], "activation", context(model), normalise="none")["first"]
    wanda = scores([group_of(model)], "wanda", context(model), normalise="none")["first"]
    # float32 activations, summed in float64: far below 1e-5
    np.testing.assert_allclose(met, np.abs(x).mean(axis=0) * np.linalg.norm(w2, axis=1).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(wanda, np.sqrt(np.square(x).mean(axis=0)) * np.abs(w2).sum(axis=(1, 2)), rtol=1e-5)


def test_gradients() -> None:
    model = network()
    gradient = np.random.default_rng(3).normal(size=(UNITS, 3, 3, 3))
    given = {"w1": gradient}
    flat, w1 = gradient.reshape(UNITS, -1), values(model, "w1").reshape(UNITS, -1)
    size = scores([group_of(model)], "gradient", context(model), normalise="none", gradients=given)["first"]
    first = scores([group_of(model)], "taylor", context(model), gradients=given)["first"]
    np.testing.assert_allclose(size, np.linalg.norm(flat, axis=1))
    np.testing.assert_allclose(first, np.abs((flat * w1).sum(axis=1)))


def test_gradients_of_something_else() -> None:
    model = network()
    with pytest.raises(SpecError, match="no gradient of any weight"):
        scores([group_of(model)], "taylor", context(model), gradients={"other": np.ones(3)})
    with pytest.raises(SpecError, match="needs gradients"):
        scores([group_of(model)], "taylor", context(model))


def test_obs_knows_what_others_make_up_for() -> None:
    """A channel that another one repeats goes first, though its weights are as large; then the other one stays."""
    model = network()
    constants = {c.name: c for c in model.constants()}
    for name in ("w1", "b1", "gamma", "beta"):
        held = np.array(constants[name].values)
        held[5] = held[2]
        constants[name].values = held
    found = scores([group_of(model)], "obs", context(model))["first"]
    order = np.argsort(found)
    assert order[0] in (2, 5)
    twin = 7 - order[0]
    assert found[order[0]] < 0.01 * found[twin]


def test_more_sites_come_together_as_asked() -> None:
    model = network()
    group = group_of(model)
    twice = Group("first", UNITS, (*group.sites, group.sites[0]))
    one = scores([group], "l1", context(model), normalise="none")["first"]
    factors = {"sum": 2.0, "mean": 1.0, "max": 1.0, "l2": np.sqrt(2.0)}
    assert set(factors) == set(COMBINES)
    for name, factor in factors.items():
        found = scores([twice], "l1", context(model), aggregate=name, normalise="none")["first"]
        np.testing.assert_allclose(found, factor * one)


@pytest.mark.parametrize(("name", "number"), [("max", np.max), ("mean", np.mean), ("sum", np.sum)])
def test_normalised_per_group(name: str, number: np.ufunc) -> None:
    model = network()
    found = scores([group_of(model)], "l2", context(model), normalise=name)["first"]
    assert number(found) == pytest.approx(1.0)


def test_units_of_several_elements() -> None:
    model = network()
    group = group_of(model)
    pairs = tuple(Site(s.tensor, s.axis, s.units // 2, s.role, s.node, s.port) for s in group.sites)
    one = scores([group], "l1", context(model), normalise="none")["first"]
    two = scores([Group("first", UNITS // 2, pairs)], "l1", context(model), normalise="none")["first"]
    np.testing.assert_allclose(two, one[0::2] + one[1::2])


def test_names_that_are_not_known() -> None:
    model = network()
    with pytest.raises(SpecError, match="unknown criterion 'tayler'") as error:
        scores([group_of(model)], "tayler", context(model))
    assert "did you mean 'taylor'" in str(error.value)
    with pytest.raises(SpecError, match="unknown aggregate"):
        scores([group_of(model)], "l1", context(model), aggregate="all")
    with pytest.raises(SpecError, match="unknown normalise"):
        scores([group_of(model)], "l1", context(model), normalise="all")


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if needs_data(name)])
def test_no_samples(criterion: str) -> None:
    model = network()
    with pytest.raises(DataError, match="there are none"):
        scores([group_of(model)], criterion, context(model, data=False))
