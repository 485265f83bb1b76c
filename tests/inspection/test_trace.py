"""A trace is the reference's, layer by layer, and stays split d/M a device.

A failure of a tensor means that the trace shows something the step did not compute.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of, name_of
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.inspection.depth import Block, _slopes, norms_of, size_shares, summarize_depth

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


@pytest.mark.parametrize(
    ("name", "l", "said"),
    [
        ("h", 0, "l must be in 1 .. 3: got name='h', l=0. Layers count from 1"),
        ("z", 4, "l must be in 1 .. 3: got name='z', l=4"),
        ("g", -1, "l must be in 1 .. 3: got name='g', l=-1"),
        ("sigma_prime", 3, "l must be in 1 .. 2: got .* of hidden layers alone"),
    ],
)
def test_a_layer_that_is_not_there_is_refused_by_name(name, l, said):
    run = traced(tpmlp.make_mesh(x=2))
    for read in (run.logical, lambda name, l: getattr(run, name)[l]):
        with pytest.raises(ValueError, match=said):
            read(name, l)
    assert l not in getattr(run, name)
    assert getattr(run, name).get(l) is None


def test_a_name_that_is_not_there_is_refused():
    name: Any = "w"
    with pytest.raises(ValueError, match=r"name must be one of \('h', .*: got name='w', l=1\."):
        traced(tpmlp.make_mesh(x=2)).logical(name, 1)


def test_sigma_prime_of_a_model_of_one_layer_is_refused():
    mesh, model = tpmlp.make_mesh(x=2), tpmlp.MLP((3, 2))
    params = tpmlp.from_numpy(model, [(np.ones((2, 3)), np.ones(2))], mesh)
    run = tpmlp.trace(model, params, np.ones((4, 3)), loss="output", mesh=mesh)
    with pytest.raises(ValueError, match="of a hidden layer, of which the model has none: got"):
        run.sigma_prime[1]


def test_the_arrays_of_a_trace_are_a_pytree():
    z = traced(tpmlp.make_mesh(x=2)).z
    on_host = jax.device_get(z)
    assert (type(on_host), on_host.name, list(on_host)) == (type(z), "z", [1, 2, 3])
    np.testing.assert_array_equal(on_host[2], z[2])


@pytest.mark.parametrize("sizes", [(1, 5, 1), (2, 2, 2), (1, 1, 1)], ids=name_of)
def test_a_summary_has_the_norms_of_the_logical_arrays(sizes):
    run = traced(mesh_of(sizes))
    oracle = reference.trace(ARRAYS, X, Y, activation="sigmoid", loss="cross_entropy")
    norms = {
        name: {l: np.linalg.norm(a) for l, a in getattr(oracle, name).items()}
        for name in ("h", "z", "g", "dW")
    }
    for row in run.summary().layers:
        for name, wanted in norms.items():
            assert getattr(row, f"{name}_norm") == pytest.approx(wanted[row.layer], rel=FLOAT64)
        if row.layer < 3:
            ratio = norms["g"][row.layer] / norms["g"][row.layer + 1]
            assert row.g_ratio == pytest.approx(ratio, rel=FLOAT64)


@pytest.mark.parametrize("sizes", [(1, 3, 1), (2, 2, 2)], ids=name_of)
def test_a_summary_counts_dead_and_saturated_units_but_no_padding(sizes):
    mesh, model = mesh_of(sizes), tpmlp.MLP((3, 5, 2), activation="relu")
    # Units 1 and 4 are below 0 for both samples, unit 2 for one of them.
    b = np.array([-9.0, 1.0, 0.0, 1.0, -9.0])
    W = np.zeros((5, 3))
    W[2, 0] = 1
    params = tpmlp.from_numpy(model, [(W, b[[0, 1, 2, 3, 4]]), (np.ones((2, 5)), np.ones(2))], mesh)
    x = np.array([[1.0, 0, 0], [-1.0, 0, 0], [-1.0, 0, 0]])
    first, last = tpmlp.trace(model, params, x, loss="output", mesh=mesh).summary().layers
    assert (first.dead_units, first.num_units) == (2, 5)
    assert first.saturated == pytest.approx((3 + 3 + 2) / 15)
    assert (last.dead_units, last.saturated, last.g_ratio) == (None, None, None)


def saturation(activation: Any, biases: list[float]) -> list[float | None]:
    """Return what a summary says of layers that all samples leave at z_l = b_l."""
    mesh, widths = mesh_of((1, 3, 1)), (3, *(4 for _ in biases), 2)
    model = tpmlp.MLP(widths, activation=activation)
    b = [np.full(4, z) for z in biases] + [np.zeros(2)]
    layers = [(np.zeros((len(b_l), i)), b_l) for i, b_l in zip(widths, b, strict=False)]
    params = tpmlp.from_numpy(model, layers, mesh)
    run = tpmlp.trace(model, params, np.ones((2, 3)), loss="output", mesh=mesh)
    return [layer.saturated for layer in run.summary().layers]


@pytest.mark.parametrize(
    ("activation", "biases", "shares"),
    [
        # sigmoid'(6) is 0.00247, 0.0099 of the largest; sigmoid'(5.9) is 0.0109 of it.
        ("sigmoid", [20.0, 6.0, 5.9], [1, 1, 0]),
        ("relu", [-1.0, 1.0], [1, 0]),
        ("identity", [0.0], [0]),
        ((jnp.tanh, lambda z: 1 - jnp.tanh(z) ** 2), [20.0, 0.0], [1, 0]),
        ((jnp.zeros_like, jnp.zeros_like), [1.0], [1]),
    ],
    ids=["sigmoid", "relu", "identity", "a user's", "a user's that is flat"],
)
def test_a_layer_that_is_saturated_throughout_says_so(activation, biases, shares):
    assert saturation(activation, biases) == [*shares, None]


def test_norms_of_gradients_that_vanish_are_not_lost():
    tiny = np.full((2, 4), 1e-30, np.float32)
    blocks = [Block(jnp.asarray(tiny), 2, 4)]
    (row,) = summarize_depth(blocks, blocks, [], blocks, [1.0], None).layers
    assert row.g_norm == pytest.approx(np.sqrt(8) * 1e-30, rel=1e-6)


def test_shares_of_sizes_are_those_of_the_logical_entries():
    run = traced(mesh_of((2, 2, 2)))
    blocks = [Block(run.g[l], run.num_samples, WIDTHS[l]) for l in (1, 2, 3)]
    edges, shares = size_shares(blocks)
    for l, row in zip((1, 2, 3), shares, strict=True):
        sizes = np.log10(np.abs(run.logical("g", l)))
        assert row.sum() == pytest.approx(1, abs=1e-6)
        wanted, _ = np.histogram(np.clip(sizes, edges[0] + 1e-9, None), edges)
        np.testing.assert_allclose(row * sizes.size, wanted, atol=1e-3)


def test_looking_at_a_trace_gathers_no_array():
    run = traced(mesh_of((2, 2, 2)))
    block = Block(run.z[2], run.num_samples, WIDTHS[2])
    for lowered in (norms_of.lower([block]), _slopes.lower([block], 0.25)):
        audit = tpmlp.audit(lowered.compile())
        assert audit.collectives
        assert {row.kind for row in audit.collectives} == {"all_reduce"}
        assert max(row.payload_bytes for row in audit.collectives) <= 8 * WIDTHS[2]


def test_a_picture_has_a_panel_a_quantity_and_a_column_a_layer():
    figure = traced(mesh_of((1, 5, 1))).plot()
    panels = [axes for axes in figure.axes if axes.get_ylabel().startswith("$\\log")]
    assert len(panels) == 3
    meshes = [panel.collections[0].get_array() for panel in panels]
    assert [mesh.shape[1] for mesh in meshes] == [3, 3, 2]


def test_the_lowest_tick_of_a_picture_says_that_its_row_has_all_that_is_smaller():
    run = traced(mesh_of((1, 5, 1)))
    edges, _ = size_shares([Block(run.z[l], run.num_samples, WIDTHS[l]) for l in (1, 2, 3)])
    axis = run.plot().axes[0].yaxis
    ticks, labels = axis.get_ticklocs(), [label.get_text() for label in axis.get_ticklabels()]
    lowest = int(np.argmin(ticks))
    assert edges[0] < ticks[lowest] < edges[1]
    assert labels[lowest] == f"$\\leq {edges[1]:g}$"
    others = [float(text.strip("$")) for i, text in enumerate(labels) if i != lowest]
    assert others == [tick for i, tick in enumerate(ticks) if i != lowest]
