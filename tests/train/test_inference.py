"""predict and evaluate against the reference, in batches that nothing divides."""

from typing import Any, cast

import jax
import jax.monitoring
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of, relative_error
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.train.inference import evaluate, predict

SIZES = ((1, 1, 1), (2, 2, 2), (1, 5, 1))
MODEL = tpmlp.MLP((6, 9, 4), activation="tanh")
RNG = np.random.default_rng(0)
ARRAYS = [(RNG.normal(size=(o, i)), RNG.normal(size=o)) for i, o in ((6, 9), (9, 4))]
X = RNG.normal(size=(23, 6))
LABELS = RNG.integers(0, 4, 23)
VALUES = RNG.normal(size=(23, 4))
WEIGHT = np.where(np.arange(23) % 7 == 3, 0, RNG.uniform(0.5, 2, 23))
OUTPUTS = reference.forward(ARRAYS, X, "tanh")


@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_are_the_reference_s_whatever_the_batch(sizes: tuple[int, int, int]) -> None:
    mesh = mesh_of(sizes)
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh)
    for batch_size in (None, 5):
        outputs = predict(MODEL, params, X, mesh=mesh, batch_size=batch_size)
        assert relative_error(outputs, OUTPUTS) <= FLOAT64


def test_classes_and_probabilities_follow_from_the_outputs() -> None:
    mesh = mesh_of((1, 5, 1))
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh)
    classes = predict(MODEL, params, X, mesh=mesh, kind="classes")
    np.testing.assert_array_equal(classes, OUTPUTS.argmax(axis=1))
    probabilities = predict(MODEL, params, X, mesh=mesh, kind="probabilities")
    softmax = np.exp(OUTPUTS) / np.exp(OUTPUTS).sum(axis=1, keepdims=True)
    assert relative_error(probabilities, softmax) <= FLOAT64


def test_one_output_means_yes_or_no() -> None:
    mesh = mesh_of((1, 1, 2))
    model = tpmlp.MLP((2, 1), bias=False)
    params = tpmlp.from_numpy(model, [(np.array([[500.0, -500.0]]), None)], mesh)
    x = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert predict(model, params, x, mesh=mesh, kind="classes").tolist() == [1, 0, 0]
    probabilities = predict(model, params, x, mesh=mesh, kind="probabilities")
    assert probabilities.tolist() == [[1.0], [0.0], [0.5]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_loss_and_accuracy_are_those_of_the_whole_set(
    sizes: tuple[int, int, int], loss: str
) -> None:
    mesh = mesh_of(sizes)
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh)
    y = LABELS if loss == "cross_entropy" else VALUES
    R = tpmlp.l2(0.1)
    result = evaluate(
        MODEL, params, (X, y, WEIGHT), loss=loss, mesh=mesh, regularizer=R, batch_size=5
    )
    wanted = reference.trace(
        ARRAYS, X, y, activation="tanh", loss=loss, weight=WEIGHT, regularizer=R
    )
    assert relative_error(result.loss, wanted.loss) <= FLOAT64
    assert relative_error(result.penalty, wanted.penalty) <= FLOAT64
    assert result.num_samples == 20
    if loss == "mse":
        assert result.accuracy is None
    else:
        right = np.average(OUTPUTS.argmax(axis=1) == LABELS, weights=WEIGHT)
        assert relative_error(result.accuracy, right) <= FLOAT64


def test_a_loss_that_sums_is_summed_over_batches() -> None:
    mesh = mesh_of((2, 2, 2))
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh)
    result = evaluate(MODEL, params, (X, None), loss="output", mesh=mesh, batch_size=5)
    assert relative_error(result.loss, OUTPUTS.sum()) <= FLOAT64


def test_a_second_call_compiles_nothing() -> None:
    mesh = mesh_of((1, 5, 1))
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh)
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def both(rows: int) -> None:
        predict(MODEL, params, X[:rows], mesh=mesh, batch_size=8)
        evaluate(MODEL, params, (X[:rows], LABELS[:rows]), loss="cross_entropy", mesh=mesh,
                 batch_size=8)  # fmt: skip

    both(8)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        both(23)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_bad_arguments_are_refused() -> None:
    mesh = mesh_of((1, 5, 1))
    params = tpmlp.from_numpy(MODEL, ARRAYS, mesh)
    with pytest.raises(ValueError, match=r"kind must be one of .*got kind='label'"):
        predict(MODEL, params, X, mesh=mesh, kind=cast(Any, "label"))
    with pytest.raises(ValueError, match=r"batch_size must be a positive integer: got .*=0"):
        predict(MODEL, params, X, mesh=mesh, batch_size=0)
    with pytest.raises(ValueError, match=r"data: x must have shape \[B, d_0\] with d_0=6"):
        predict(MODEL, params, X[:, :5], mesh=mesh)
    with pytest.raises(ValueError, match=r"data: labels y must be in 0 .. 3: got 4 in row 22"):
        evaluate(MODEL, params, (X, [0] * 22 + [4]), loss="cross_entropy", mesh=mesh)
    with pytest.raises(ValueError, match=r"tpmlp.reshard"):
        predict(MODEL, params, X, mesh=mesh_of((1, 1, 1)))
