"""Every loss on sharded outputs against the reference: loss, g_{L+1} and what follows from it.

`g` of the last layer alone with all before it: the loss's gradient. The loss alone: its sum over
outputs, the weights or the division. A failure where 10 outputs are padded (every placement here)
but not on one device: padding takes part in a sum. The network is two layers wide, so that g_1
also shows whether the gradient is split as the recursion expects.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import (
    FEW_PLACEMENTS,
    Problem,
    arrays,
    error_of,
    logical,
    mesh_of,
    name_of,
    relative_error,
    samples,
    sharded,
    strategy_of,
)
from tests.tolerances import FLOAT64
from tpmlp.losses import Cotangent, get_loss

LOSSES = {
    "mse": "mse",
    "cross_entropy": "cross_entropy",
    "smoothed": tpmlp.cross_entropy(0.1),
    "logistic": "logistic",
    "output": "output",
    "component": tpmlp.output(component=3),
    "cotangent": Cotangent(),
}
TENSORS = ["loss", "g_2", "g_1", "dW_2", "db_2", "dW_1", "db_1"]


def problem_of(loss, **more):
    return Problem(widths=(17, 12, 10), activation="tanh", loss=loss, **more)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
@pytest.mark.parametrize("name", LOSSES)
def test_tensor_under_a_loss_equals_the_reference(name, placement, tensor, weighted):
    assert error_of(problem_of(LOSSES[name], weighted=weighted), placement, tensor) <= FLOAT64


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("name", ["mse", "logistic"])
def test_one_output_on_eight_devices_equals_the_reference(name, tensor):
    problem = Problem(widths=(17, 12, 1), activation="tanh", loss=name)
    assert error_of(problem, ((1, 4, 2), "column-row"), tensor) <= FLOAT64


def cubic(z, y):
    """Return a loss that couples outputs, which no built-in one does."""
    return jnp.sum(jnp.abs(z - y) ** 3) + z[0] * z[9] * y[1]


def unsharded_cubic(layers, x, y, weight):
    """Compute the objective as a user without this package would."""
    h = x
    for W, b in layers[:-1]:
        h = jnp.tanh(h @ W.T + b[None])
    W, b = layers[-1]
    losses = jax.vmap(cubic)(h @ W.T + b[None], y)
    return jnp.sum(weight * losses) / jnp.sum(weight)


@cache
def by_jax_grad(weighted):
    """Return the tensors that the derivative of `unsharded_cubic` consists of."""
    problem = problem_of(cubic, weighted=weighted)
    x, y, weight = samples(problem)
    weight = np.ones(len(x)) if weight is None else weight
    loss, grads = jax.jit(jax.value_and_grad(unsharded_cubic))(arrays(problem), x, y, weight)
    tensors = {"loss": loss}
    for l, (dW, db) in enumerate(grads, 1):
        tensors |= {f"dW_{l}": dW, f"db_{l}": db}
    return tensors


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("tensor", ["loss", "dW_1", "db_1", "dW_2", "db_2"])
@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
def test_tensor_under_a_users_loss_equals_jax_grad_unsharded(placement, tensor, weighted):
    wanted = by_jax_grad(weighted)[tensor]
    got = logical(sharded(problem_of(cubic, weighted=weighted), placement)[tensor], wanted.shape)
    assert relative_error(got, wanted) <= FLOAT64


def rows_as_logits(z, loss, y, sizes=(1, 4, 2)):
    """Return (loss, dW) of z = W h with h = 1 and one sample: W is z, and dW is g."""
    mlp = tpmlp.MLP((1, len(z)), bias=False)
    mesh = mesh_of(sizes)
    params = tpmlp.from_numpy(mlp, [(np.asarray(z)[:, None], None)], mesh)
    value, grads = tpmlp.value_and_grad(mlp, loss=loss, mesh=mesh)(params, [[1.0]], y)
    return float(value), tpmlp.to_numpy(mlp, grads)[0][0][:, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_is_exact_at_logits_of_ten_thousand(dtype):
    z = np.array([1e4, -1e4, 1e4, 0, 5], dtype)
    value, g = rows_as_logits(z, "cross_entropy", [0])
    assert value == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(g, [-0.5, 0, 0.5, 0, 0], atol=1e-7)
    value, g = rows_as_logits(z, "cross_entropy", [1])
    assert value == pytest.approx(2e4 + np.log(2), rel=1e-6)
    np.testing.assert_allclose(g, [0.5, -1, 0.5, 0, 0], atol=1e-7)


def test_cross_entropy_of_negative_logits_does_not_see_the_zeros_of_padding():
    # Were padding logits 0 rather than absent, they would take the whole softmax.
    value, g = rows_as_logits(np.full(5, -1e4), "cross_entropy", [2])
    assert value == pytest.approx(np.log(5), rel=1e-12)
    np.testing.assert_allclose(g, [0.2, 0.2, -0.8, 0.2, 0.2], rtol=1e-12)


def test_smoothing_spreads_over_logical_classes_only():
    _, g = rows_as_logits(np.zeros(5), tpmlp.cross_entropy(0.5), [2])
    np.testing.assert_allclose(g, np.array([0.1, 0.1, -0.4, 0.1, 0.1]), atol=1e-15)


def test_logistic_is_exact_at_outputs_of_ten_thousand():
    value, g = rows_as_logits([1e4, -1e4, 1e4, -1e4], "logistic", [[1, 0, 0, 1]])
    assert value == pytest.approx(5e3)
    np.testing.assert_allclose(g, [0, 0, 0.25, -0.25], atol=1e-15)


def test_logistic_keeps_the_digits_of_a_confident_right_output():
    value, g = rows_as_logits([40.0], "logistic", [[1]])
    assert value == pytest.approx(np.exp(-40), rel=1e-12)
    assert g[0] == pytest.approx(-np.exp(-40), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint32])
def test_labels_of_every_integer_type_mean_the_same(dtype):
    value, _ = rows_as_logits([0.0, 1.0, 2.0], "cross_entropy", np.array([1], dtype))
    assert value == pytest.approx(np.log(np.exp([0.0, 1.0, 2.0]).sum()) - 1, rel=1e-12)


def test_small_integer_types_serve_models_of_more_classes_than_they_count():
    value, _ = rows_as_logits(np.zeros(300), "cross_entropy", np.array([7], np.uint8))
    assert value == pytest.approx(np.log(300), rel=1e-12)


@pytest.mark.parametrize("label", [-1, 10, 15, 2**32 + 1])
def test_a_traced_label_that_is_no_class_gives_nan_not_another_class(label):
    mlp = tpmlp.MLP((3, 10))
    mesh = mesh_of((1, 4, 2))
    params = mlp.init(jax.random.key(0), mesh)
    step = tpmlp.value_and_grad(mlp, loss="cross_entropy", mesh=mesh)
    x = np.ones((4, 3), np.float32)
    loss, grads = jax.jit(lambda y: step(params, x, y))(np.array([0, 1, label, 3]))
    assert np.isnan(loss)
    assert np.isnan(tpmlp.to_numpy(mlp, grads)[0][0]).all()


def by_hand(z, y, name):
    if name == "cross_entropy":
        return (z.argmax(axis=1) == y).astype(float)
    return ((z > 0) == (y > 0.5)).mean(axis=1)


@pytest.mark.parametrize("placement", FEW_PLACEMENTS, ids=name_of)
@pytest.mark.parametrize("name", ["cross_entropy", "logistic"])
def test_correct_is_the_weighted_share_of_right_predictions(name, placement):
    problem = problem_of(name, weighted=True)
    result = sharded(problem, placement)
    _, y, weight = samples(problem)
    weight = np.asarray(weight)
    right = by_hand(result["z_2"][:10, :30].T, y, name)
    assert result["correct"] == pytest.approx((weight * right).sum() / weight.sum(), rel=1e-12)


def test_correct_is_nan_for_a_loss_without_predictions():
    assert np.isnan(sharded(problem_of("mse"), FEW_PLACEMENTS[0])["correct"])


def test_weights_equal_repeating_the_samples():
    mlp = tpmlp.MLP((17, 12, 10), activation="tanh")
    mesh = mesh_of((2, 2, 2))
    problem = problem_of("cross_entropy")
    (x, y, _), times = samples(problem), np.arange(30) % 3
    params = tpmlp.from_numpy(mlp, arrays(problem), mesh)
    step = tpmlp.value_and_grad(mlp, loss="cross_entropy", mesh=mesh)
    loss, grads = step(params, x, y, times)
    loss_again, grads_again = step(params, np.repeat(x, times, 0), np.repeat(y, times, 0))
    assert relative_error(loss, loss_again) <= FLOAT64
    for dW, dW_again in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_again), strict=True):
        assert relative_error(dW, dW_again) <= FLOAT64


@pytest.mark.parametrize("tensor", ["loss", "dW_1", "db_2"])
def test_cotangent_argument_is_the_gradient_from_above(tensor):
    problem = problem_of(Cotangent())
    x, v, _ = samples(problem)
    mesh, strategy = mesh_of((2, 2, 2)), strategy_of("row-column", 2)
    params = tpmlp.from_numpy(problem.model, arrays(problem), mesh, strategy=strategy)
    step = tpmlp.value_and_grad(problem.model, loss=None, mesh=mesh, strategy=strategy)
    loss, grads = step(params, x, cotangent=v)
    got = {"loss": loss, "dW_1": grads[0][0], "db_2": grads[1][1]}[tensor]
    wanted = sharded(problem, ((2, 2, 2), "row-column"))[tensor]
    assert relative_error(got, wanted) == 0


def test_a_users_loss_that_is_no_scalar_is_refused_by_name():
    def vector(z, y):
        return z - y

    with pytest.raises(ValueError, match="loss 'vector' must return a scalar"):
        rows_as_logits([0.0, 1.0], vector, [[0.0, 0.0]])


@pytest.mark.parametrize("wrong", ["mean_squared", None, 3, ("mse",)])
def test_what_is_no_loss_is_refused_with_the_names_that_are(wrong):
    with pytest.raises(ValueError, match="loss must be one of") as refusal:
        get_loss(wrong)
    assert f"loss={wrong!r}" in str(refusal.value)
    assert "cross_entropy" in str(refusal.value)


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 2, float("nan")])
def test_a_label_smoothing_that_is_no_share_is_refused(wrong):
    with pytest.raises(ValueError, match=f"label_smoothing={wrong}"):
        tpmlp.cross_entropy(wrong)


@pytest.mark.parametrize("wrong", [-1, 10, 1.5, "first"])
def test_a_component_that_is_no_output_is_refused(wrong):
    mlp, mesh = tpmlp.MLP((3, 10)), mesh_of((1, 2, 1))
    with pytest.raises(ValueError, match=f"component={wrong!r}"):
        tpmlp.shard_batch(mlp, np.ones((2, 3)), mesh=mesh, loss=tpmlp.output(wrong))


TIED = tpmlp.MLP((3, 4, 10))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 5)], ids=name_of)
def test_of_tied_logits_the_first_is_the_prediction_as_in_predict(sizes):
    mesh = mesh_of(sizes)
    # Rows 2 to 5 of W_2 are equal and win; so do they on several devices.
    W_2 = np.zeros((10, 4))
    W_2[2:6] = 1.0
    params = tpmlp.from_numpy(TIED, [(np.ones((4, 3)), np.ones(4)), (W_2, np.zeros(10))], mesh)
    x, y = np.ones((20, 3)), np.arange(20) % 10
    accuracy = tpmlp.evaluate(TIED, params, (x, y), loss="cross_entropy", mesh=mesh).accuracy
    classes = tpmlp.predict(TIED, params, x, mesh=mesh, kind="classes")
    assert accuracy == (classes == y).mean() == 0.1


def infinite_at_zero(z, y):
    return (jnp.log(jnp.abs(y)) * z).sum()


def test_a_sample_of_weight_zero_counts_nowhere_even_if_its_gradient_is_infinite():
    mesh = tpmlp.make_mesh(x=2)
    model = tpmlp.MLP((3, 2))
    params = tpmlp.from_numpy(model, [(np.ones((2, 3)), np.ones(2))], mesh)
    step = tpmlp.value_and_grad(model, loss=infinite_at_zero, mesh=mesh)
    x, y, weight = np.ones((3, 3)), np.array([2.0, 0.0, 3.0]), np.array([1.0, 0.0, 1.0])
    loss, grads = step(params, x, y, weight)
    kept, kept_grads = step(params, x[::2], y[::2])
    assert float(loss) == float(kept)
    np.testing.assert_array_equal(grads[0][0], kept_grads[0][0])
