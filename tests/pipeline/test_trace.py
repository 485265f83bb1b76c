"""A trace of a pipeline is the reference's, layer by layer, wherever the layer is.

A failure of one tensor means that the trace shows something no step computes; of one case, that
arrays of its layers are taken from the wrong stage, slot or chunk, or in the wrong order of axes.
"""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

import tpmlp
from tests.pipeline.test_executor import Case, data_of
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.losses import get_loss

# 2 and 3 stages; loops, chunks and a "v"; an odd number of slots on two tensor axes; some slots
# empty, and none at all. Sigmoid, on widths that the meshes do not divide.
NO_SLOTS = Case(sizes=(1, 2, 1, 1), schedule="1f1b", microbatches=1, num_layers=2)
ODD = Case(sizes=(1, 2, 2, 2), schedule="1f1b", microbatches=4, num_layers=7, loss="mse")
DATA = Case(sizes=(2, 3, 1, 1), schedule="gpipe", microbatches=2, num_layers=5, bias=False)
CHUNKS = Case(sizes=(1, 2, 3, 1), schedule="interleaved", microbatches=4, num_layers=6, chunks=2)
V = Case(sizes=(1, 2, 2, 2), schedule="zb-v", microbatches=3, num_layers=5, loss="logistic")
CASES = [
    NO_SLOTS,
    ODD,
    DATA,
    CHUNKS,
    V,
]


def model_of(case: Case, integers: bool) -> tpmlp.MLP:
    return tpmlp.MLP(case.model.widths, activation="relu") if integers else case.model


@cache
def traced(case: Case, integers: bool = False, **given: Any) -> Any:
    data, model = data_of(case, integers), model_of(case, integers)
    mesh, strategy = case.mesh, case.strategy
    params = tpmlp.from_numpy(model, data["arrays"], mesh, strategy=strategy)
    given = {"mesh": mesh, "strategy": strategy, "weight": data["weight"], **given}
    return tpmlp.trace(model, params, data["x"], data["y"], loss=case.loss, **given)


@cache
def oracle_of(case: Case, integers: bool = False) -> reference.Trace:
    data, model = data_of(case, integers), model_of(case, integers)
    given = {"activation": model.activation, "loss": get_loss(case.loss), "weight": data["weight"]}
    return reference.trace(data["arrays"], data["x"], data["y"], **given)


def tensors(case: Case, name: str, integers: bool = False) -> list[tuple[Any, Any]]:
    """Return the arrays of a name by layer, each beside the reference's."""
    run, oracle = traced(case, integers), oracle_of(case, integers)
    if name in ("dW", "db"):
        which = 0 if name == "dW" else 1
        grads = enumerate(tpmlp.to_numpy(model_of(case, integers), run.grads), 1)
        return [(pair[which], getattr(oracle, name)[l]) for l, pair in grads]
    layers = getattr(oracle, name)
    assert list(getattr(run, name)) == list(layers)
    return [(run.logical(name, l), expected) for l, expected in layers.items()]


@pytest.mark.parametrize("name", ["h", "z", "sigma_prime", "g", "dW", "db"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_array_is_the_references(case, name):
    for array, expected in tensors(case, name):
        if expected is None:
            assert array is None
        else:
            assert np.abs(array - expected).max() <= FLOAT64 * np.abs(expected).max()
    oracle = oracle_of(case)
    assert abs(traced(case).loss - oracle.loss) <= FLOAT64 * abs(oracle.loss)


# An even number of slots on two tensor axes.
INTEGERS = Case(sizes=(1, 2, 2, 2), schedule="zb-v", microbatches=2, num_layers=6, loss="output")


@pytest.mark.parametrize("name", ["h", "z", "sigma_prime", "g", "dW", "db"])
def test_every_array_of_integers_is_the_references_bit_for_bit(name):
    for array, expected in tensors(INTEGERS, name, integers=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_device_of_any_stage_has_d_over_m_of_every_layer(case):
    run, (data, stage, x, y) = traced(case), case.sizes
    for name in ("h", "z", "sigma_prime", "g"):
        for array in getattr(run, name).values():
            assert len(array.addressable_shards) == data * stage * x * y
            assert {s.data.size for s in array.addressable_shards} == {array.size // (data * x * y)}


@pytest.mark.parametrize("case", [ODD, V], ids=str)
def test_an_array_is_laid_out_as_its_layer_is_on_its_stage(case):
    run, placement = traced(case), case.model.place(case.mesh, case.strategy)
    column, row = (None, ("x", "y")), (None, ("y", "x"))
    # Roles go by slot. A stage's chain is c|rcr|c in one case, where the second stage begins with a
    # row again and leaves a slot empty, and c|r|c in the other.
    wanted = {ODD: "crcrrcc", V: "crrrc"}[case]
    assert "".join(word[0] for word in placement.words) == wanted
    for l, word in enumerate(wanted, 1):
        assert tuple(run.z[l].sharding.spec) == tuple(run.g[l].sharding.spec)
        assert tuple(run.z[l].sharding.spec) == (column if word == "c" else row)
        assert tuple(run.h[l].sharding.spec) == (row if word == "c" else column)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_is_exactly_zero(case):
    run, widths = traced(case), case.model.widths
    for l in range(1, case.num_layers + 1):
        assert not np.asarray(run.h[l])[:, widths[l - 1] :].any()
        assert not np.asarray(run.z[l])[:, widths[l] :].any()
        assert not np.asarray(run.g[l])[:, widths[l] :].any()
        if l < case.num_layers:
            assert not np.asarray(run.sigma_prime[l])[:, widths[l] :].any()


@pytest.mark.parametrize(
    ("case", "given"),
    [(ODD, {}), (NO_SLOTS, {"regularizer": tpmlp.l2(0.1)})],
    ids=["odd slots", "with R"],
)
def test_gradients_are_those_of_a_step_and_placed_as_they_are(case, given):
    data, mesh, strategy = data_of(case), case.mesh, case.strategy
    params = tpmlp.from_numpy(case.model, data["arrays"], mesh, strategy=strategy)
    step = tpmlp.value_and_grad(case.model, loss=case.loss, mesh=mesh, strategy=strategy, **given)
    _, expected = step(params, data["x"], data["y"], data["weight"])
    grads = traced(case, **given).grads
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= FLOAT64 * np.abs(b).max()


def test_a_summary_has_the_norms_of_the_logical_arrays():
    oracle = oracle_of(ODD)
    for row in traced(ODD).summary().layers:
        for name in ("h", "z", "g", "dW"):
            wanted = np.linalg.norm(getattr(oracle, name)[row.layer])
            assert getattr(row, f"{name}_norm") == pytest.approx(wanted, rel=FLOAT64)


def test_a_picture_has_a_panel_a_quantity_and_a_column_a_layer():
    figure = traced(ODD).plot()
    panels = [axes for axes in figure.axes if axes.get_ylabel().startswith("$\\log")]
    meshes = [panel.collections[0].get_array() for panel in panels]
    assert [mesh.shape[1] for mesh in meshes] == [7, 7, 6]


def test_sigma_prime_of_the_last_layer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"l must be in 1 .. 6: got name='sigma_prime', l=7"):
        traced(ODD).logical("sigma_prime", 7)


def test_parameters_of_other_stages_are_refused():
    mesh, whole = ODD.mesh, tpmlp.make_mesh(x=2)
    data, model = data_of(ODD), ODD.model
    params = tpmlp.from_numpy(model, data["arrays"], whole)
    with pytest.raises(ValueError, match=r"placed for 2 stages .* of no stages"):
        tpmlp.trace(model, params, data["x"], data["y"], loss="mse", mesh=mesh)
