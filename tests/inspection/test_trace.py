"""A trace is the reference's, layer by layer, and stays split d/M a device.

A failure of a tensor means that the trace shows something the step did not compute.
"""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest

import tpmlp
from tests.cases import name_of
from tests.tolerances import FLOAT64
from tpmlp import reference

WIDTHS = (17, 12, 20, 10)
RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(30, 17)), RNG.integers(0, 10, 30)
ARRAYS = [(RNG.normal(size=(o, i)) / i**0.5, RNG.normal(size=o)) for i, o in pairwise(WIDTHS)]


@cache
def traced(mesh):
    model = tpmlp.MLP(WIDTHS, activation="sigmoid")
    params = tpmlp.from_numpy(model, ARRAYS, mesh)
    return tpmlp.trace(model, params, X, Y, loss="cross_entropy", mesh=mesh)


@pytest.mark.parametrize("sizes", [(1, 5, 1), (2, 2, 2), (1, 1, 1)], ids=name_of)
@pytest.mark.parametrize("name", ["h", "z", "sigma_prime", "g"])
def test_every_array_is_the_references(sizes, name):
    mesh = tpmlp.make_mesh(data=sizes[0], x=sizes[1], y=sizes[2])
    run = traced(mesh)
    oracle = reference.trace(ARRAYS, X, Y, activation="sigmoid", loss="cross_entropy")
    layers = getattr(oracle, name)
    assert list(getattr(run, name)) == list(layers)
    for l, expected in layers.items():
        error = np.abs(run.logical(name, l) - expected).max()
        assert error <= FLOAT64 * np.abs(expected).max()


def test_every_array_is_split_d_over_m_a_device(mesh):
    run = traced(mesh)
    for name in ("h", "z", "sigma_prime", "g"):
        for array in getattr(run, name).values():
            shards = array.addressable_shards
            assert {shard.data.size for shard in shards} == {array.size // mesh.size}


def test_padding_is_exactly_zero(mesh):
    run = traced(mesh)
    for l in range(1, 4):
        assert not np.asarray(run.g[l])[:, WIDTHS[l] :].any()
        assert not np.asarray(run.z[l])[:, WIDTHS[l] :].any()
        assert not np.asarray(run.h[l])[:, WIDTHS[l - 1] :].any()


@pytest.mark.parametrize(("name", "l"), [("w", 1), ("h", 0), ("z", 4), ("sigma_prime", 3)])
def test_an_array_that_is_not_there_is_refused_by_name(name, l):
    run = traced(tpmlp.make_mesh(x=2))
    with pytest.raises(ValueError, match=f"name={name!r}, l={l}"):
        run.logical(name, l)
