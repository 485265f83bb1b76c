"""The reference equals scikit-learn's MLPRegressor and MLPClassifier on the same weights.

scikit-learn was written by others from the same mathematics, so a failure here means a wrong
factor, a wrong mean or a wrong regulariser in the reference (or a changed one in scikit-learn);
slips common to forward and backward, which finite differences cannot see, fail here.
"""

from itertools import pairwise

import numpy as np
import pytest

from tests.sklearn_oracle import sklearn_loss_and_grads
from tpmlp import reference

# Two float64 implementations of sums of at most ~100 terms over 4 layers agree to about 1e-14.
TOLERANCE = 1e-10

SAMPLES = 9
CASES = {
    "regression with one output": ("mse", (5, 7, 1)),
    "regression with three outputs": ("mse", (5, 7, 6, 3)),
    "linear regression": ("mse", (5, 2)),
    "multi-class": ("cross_entropy", (5, 7, 6, 4)),
    "softmax regression": ("cross_entropy", (5, 3)),
    "binary": ("logistic", (5, 7, 6, 1)),
    "multi-label": ("logistic", (5, 7, 3)),
}


# (biases, weight of each sample, alpha)
SETTINGS = {
    "plain": (True, None, 0.0),
    "l2": (True, None, 0.3),
    "weighted, l2": (True, np.arange(SAMPLES) % 4 / 2.0, 0.3),
    "no biases, l2": (False, None, 0.3),
}


def problem(loss, widths, bias):
    """Return random (arrays, x, y) for a loss and widths d_0 .. d_{L+1}."""
    rng = np.random.default_rng(len(widths))
    arrays = [
        (rng.normal(size=(o, i)) / np.sqrt(i), rng.normal(size=o) if bias else None)
        for i, o in pairwise(widths)
    ]
    x, shape = rng.normal(size=(SAMPLES, widths[0])), (SAMPLES, widths[-1])
    if loss == "cross_entropy":
        return arrays, x, rng.integers(widths[-1], size=SAMPLES)
    y = rng.normal(size=shape) if loss == "mse" else rng.integers(2, size=shape)
    return arrays, x, y[:, 0] if widths[-1] == 1 else y


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


@pytest.fixture(params=["relu", "tanh", "sigmoid", "identity"])
def activation(request):
    return request.param


@pytest.fixture
def theirs_and_ours(case, setting, activation):
    (loss, widths), (bias, weight, alpha) = case, setting
    arrays, x, y = problem(loss, widths, bias)
    theirs = sklearn_loss_and_grads(
        arrays, x, y, kind=loss, activation=activation, alpha=alpha, weight=weight
    )
    n = SAMPLES if weight is None else weight.sum()
    penalty = reference.l2(alpha / (2 * n))
    ours = reference.value_and_grad(
        arrays, x, y, activation=activation, loss=loss, weight=weight, regularizer=penalty
    )
    return theirs, ours


def test_the_objective_equals_theirs(theirs_and_ours):
    (theirs, _), (ours, _) = theirs_and_ours
    assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_the_weight_gradients_equal_theirs(theirs_and_ours):
    (_, theirs), (_, ours) = theirs_and_ours
    for (dW, _), (expected, _) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(dW, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_the_bias_gradients_equal_theirs(theirs_and_ours):
    (_, theirs), (_, ours) = theirs_and_ours
    for (_, db), (_, expected) in zip(ours, theirs, strict=True):
        assert (db is None) == (expected is None)
        if expected is not None:
            np.testing.assert_allclose(db, expected, rtol=0, atol=TOLERANCE * abs(expected).max())
