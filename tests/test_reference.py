"""The oracle itself: what everything sharded is compared with must be right on its own.

- The gradient and g_l tests compare with central differences of the objective: a failure is a slip
  in the recursion, in sigma' or in a loss's derivative, and its name says in which tensor.
- The value tests compare with numbers worked out by hand or with the plain definition, which
  differences cannot check. tests/test_scikit_learn.py adds an implementation written by others.
- The stability tests use arguments of 1e4, where the textbook formulas overflow or cancel.
"""

import math
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tpmlp import reference

# A central difference with step s errs by (s^2 / 6) f''' + eps f / s; at s = 1e-5, f = 10 and
# derivatives near 1 by 2e-10. The margin is for third derivatives; the worst seen is 5e-10.
STEP = 1e-5
DIFFERENCE_TOLERANCE = 1e-8

# Two ways to write one float64 formula; sums of at most 20 terms.
ROUNDING = 1e-13

SAMPLES = 5
WIDTHS = (4, 6, 5, 3)
RNG = np.random.default_rng(7)
X = RNG.normal(size=(SAMPLES, WIDTHS[0]))
WEIGHT = np.array([1.0, 0.0, 2.5, 0.5, 3.0])

# name: (loss, y)
LOSSES = {
    "mse": ("mse", RNG.normal(size=(SAMPLES, 3))),
    "cross_entropy": ("cross_entropy", np.array([0, 2, 1, 1, 2])),
    "smoothed": (reference.cross_entropy(label_smoothing=0.2), np.array([0, 2, 1, 1, 2])),
    "logistic": ("logistic", RNG.integers(2, size=(SAMPLES, 3))),
    "output": ("output", None),
    "component": (reference.output(component=1), None),
    "cotangent": ("cotangent", RNG.normal(size=(SAMPLES, 3))),
}


def network(widths=WIDTHS, bias=True, seed=1) -> list[tuple[Any, Any]]:
    """Return random arrays for widths d_0 .. d_{L+1}."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(o, i)), rng.normal(size=o) if bias else None) for i, o in pairwise(widths)
    ]


def differences(function, a):
    """Return the central differences of a number by every entry of a."""
    a, gradient = a.copy(), np.empty_like(a)
    for index in np.ndindex(a.shape):
        here = a[index]
        values = []
        for a[index] in (here - STEP, here + STEP):
            values.append(function(a))
        a[index], gradient[index] = here, (values[1] - values[0]) / (2 * STEP)
    return gradient


def assert_close(actual, expected, tolerance):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def assert_gradients_are_differences(arrays, y, **keywords):
    """Compare every dW_l and db_l with differences of the returned objective."""
    _, grads = reference.value_and_grad(arrays, X, y, **keywords)
    for layer, pair in enumerate(arrays):
        for k, array in enumerate(pair):
            if array is None:
                assert grads[layer][k] is None
                continue

            def objective(a, layer=layer, k=k, pair=pair):
                changed = [*arrays]
                changed[layer] = (a, pair[1]) if k == 0 else (pair[0], a)
                return reference.value_and_grad(changed, X, y, **keywords)[0]

            assert_close(grads[layer][k], differences(objective, array), DIFFERENCE_TOLERANCE)


@pytest.fixture(params=reference.ACTIVATIONS)
def activation(request):
    return request.param


@pytest.fixture(params=LOSSES)
def loss_and_y(request):
    return LOSSES[request.param]


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


# The recursion.


def test_gradients_are_the_differences_of_the_objective(activation, loss_and_y):
    loss, y = loss_and_y
    assert_gradients_are_differences(network(), y, activation=activation, loss=loss)


def test_gradients_hold_without_biases_with_weights_and_a_penalty(loss_and_y, bias):
    loss, y = loss_and_y
    penalty = reference.elastic_net(0.1, 0.3)
    assert_gradients_are_differences(
        network(bias=bias), y, activation="tanh", loss=loss, weight=WEIGHT, regularizer=penalty
    )


def test_gradients_of_a_linear_model_hold(loss_and_y, bias):
    loss, y = loss_and_y
    assert_gradients_are_differences(network((4, 3), bias=bias), y, loss=loss, weight=WEIGHT)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_g_is_the_difference_by_z(layer, loss_and_y, activation):
    loss, y = loss_and_y
    arrays, keywords = network(), {"activation": activation, "loss": loss, "weight": WEIGHT}
    t = reference.trace(arrays, X, y, **keywords)
    sigma = reference.ACTIVATIONS[activation][0]
    identity = [(np.eye(3), None)]

    def objective(z):
        tail, h = (arrays[layer:], sigma(z)) if layer < 3 else (identity, z)
        return reference.value_and_grad(tail, h, y, **keywords)[0]

    assert_close(t.g[layer], differences(objective, t.z[layer]), DIFFERENCE_TOLERANCE)


def test_the_gradient_of_the_output_is_the_one_worked_out_by_hand():
    arrays = [([[1.0, 2.0], [0.0, -1.0]], [1.0, 0.0]), ([[3.0, 4.0]], [5.0])]
    value, grads = reference.value_and_grad(arrays, [[2.0, 1.0]], loss="output")
    assert value == 3.0 * 5.0 + 5.0
    assert [(dW.tolist(), db.tolist()) for dW, db in grads if db is not None] == [
        ([[6.0, 3.0], [0.0, 0.0]], [3.0, 0.0]),
        ([[5.0, 0.0]], [1.0]),
    ]


def test_a_trace_holds_rows_at_the_widths_of_the_model():
    t = reference.trace(network(), X, LOSSES["mse"][1], regularizer=reference.l2(0.1))
    assert {layer: h.shape for layer, h in t.h.items()} == {1: (5, 4), 2: (5, 6), 3: (5, 5)}
    assert {layer: z.shape for layer, z in t.z.items()} == {1: (5, 6), 2: (5, 5), 3: (5, 3)}
    assert {layer: g.shape for layer, g in t.g.items()} == {1: (5, 6), 2: (5, 5), 3: (5, 3)}
    assert list(t.sigma_prime) == [1, 2]
    assert list(t.g) == list(t.dW) == list(t.db) == [1, 2, 3]


def test_a_trace_obeys_the_equations_and_agrees_with_forward():
    arrays = network()
    t = reference.trace(arrays, X, loss="output", activation="tanh")
    np.testing.assert_array_equal(t.h[1], X)
    np.testing.assert_array_equal(t.z[3], reference.forward(arrays, X, "tanh"))
    for layer, (W, b) in enumerate(arrays, start=1):
        assert_close(t.z[layer], t.h[layer] @ W.T + b, ROUNDING)
        assert_close(t.dW[layer], t.g[layer].T @ t.h[layer], ROUNDING)
        assert_close(t.db[layer], t.g[layer].sum(axis=0), ROUNDING)
    np.testing.assert_array_equal(t.h[3], np.tanh(t.z[2]))
    assert_close(t.sigma_prime[2], 1 - t.h[3] ** 2, ROUNDING)


def test_integer_data_gives_integers():
    arrays = [(W.round(), b.round()) for W, b in network()]
    value, grads = reference.value_and_grad(arrays, X.round(), loss="output")
    assert value == round(value)
    assert all((dW == dW.round()).all() for dW, _ in grads)


def test_inputs_are_not_changed():
    arrays, y = network(), LOSSES["mse"][1].copy()
    before = [a.copy() for pair in arrays for a in pair]
    reference.value_and_grad(arrays, X, y, weight=WEIGHT, regularizer=reference.l1(0.1))
    after = [a for pair in arrays for a in pair]
    assert all(map(np.array_equal, before, after))
    np.testing.assert_array_equal(y, LOSSES["mse"][1])


# Activations.

# sigma and sigma' at -1e4 and 1e4.
LIMITS = {
    "relu": ([0, 1e4], [0, 1]),
    "gelu": ([0, 1e4], [0, 1]),
    "silu": ([0, 1e4], [0, 1]),
    "tanh": ([-1, 1], [0, 0]),
    "sigmoid": ([0, 1], [0, 0]),
    "softplus": ([0, 1e4], [0, 1]),
    "identity": ([-1e4, 1e4], [1, 1]),
}


def test_activations_reach_their_limits_without_overflow(activation):
    sigma, sigma_prime = reference.ACTIVATIONS[activation]
    z = np.array([-1e4, 1e4])
    with np.errstate(all="raise", under="ignore"):
        assert (sigma(z).tolist(), sigma_prime(z).tolist()) == LIMITS[activation]


def test_sigma_prime_is_the_difference_of_sigma(activation):
    sigma, sigma_prime = reference.ACTIVATIONS[activation]
    z = np.linspace(-6.05, 6.05, 24)
    expected = (sigma(z + STEP) - sigma(z - STEP)) / (2 * STEP)
    assert_close(sigma_prime(z), expected, DIFFERENCE_TOLERANCE)


# From tables: the normal distribution's left tail, e^-40, and 4 e^-40.
@pytest.mark.parametrize(
    ("function", "z", "expected"),
    [
        (reference.ACTIVATIONS["gelu"][0], -10.0, -10.0 * 7.619853024160526e-24),
        (reference.ACTIVATIONS["sigmoid"][0], -40.0, 4.248354255291589e-18),
        (reference.ACTIVATIONS["sigmoid"][1], 40.0, 4.248354255291589e-18),
        (reference.ACTIVATIONS["softplus"][0], -40.0, 4.248354255291589e-18),
        (reference.ACTIVATIONS["tanh"][1], 20.0, 4 * 4.248354255291589e-18),
    ],
)
def test_small_values_keep_their_digits(function, z, expected):
    assert function(np.array([z]))[0] == pytest.approx(expected, rel=ROUNDING, abs=0)


def test_relu_has_derivative_zero_at_zero():
    assert reference.ACTIVATIONS["relu"][1](np.array([-0.0, 0.0])).tolist() == [0.0, 0.0]


def test_a_pair_of_functions_serves_as_activation():
    pair = (np.sin, np.cos)
    assert_gradients_are_differences(network(), LOSSES["mse"][1], activation=pair)


# Losses.


def loss_value(loss, z, y, **keywords):
    """Return the loss and its derivative by the outputs z [B, C], through an identity layer."""
    t = reference.trace([(np.eye(np.shape(z)[1]), None)], z, y, loss=loss, **keywords)
    return t.loss, t.g[1]


def test_mse_is_the_mean_over_samples_and_outputs():
    value, g = loss_value("mse", [[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]])
    assert value == (0 + 4 + 9 + 16) / 4
    assert g.tolist() == [[0.0, 1.0], [1.5, 2.0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_the_plain_definition(smoothing):
    z, y = RNG.normal(size=(4, 3)), [2, 0, 1, 1]
    expected = 0.0
    for row, label in zip(z, y, strict=True):
        for k in range(3):
            target = (1 - smoothing) * (k == label) + smoothing / 3
            expected -= target * math.log(math.exp(row[k]) / sum(map(math.exp, row))) / 4
    value, _ = loss_value(reference.cross_entropy(label_smoothing=smoothing), z, y)
    assert value == pytest.approx(expected, rel=ROUNDING)


def test_logistic_is_the_plain_definition():
    z, y = RNG.normal(size=(4, 3)), RNG.integers(2, size=(4, 3))
    p = 1 / (1 + np.exp(-z))
    value, _ = loss_value("logistic", z, y)
    assert value == pytest.approx(-np.where(y, np.log(p), np.log(1 - p)).mean(), rel=ROUNDING)


def test_output_and_cotangent_are_sums():
    z = [[1.0, 2.0], [3.0, 5.0]]
    assert loss_value("output", z, None)[0] == 11.0
    value, g = loss_value(reference.output(component=1), z, None)
    assert (value, g.tolist()) == (7.0, [[0.0, 1.0], [0.0, 1.0]])
    value, g = loss_value("cotangent", z, [[1.0, -1.0], [2.0, 0.0]])
    assert (value, g.tolist()) == (5.0, [[1.0, -1.0], [2.0, 0.0]])


def test_the_cotangent_keyword_is_the_loss_cotangent():
    v = LOSSES["cotangent"][1]
    by_keyword = reference.trace(network(), X, cotangent=v)
    by_loss = reference.trace(network(), X, v, loss=reference.cotangent())
    assert by_keyword.loss == by_loss.loss
    np.testing.assert_array_equal(by_keyword.g[3], v)
    np.testing.assert_array_equal(by_keyword.dW[1], by_loss.dW[1])


@pytest.mark.parametrize("loss", ["mse", "logistic"])
def test_targets_of_one_output_may_be_a_vector(loss):
    y = np.array([0.0, 1.0, 1.0])
    flat, column = (loss_value(loss, [[0.5], [1.0], [2.0]], a) for a in (y, y[:, None]))
    assert flat[0] == column[0]
    np.testing.assert_array_equal(flat[1], column[1])


# Logits (1e4, -1e4, 0): softmax is (1, 0, 0), and -log softmax is (0, 2e4, 1e4).
@pytest.mark.parametrize(("label", "expected"), [(0, 0.0), (1, 2e4), (2, 1e4)])
def test_cross_entropy_is_exact_at_extreme_logits(label, expected):
    with np.errstate(all="raise", under="ignore"):
        value, g = loss_value("cross_entropy", [[1e4, -1e4, 0.0]], [label])
    assert value == expected
    assert g[0].tolist() == [1 - (label == 0), -(label == 1), -(label == 2)]


def test_each_sample_has_its_own_largest_logit():
    with np.errstate(all="raise", under="ignore"):
        value, _ = loss_value("cross_entropy", [[1e4, 0.0, 0.0], [-1e4, -1e4, -1e4]], [0, 1])
    assert value == pytest.approx(math.log(3) / 2, rel=ROUNDING)


@pytest.mark.parametrize("z", [-1e4, 1e4])
@pytest.mark.parametrize("label", [0, 1])
def test_logistic_is_exact_at_extreme_logits(z, label):
    with np.errstate(all="raise", under="ignore"):
        value, g = loss_value("logistic", [[z]], [label])
    wrong = (z > 0) != label
    assert value == 1e4 * wrong
    assert g.item() == (z > 0) - label


def test_a_confident_right_logistic_output_keeps_its_digits():
    value, g = loss_value("logistic", [[40.0]], [1])
    assert value == pytest.approx(4.248354255291589e-18, rel=ROUNDING, abs=0)
    assert g.item() == pytest.approx(-4.248354255291589e-18, rel=ROUNDING, abs=0)


def test_weight_zero_is_a_row_left_out_and_weight_three_a_row_repeated(loss_and_y):
    loss, y = loss_and_y
    rows = [0, 2, 2, 2, 3, 4]
    weighted = reference.value_and_grad(network(), X, y, loss=loss, weight=[1, 0, 3, 1, 1])
    repeated = reference.value_and_grad(
        network(), X[rows], None if y is None else y[rows], loss=loss
    )
    assert_close(weighted[0], repeated[0], ROUNDING)
    for (dW, db), (expected_dW, expected_db) in zip(weighted[1], repeated[1], strict=True):
        assert_close(dW, expected_dW, ROUNDING)
        assert_close(db, expected_db, ROUNDING)


def test_an_object_stands_for_its_reference():
    y = LOSSES["mse"][1]
    wrapped = reference.value_and_grad(
        network(),
        X,
        y,
        loss=SimpleNamespace(reference=reference.mse()),
        regularizer=SimpleNamespace(reference=reference.l2(0.1)),
    )
    plain = reference.value_and_grad(network(), X, y, regularizer=reference.l2(0.1))
    assert wrapped[0] == plain[0]


def test_a_function_of_the_user_is_a_mean():
    def fourth_power(z, y):
        return ((z - y.T) ** 4).sum(axis=0), 4 * (z - y.T) ** 3

    y = 0.1 * LOSSES["mse"][1]
    arrays = [(0.3 * W, b) for W, b in network((4, 3))]
    z = reference.forward(arrays, X)
    value, _ = reference.value_and_grad(arrays, X, y, loss=fourth_power)
    assert value == pytest.approx(((z - y) ** 4).sum() / SAMPLES, rel=ROUNDING)
    assert_gradients_are_differences(arrays, y, loss=fourth_power)


# Regularisers.

ARRAYS = [([[1.0, -2.0], [0.0, 3.0]], [10.0, 10.0]), ([[4.0, -1.0]], None)]


@pytest.mark.parametrize(
    ("regularizer", "expected"),
    [
        (reference.l2(0.5), 0.5 * 31),
        (reference.l1(0.5), 0.5 * 11),
        (reference.elastic_net(0.5, 0.25), 0.5 * (0.25 * 11 + 0.75 * 31)),
    ],
)
def test_penalties_are_of_weights_and_not_biases(regularizer, expected):
    t = reference.trace(ARRAYS, [[1.0, 1.0]], loss="output", regularizer=regularizer)
    value, grads = reference.value_and_grad(
        ARRAYS, [[1.0, 1.0]], loss="output", regularizer=regularizer
    )
    assert t.penalty == expected
    assert value == t.loss + t.penalty
    plain = reference.trace(ARRAYS, [[1.0, 1.0]], loss="output")
    np.testing.assert_array_equal(grads[0][1], plain.db[1])


def test_penalties_count_biases_if_asked(bias):
    value, gradients = reference.elastic_net(0.5, 0.25, biases=True)(ARRAYS)
    assert value == 0.5 * (0.25 * (11 + 20) + 0.75 * (31 + 200))
    assert gradients[1][1] is None
    penalty = reference.penalty(l1=0.1, l2=0.2, biases=True)
    assert_gradients_are_differences(network(bias=bias), LOSSES["mse"][1], regularizer=penalty)


def test_l1_has_derivative_zero_at_zero():
    _, gradients = reference.l1(2.0)(ARRAYS)
    assert np.asarray(gradients[0][0]).tolist() == [[2.0, -2.0], [0.0, 2.0]]


def test_a_regularizer_of_the_user_may_reach_biases():
    def bias_penalty(arrays):
        value = sum(float((b**2).sum()) for _, b in arrays)
        return value, [(None, 2 * b) for _, b in arrays]

    assert_gradients_are_differences(network(), LOSSES["mse"][1], regularizer=bias_penalty)


# Bad input.

Y = LOSSES["mse"][1]
SMALL = [(np.ones((3, 4)), None)]


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"activation": "rleu"}, "activation must .* got activation='rleu'. Use"),
        ({"activation": (np.sin,)}, "activation must .* got activation=.*Use"),
        ({"activation": (np.sin, np.sum)}, r"sigma_prime\(z\) must .* got shape \(\)"),
        ({"loss": "hinge"}, "loss must be one of mse, .* got loss='hinge'. Use"),
        ({"loss": lambda z, y: (z, z)}, r"loss of each sample must .*\(5,\): got shape \(3, 5\)"),
        ({"loss": lambda z, y: (z[0], z.T)}, r"derivative of the loss must .*got shape \(5, 3\)"),
        ({"loss": reference.output(3)}, r"component must be 0 \.\. 2.* got component=3"),
        ({"y": None}, "y must have shape .* got None"),
        ({"y": Y[:4]}, r"y must have shape \(5, 3\): got shape \(4, 3\)"),
        ({"y": Y[:, 0]}, r"y must have shape \(5, 3\): got shape \(5,\)"),
        ({"y": Y, "cotangent": Y}, "cotangent must come without y"),
        ({"y": None, "cotangent": Y[0]}, r"cotangent must have shape \(5, 3\): got shape \(3,\)"),
        ({"loss": "cross_entropy"}, r"y must be integer .*got shape \(5, 3\), dtype float64"),
        ({"loss": "cross_entropy", "y": [0, 1, 2, 3, 0]}, r"labels 0 \.\. 2: got y\[3\]=3"),
        ({"loss": "cross_entropy", "y": [0, -1, 2, 1, 0]}, r"labels 0 \.\. 2: got y\[1\]=-1"),
        ({"loss": "logistic", "y": np.full((5, 3), 0.5)}, "y must be 0 or 1: got an entry y=0.5"),
        ({"weight": [1.0, 2.0]}, r"weight must have shape \(5,\): got shape \(2,\)"),
        ({"weight": np.zeros(5)}, r"weight must have a positive sum .*sum\(weight\)=0.0"),
        ({"x": X[:, :3]}, r"x must be \[B, d_0=4\] .* got shape \(5, 3\)"),
        ({"x": X[0]}, r"x must be .* got shape \(4,\)"),
        ({"x": X[:0]}, r"x must be .* got shape \(0, 4\)"),
        ({"arrays": []}, "arrays must hold one layer or more"),
        ({"arrays": [(np.ones(4), None)]}, r"W_1 must be \[d_1, d_0\]: got shape \(4,\)"),
        ({"arrays": SMALL * 2}, r"W_2 must be .* got shape \(3, 4\), W_1 of shape \(3, 4\)"),
        ({"arrays": [(np.ones((3, 4)), [0.0])]}, r"b_1 must have shape \(3,\): got shape \(1,\)"),
        (
            {"regularizer": lambda arrays: (0.0, [(np.ones(3), None)])},
            r"dR/dW_1 must have shape \(3, 4\): got shape \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused_with_its_name_and_value(keywords, text):
    layers = SMALL if "activation" not in keywords else [*SMALL, (np.ones((3, 3)), None)]
    arguments = {"arrays": layers, "x": X, "y": Y} | keywords
    with pytest.raises(ValueError, match=text):
        reference.value_and_grad(**arguments)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: reference.l2(-1.0), "c must be .* got c=-1.0"),
        (lambda: reference.l1(math.inf), "c must be .* got c=inf"),
        (lambda: reference.elastic_net(1.0, 1.5), "ratio must .* from 0 to 1.0: got ratio=1.5"),
        (lambda: reference.penalty(l2=math.nan), "l2 must be .* got l2=nan"),
        (lambda: reference.cross_entropy(-0.1), "label_smoothing must .* got label_smoothing=-0.1"),
    ],
)
def test_numbers_out_of_range_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()


IMPORT_ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("oracle", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(sorted({name.split(".")[0] for name in sys.modules} & {"jax", "jaxlib", "scipy", "tpmlp"}))
"""


def test_the_oracle_needs_neither_jax_nor_the_package():
    command = [sys.executable, "-c", IMPORT_ALONE, reference.__file__]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
