"""scikit-learn as a second, independent oracle: its MLP's loss and gradient on given weights.

Its objectives are ours up to constants. With n the sum of the sample weights, C the outputs,
D our data loss, S the sum of squared weights and alpha its regularisation,

    kind             its loss                     its gradient, of
    mse              D / 2 + alpha S / (2n)       (C / 2) D + alpha S / (2n)
    cross_entropy    D     + alpha S / (2n)       the same
    logistic         C D   + alpha S / (2n)       the same

(its squared loss averages over the outputs, its gradient sums over them: for C > 1 the one is not
the derivative of the other). Each line has the form f D + alpha S / (2n): with alpha f in place of
alpha it is f times our objective D + alpha S / (2n), whose regulariser is l2(alpha / (2n)).
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.neural_network import MLPClassifier, MLPRegressor

Array = NDArray[np.float64]
Arrays = list[tuple[Array, Array | None]]
Kind = Literal["mse", "cross_entropy", "logistic"]

ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "sigmoid": "logistic", "identity": "identity"}
OUT_ACTIVATIONS = {"mse": "identity", "cross_entropy": "softmax", "logistic": "logistic"}


def sklearn_loss_and_grads(
    arrays: Arrays,
    x: ArrayLike,
    y: ArrayLike,
    *,
    kind: Kind,
    activation: str,
    alpha: float = 0.0,
    weight: ArrayLike | None = None,
) -> tuple[float, Arrays]:
    """Return scikit-learn's objective and its gradient, in our units and shapes.

    Args:
        arrays: one (W_l [d_l, d_{l-1}], b_l [d_l] or None) for each layer.
        x: inputs as rows, [B, d_0].
        y: integer labels [B] for "cross_entropy"; else [B, C], or [B] when C = 1.
        kind: the loss, by our name: the regressor, the multi-class, or the binary and multi-label
            classifier.
        activation: our name of one that scikit-learn has.
        alpha: its regularisation: ours is l2(alpha / (2n)), n the sum of the weights or B.
        weight: weight of each sample, [B].
    """
    C = len(arrays[-1][0])
    loss_factor, gradient_factor = {
        "mse": (1 / 2, C / 2),
        "cross_entropy": (1, 1),
        "logistic": (C, C),
    }[kind]
    labels = np.eye(C)[np.asarray(y)] if kind == "cross_entropy" else np.reshape(y, (-1, C))
    data = np.asarray(x), labels, None if weight is None else np.asarray(weight)
    loss, _, _ = _backprop(_model(arrays, kind, activation, alpha * loss_factor), *data)
    _, dW, db = _backprop(_model(arrays, kind, activation, alpha * gradient_factor), *data)
    grads: Arrays = [
        (dw.T / gradient_factor, None if b is None else d / gradient_factor)
        for dw, d, (_, b) in zip(dW, db, arrays, strict=True)
    ]
    return float(loss / loss_factor), grads


def _model(
    arrays: Arrays, kind: Kind, activation: str, alpha: float
) -> MLPClassifier | MLPRegressor:
    """Return a model as if fitted to these weights; a missing bias is 0."""
    model = (MLPRegressor if kind == "mse" else MLPClassifier)(
        hidden_layer_sizes=[len(W) for W, _ in arrays[:-1]],
        activation=ACTIVATIONS[activation],
        alpha=alpha,
    )
    model.coefs_ = [np.array(W).T for W, _ in arrays]
    model.intercepts_ = [np.zeros(len(W)) if b is None else np.array(b) for W, b in arrays]
    model.n_layers_ = len(arrays) + 1
    model.n_outputs_ = len(arrays[-1][0])
    model.out_activation_ = OUT_ACTIVATIONS[kind]
    return model


def _backprop(
    model: MLPClassifier | MLPRegressor, x: Array, y: Array, weight: Array | None
) -> tuple[float, list[Array], list[Array]]:
    """Call scikit-learn's own backward pass, with the lists that it fills in."""
    layers = len(model.coefs_)
    activations, deltas = [x] + [None] * layers, [None] * layers
    dW, db = [None] * layers, [None] * layers
    return model._backprop(x, y, weight, activations, deltas, dW, db)
