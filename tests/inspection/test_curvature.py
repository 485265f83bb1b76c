"""Products with curvature are JAX's own on the unsharded model, on every mesh.

The oracle is a plain network in jax.numpy: jax.jvp of jax.grad for the Hessian; jax.jvp, the
Hessian of the loss and jax.vjp for Gauss-Newton. A failure of the Hessian alone is in the
derivative of the backward pass (a tangent that is lost, sigma''); of Gauss-Newton alone in its
three factors; of both in the forward pass's derivative, the loss or R.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import Sizes, mesh_of, relative_error
from tests.strategies import QUICKLY
from tests.tolerances import CENTRAL_DIFFERENCE, FLOAT64

RNG = np.random.default_rng(7)
X, WEIGHT = RNG.normal(size=(30, 17)), RNG.uniform(0.1, 3, 30)
WEIGHT[[3, 20]] = 0
LABELS, VALUES = RNG.integers(0, 10, 30), RNG.normal(size=(30, 10))
BITS = RNG.integers(0, 2, (30, 10)).astype(float)

PRODUCTS: dict[str, Callable[..., Any]] = {
    "hessian": tpmlp.hessian_vector_product,
    "gauss_newton": tpmlp.gauss_newton_vector_product,
}


def log_cosh(z, y):
    return jnp.sum(jnp.log(jnp.cosh(z - y)))


def norm_of_everything(layers):
    return jnp.sqrt(sum(jnp.sum(a**2) + jnp.sum(a**4) for a in jax.tree.leaves(layers)))


def sum_of_squares(layers, c=0.1):
    return c * sum(jnp.sum(W**2) for W, _ in layers)


def log_loss(z, y, smoothing=0.0):
    log_softmax = jax.nn.log_softmax(z)
    return -(1 - smoothing) * log_softmax[y] - smoothing * jnp.mean(log_softmax)


# What tpmlp takes, the targets, and the loss of one sample in plain JAX.
LOSSES: dict[str, tuple[Any, Any, Callable[..., Any]]] = {
    "mse": ("mse", VALUES, lambda z, y: jnp.mean((z - y) ** 2)),
    "cross_entropy": ("cross_entropy", LABELS, log_loss),
    "smoothed": (tpmlp.cross_entropy(0.2), LABELS, lambda z, y: log_loss(z, y, 0.2)),
    "logistic": ("logistic", BITS, lambda z, y: jnp.mean(jnp.logaddexp(z, 0 * z) - y * z)),
    "user": (log_cosh, VALUES, log_cosh),
}
PENALTIES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "l2": (tpmlp.l2(0.1), sum_of_squares),
    # |w| has no second derivative: that of its square is halved.
    "elastic_net": (tpmlp.elastic_net(0.2, 0.5), sum_of_squares),
    "biases": (
        tpmlp.l2(0.1, biases=True),
        lambda layers: 0.1 * sum(jnp.sum(a**2) for a in jax.tree.leaves(layers)),
    ),
    "user": (norm_of_everything, norm_of_everything),
    "none": (None, lambda layers: 0.0 * layers[0][0][0, 0]),
}
ACTIVATIONS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "sigmoid": ("sigmoid", jax.nn.sigmoid),
    "relu": ("relu", jax.nn.relu),
    "gelu": ("gelu", lambda z: jax.nn.gelu(z, approximate=False)),
    "tanh": ("tanh", jnp.tanh),
    "user": ((lambda z: jnp.sin(z) + 2.0, jnp.cos), lambda z: jnp.sin(z) + 2.0),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed, and where; names as in LOSSES, PENALTIES and ACTIVATIONS."""

    sizes: Sizes
    widths: tuple[int, ...] = (17, 12, 10)
    loss: str = "cross_entropy"
    penalty: str = "l2"
    activation: str = "sigmoid"
    strategy: tpmlp.Strategy = field(default_factory=tpmlp.Strategy)

    @property
    def model(self) -> tpmlp.MLP:
        """The MLP."""
        return tpmlp.MLP(self.widths, activation=ACTIVATIONS[self.activation][0])

    @property
    def objective(self) -> tuple[Any, ...]:
        """All that the result depends on."""
        return self.widths, self.loss, self.penalty, self.activation

    def place(self, arrays: Any) -> Any:
        """Place arrays of logical widths."""
        return tpmlp.from_numpy(self.model, arrays, mesh_of(self.sizes), strategy=self.strategy)


def drawn(widths: tuple[int, ...], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return arrays of logical widths: parameters, or a direction."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(o, i)) / i**0.5, rng.normal(size=o)) for i, o in pairwise(widths)]


@cache
def expected(
    widths: tuple[int, ...], loss: str, penalty: str, activation: str
) -> Mapping[str, Any]:
    """Return both products by JAX on the unsharded model."""
    _, y, of_sample = LOSSES[loss]
    of_layers, sigma = PENALTIES[penalty][1], ACTIVATIONS[activation][1]

    def outputs(layers):
        h = jnp.asarray(X)
        for W, b in layers[:-1]:
            h = sigma(h @ W.T + b[None])
        return h @ layers[-1][0].T + layers[-1][1][None]

    def mean(z):
        return jnp.sum(WEIGHT * jax.vmap(of_sample)(z, y)) / WEIGHT.sum()

    def along(function, at, v):
        return jax.jvp(function, (at,), (v,))[1]

    def products(layers, v):
        z, transposed = jax.vjp(outputs, layers)
        (of_loss,) = transposed(along(jax.grad(mean), z, along(outputs, layers, v)))
        of_penalty = along(jax.grad(of_layers), layers, v)
        gradient = jax.grad(lambda layers: mean(outputs(layers)) + of_layers(layers))
        return {
            "hessian": along(gradient, layers, v),
            "gauss_newton": jax.tree.map(jnp.add, of_loss, of_penalty),
        }

    arguments = jax.tree.map(jnp.asarray, (drawn(widths, 0), drawn(widths, 1)))
    return jax.jit(products).lower(*arguments).compile(QUICKLY)(*arguments)


@cache
def program(case: Case) -> Callable[..., dict[str, Any]]:
    """Compile both products, inside a user's jit, as a function of the parameters and v."""
    loss, y, _ = LOSSES[case.loss]

    def both(params, v):
        return {
            name: product(
                case.model, params, v, X, y, loss=loss, regularizer=PENALTIES[case.penalty][0],
                mesh=mesh_of(case.sizes), strategy=case.strategy, weight=WEIGHT,
            )
            for name, product in PRODUCTS.items()
        }  # fmt: skip

    params = case.place(drawn(case.widths, 0))
    return jax.jit(both).lower(params, params).compile(QUICKLY)


@cache
def sharded(case: Case) -> dict[str, Any]:
    """Return both products by the kernel, padded."""
    return program(case)(case.place(drawn(case.widths, 0)), case.place(drawn(case.widths, 1)))


def error_of(case: Case, product: str) -> float:
    """Return the largest relative error of a product's tensors."""
    got = tpmlp.to_numpy(case.model, sharded(case)[product])
    pairs = zip(
        jax.tree.leaves(got), jax.tree.leaves(expected(*case.objective)[product]), strict=True
    )
    return max(relative_error(a, b) for a, b in pairs)


def test_products_are_jaxs_on_the_unsharded_model_and_placed_as_the_parameters(mesh):
    case = Case(sizes=(mesh.shape["data"], mesh.shape["x"], mesh.shape["y"]))
    params = case.place(drawn(case.widths, 0))
    for product, result in sharded(case).items():
        assert error_of(case, product) <= FLOAT64, product
        assert jax.tree.structure(params) == jax.tree.structure(result)
        for p, a in zip(jax.tree.leaves(params), jax.tree.leaves(result), strict=True):
            assert (a.shape, a.dtype) == (p.shape, p.dtype)
            assert a.sharding.is_equivalent_to(p.sharding, p.ndim)
            # No entry of the parameters is 0 but the padding.
            assert not np.asarray(a)[np.asarray(p) == 0].any()


CASES = {
    "ring, recompute": Case(
        sizes=(1, 3, 1),
        widths=(17, 12, 20, 10),
        loss="smoothed",
        penalty="elastic_net",
        activation="gelu",
        strategy=tpmlp.Strategy(layout="row", keep="recompute", overlap="bidirectional_ring"),
    ),
    "ring, gathered, split": Case(
        sizes=(2, 2, 2),
        loss="logistic",
        penalty="biases",
        activation="relu",
        strategy=tpmlp.Strategy(keep="gathered", overlap="ring", shard_weights=True),
    ),
    "gathered, microbatches": Case(
        sizes=(2, 1, 3),
        loss="user",
        penalty="user",
        activation="tanh",
        strategy=tpmlp.Strategy(keep="gathered", microbatches=3),
    ),
    "split, microbatches": Case(
        sizes=(4, 2, 1),
        loss="mse",
        penalty="none",
        activation="user",
        strategy=tpmlp.Strategy(shard_weights=True, microbatches=2),
    ),
    "invariant": Case(
        sizes=(2, 1, 2),
        penalty="elastic_net",
        strategy=tpmlp.Strategy(reduction="invariant"),
    ),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", CASES)
def test_a_product_under_a_strategy_with_another_objective_is_jaxs(name, product):
    assert error_of(CASES[name], product) <= FLOAT64


def test_the_hessian_is_what_central_differences_of_the_steps_gradient_say():
    case = CASES["ring, recompute"]
    loss, y, _ = LOSSES[case.loss]
    step = tpmlp.value_and_grad(
        case.model, loss=loss, regularizer=tpmlp.l2(0.1), mesh=mesh_of(case.sizes),
        strategy=case.strategy,
    )  # fmt: skip
    arrays, v = drawn(case.widths, 0), drawn(case.widths, 1)

    def gradient(t):
        moved = jax.tree.map(lambda w, v: w + t * v, arrays, v)
        return jax.tree.leaves(tpmlp.to_numpy(case.model, step(case.place(moved), X, y, WEIGHT)[1]))

    got = jax.tree.leaves(tpmlp.to_numpy(case.model, sharded(case)["hessian"]))
    for a, ahead, behind in zip(got, gradient(1e-4), gradient(-1e-4), strict=True):
        assert relative_error(a, (ahead - behind) / 2e-4) <= CENTRAL_DIFFERENCE


@pytest.mark.parametrize("product", PRODUCTS)
def test_what_the_padding_of_v_holds_changes_no_bit(product):
    case = CASES["ring, gathered, split"]
    params, v = case.place(drawn(case.widths, 0)), case.place(drawn(case.widths, 1))
    full = jax.tree.map(lambda p, v: jnp.where(p == 0, 7.0, v), params, v)
    for a, b in zip(
        jax.tree.leaves(program(case)(params, full)[product]),
        jax.tree.leaves(sharded(case)[product]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_symmetric(product):
    case = CASES["ring, gathered, split"]
    params, u, v = (case.place(drawn(case.widths, seed)) for seed in (0, 1, 2))

    def dot(a, b):
        return sum(
            float(jnp.vdot(*pair)) for pair in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        )

    uAv, vAu = dot(u, program(case)(params, v)[product]), dot(v, program(case)(params, u)[product])
    assert uAv == pytest.approx(vAu, rel=FLOAT64)
    assert dot(v, program(case)(params, v)["gauss_newton"]) > 0


def test_relu_at_its_kink_has_the_derivative_of_the_backward_pass():
    # z_1 is 0 there, where JAX's own derivative of max(z, 0) is 1/2. Numbers are exact.
    model, mesh = tpmlp.MLP((2, 3, 2), bias=False), mesh_of((1, 2, 1))
    arrays = [(np.array([[1.0, -1], [2, -2], [1, 1]]), None), (np.ones((2, 3)), None)]
    params = tpmlp.from_numpy(model, arrays, mesh)
    x, y = np.ones((1, 2)), np.zeros((1, 2))
    product = tpmlp.gauss_newton_vector_product(model, params, params, x, y, loss="mse", mesh=mesh)
    # Only the third unit is alive: z_2 = 2 (1, 1) and J v = 4 (1, 1).
    (G1, _), (G2, _) = tpmlp.to_numpy(model, product)
    np.testing.assert_array_equal(G1, [[0, 0], [0, 0], [8, 8]])
    np.testing.assert_array_equal(G2, [[0, 0, 8], [0, 0, 8]])


def test_conjugate_gradients_on_gauss_newton_solve_least_squares():
    model, mesh = tpmlp.MLP((4, 2), bias=False), mesh_of((2, 2, 2))
    x, y = X[:, :4], VALUES[:, :2]
    where: dict[str, Any] = {"loss": "mse", "mesh": mesh}
    zero = tpmlp.from_numpy(model, [(np.zeros((2, 4)), None)], mesh)

    @jax.jit
    def solve(params):
        _, gradient = tpmlp.value_and_grad(model, **where)(params, x, y)

        def product(v):
            return tpmlp.gauss_newton_vector_product(model, params, v, x, y, **where)

        return jax.scipy.sparse.linalg.cg(product, gradient, maxiter=8, tol=1e-14)[0]

    wanted = np.linalg.lstsq(x, y)[0].T
    assert relative_error(-tpmlp.to_numpy(model, solve(zero))[0][0], wanted) <= FLOAT64


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_second_call_compiles_nothing(product):
    model, mesh = tpmlp.MLP((3, 2)), mesh_of((1, 2, 1))
    params = model.init(jax.random.key(0), mesh)
    product(model, params, params, X[:, :3], VALUES[:, :2], loss="mse", mesh=mesh)
    compiled = []

    def listen(event: str, duration_secs: float, **_: Any):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        product(model, params, params, X[:, 3:6], VALUES[:, :2], loss="mse", mesh=mesh)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if "compile" in event]
