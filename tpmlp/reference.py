"""The oracle: the same model, objective and recursion on one device, in NumPy float64.

Everything sharded in this package is compared with this file, so it shares no code with the rest
of the package, imports no JAX, and is written as the mathematics is written. Read it beside the
kernel: the kernel is these lines plus layouts and collectives.

    h_1 = x                                  g_{L+1} = d loss / d z_{L+1}
    z_l = W_l h_l + b_l                      g_l     = (W_{l+1}^T g_{l+1}) * sigma'(z_l)
    h_{l+1} = sigma(z_l)    l = 1 .. L       dW_l    = g_l h_l^T
    output  = z_{L+1}                        db_l    = g_l summed over the batch

h_l is the *input* of layer l and the last layer has no activation. Inside, samples are columns:
h_l is [d_{l-1}, B]; users pass and get rows, [B, d], and the transposes stand at that boundary
only. W, b, h, z, sigma_prime, g are dictionaries keyed by l, as in the equations.

A loss maps (z [C, B], y) to (loss of each sample [B], its derivative by z [C, B]). It knows nothing
of the batch: weights and the mean's division are applied to both in one place, so that a padded row
needs only weight 0. A regulariser maps arrays to (R, [(dR/dW_l, dR/db_l)]), None for a zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Elementwise = Callable[[Array], Array]
Activation = str | tuple[Callable[[Array], ArrayLike], Callable[[Array], ArrayLike]]
LossFunction = Callable[[Array, Any], tuple[Array, Array]]
Arrays = Sequence[tuple[ArrayLike, ArrayLike | None]]
Layers = list[tuple[Array, Array | None]]
Regularizer = Callable[[Arrays], tuple[float, Sequence[tuple[Any, Any]]]]
ByLayer = dict[int, Array]

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _sigmoid(z: Array) -> Array:
    """Evaluate 1 / (1 + e^-z) from e^-|z|, which cannot overflow."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0.0, 1.0, e) / (1.0 + e)


def _normal_cdf(z: Array) -> Array:
    """Evaluate (1 + erf(z / sqrt 2)) / 2 by erfc, whose left tail does not cancel to 0."""
    return 0.5 * _erfc(-z / math.sqrt(2.0))


def _normal_pdf(z: Array) -> Array:
    return np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


# 1 - sigmoid(z) is written sigmoid(-z), and 1 - tanh(z)^2 as 4 sigmoid(2z) sigmoid(-2z): equal,
# but the differences lose all their digits where the unit saturates (tanh: from |z| = 19 on).
ACTIVATIONS: dict[str, tuple[Elementwise, Elementwise]] = {
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0.0).astype(np.float64)),
    "gelu": (lambda z: z * _normal_cdf(z), lambda z: _normal_cdf(z) + z * _normal_pdf(z)),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1.0 + z * _sigmoid(-z))),
    "tanh": (np.tanh, lambda z: 4.0 * _sigmoid(2.0 * z) * _sigmoid(-2.0 * z)),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z)),
    "softplus": (lambda z: np.logaddexp(z, 0.0), _sigmoid),
    "identity": (lambda z: z, np.ones_like),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """The loss of each sample, and how samples become one number.

    Attributes:
        name: what users call it.
        function: (z [C, B], y) -> (loss of each sample [B], its derivative by z [C, B]).
        reduction: "mean" is sum(weight * loss) / sum(weight), "sum" is sum(weight * loss).
    """

    name: str
    function: LossFunction
    reduction: Literal["mean", "sum"] = "mean"

    def __call__(self, z: Array, y: Any) -> tuple[Array, Array]:
        """Return (loss of each sample [B], its derivative by z [C, B])."""
        return self.function(z, y)


def mse() -> Loss:
    """Mean over samples and outputs of (z - y)^2; y is [B, C], or [B] when C = 1.

    Examples:
        >>> per_sample, gradient = mse()(np.array([[3.0], [5.0]]), [[1.0, 1.0]])
        >>> per_sample.tolist(), gradient.tolist()
        ([10.0], [[2.0], [4.0]])
    """

    def function(z: Array, y: Any) -> tuple[Array, Array]:
        error = z - _targets("y", y, z)
        return (error**2).mean(axis=0), 2.0 * error / len(z)

    return Loss(name="mse", function=function)


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Mean over samples of -sum_k t_k log softmax(z)_k, in nats; y is [B], integers 0 .. C-1.

    The target is t = (1 - a) onehot(y) + a / C, a = label_smoothing. As t sums to 1, the derivative
    is softmax(z) - t. The largest logit is subtracted first, so that no exp overflows.
    """
    _check_number("label_smoothing", label_smoothing, at_most=1.0)

    def function(z: Array, y: Any) -> tuple[Array, Array]:
        t = (1.0 - label_smoothing) * _one_hot(y, z) + label_smoothing / len(z)
        z = z - z.max(axis=0)
        log_softmax = z - np.log(np.exp(z).sum(axis=0))
        return -(t * log_softmax).sum(axis=0), np.exp(log_softmax) - t

    return Loss(name="cross_entropy", function=function)


def logistic() -> Loss:
    """Mean over samples and outputs of log(1 + e^z) - y z; y in {0, 1}, [B, C], or [B] when C = 1.

    Evaluated as log(1 + e^{sz}), s = 1 - 2y: equal for these y, but where a confident output is
    right, log(1 + e^z) - y z and its derivative sigmoid(z) - y are differences of equal numbers.
    """

    def function(z: Array, y: Any) -> tuple[Array, Array]:
        s = 1.0 - 2.0 * _binary(_targets("y", y, z))
        return np.logaddexp(s * z, 0.0).mean(axis=0), s * _sigmoid(s * z) / len(z)

    return Loss(name="logistic", function=function)


def output(component: int | None = None) -> Loss:
    """Sum over samples of all outputs, or of one: g_{L+1} = 1 there, else 0. y is not used."""

    def function(z: Array, y: Any) -> tuple[Array, Array]:
        if component is not None and not 0 <= component < len(z):
            raise ValueError(
                f"component must be 0 .. {len(z) - 1}, an output: got component={component}. "
                "Use one of these, or None for the sum of all outputs."
            )
        g = np.zeros_like(z)
        g[slice(None) if component is None else component] = 1.0
        return (g * z).sum(axis=0), g

    return Loss(name="output", function=function, reduction="sum")


def cotangent() -> Loss:
    """Sum over samples of sum_k v_k z_k, where y is the cotangent v [B, C]: g_{L+1} = v."""

    def function(z: Array, y: Any) -> tuple[Array, Array]:
        v = _targets("cotangent", y, z)
        return (v * z).sum(axis=0), v

    return Loss(name="cotangent", function=function, reduction="sum")


LOSSES: dict[str, Callable[[], Loss]] = {
    "mse": mse,
    "cross_entropy": cross_entropy,
    "logistic": logistic,
    "output": output,
    "cotangent": cotangent,
}


def l2(c: float, *, biases: bool = False) -> Regularizer:
    """R = c sum_l |W_l|^2: weights, and biases only if asked."""
    return elastic_net(c, 0.0, biases=biases)


def l1(c: float, *, biases: bool = False) -> Regularizer:
    """R = c sum_l |W_l|: weights, and biases only if asked."""
    return elastic_net(c, 1.0, biases=biases)


def elastic_net(c: float, ratio: float, *, biases: bool = False) -> Regularizer:
    """R = ratio l1(c) + (1 - ratio) l2(c).

    Examples:
        >>> R, gradients = elastic_net(0.5, 0.25)([([[2.0, -4.0]], [9.0])])
        >>> R, gradients[0][0].tolist(), gradients[0][1]
        (8.25, [[1.625, -3.125]], None)
    """
    _check_number("c", c)
    _check_number("ratio", ratio, at_most=1.0)
    return penalty(l1=ratio * c, l2=(1.0 - ratio) * c, biases=biases)


def penalty(*, l1: float = 0.0, l2: float = 0.0, biases: bool = False) -> Regularizer:
    """R = l1 sum |w| + l2 sum w^2 over the weights, and the biases if asked; d|w|/dw = 0 at 0."""
    _check_number("l1", l1)
    _check_number("l2", l2)

    def of_array(w: ArrayLike | None) -> tuple[float, Array | None]:
        if w is None:
            return 0.0, None
        w = np.asarray(w, dtype=np.float64)
        return float((l1 * np.abs(w) + l2 * w**2).sum()), l1 * np.sign(w) + 2.0 * l2 * w

    def regularizer(arrays: Arrays) -> tuple[float, list[tuple[Array | None, Array | None]]]:
        terms = [(of_array(W), of_array(b if biases else None)) for W, b in arrays]
        R = sum(R_W + R_b for (R_W, _), (R_b, _) in terms)
        return R, [(dR_dW, dR_db) for (_, dR_dW), (_, dR_db) in terms]

    return regularizer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """Everything one step computes, keyed by l = 1 .. L+1, samples as rows.

    Attributes:
        h: input of layer l, [B, d_{l-1}]; h[1] is x.
        z: output of layer l before the activation, [B, d_l].
        sigma_prime: sigma'(z_l), [B, d_l], l = 1 .. L.
        g: derivative of the objective by z_l, [B, d_l]: weights and the mean's division included.
        dW: derivative of the objective by W_l, R included, [d_l, d_{l-1}].
        db: derivative of the objective by b_l, R included, [d_l]; None for a layer without bias.
        loss: the data loss, without R.
        penalty: R.
    """

    h: ByLayer
    z: ByLayer
    sigma_prime: ByLayer
    g: ByLayer
    dW: ByLayer
    db: dict[int, Array | None]
    loss: float
    penalty: float


def forward(arrays: Arrays, x: ArrayLike, activation: Activation = "relu") -> Array:
    """Return the outputs z_{L+1} as rows, [B, d_out]; arguments as in `value_and_grad`.

    Examples:
        >>> forward([([[1, 1]], [0]), ([[2]], [5])], [[3, 4], [-3, -4]]).tolist()
        [[19.0], [5.0]]
    """
    sigma, _ = get_activation(activation)
    layers = _layers(arrays)
    _, z = _forward(layers, _columns(x, layers), sigma)
    return z[len(layers)].T


def value_and_grad(
    arrays: Arrays,
    x: ArrayLike,
    y: Any = None,
    *,
    activation: Activation = "relu",
    loss: Any = "mse",
    weight: ArrayLike | None = None,
    regularizer: Any = None,
    cotangent: ArrayLike | None = None,
) -> tuple[float, Layers]:
    """Return the objective, loss + R, and its derivative by every W_l and b_l.

    Args:
        arrays: one (W_l [d_l, d_{l-1}], b_l [d_l] or None) for each layer l = 1 .. L+1.
        x: inputs as rows, [B, d_0].
        y: what the loss compares the outputs with; None for "output" and with `cotangent`.
        activation: a name in ACTIVATIONS, or a pair of functions (sigma, sigma_prime).
        loss: a name in LOSSES, a Loss, a function like one (a mean, unless its attribute
            `reduction` is "sum"), or an object whose attribute `reference` is such a loss.
        weight: weight of each sample, [B]; 1 where None.
        regularizer: a function of arrays giving (R, [(dR/dW_l, dR/db_l)]), None for a zero, or
            an object whose attribute `reference` is such a function; R = 0 where None.
        cotangent: v [B, d_out], taken as g_{L+1} in place of any loss and y.

    Returns:
        loss + R, and [(dW_l, db_l)] shaped like arrays, db_l None where b_l is.

    Raises:
        ValueError: a name is unknown, shapes do not fit together, or y holds no valid labels.

    Examples:
        (W x - y)^2 at W = 1, x = 3, y = 2 has the derivative 2 * 1 * 3.

        >>> value, grads = value_and_grad([([[1.0]], None)], [[3.0]], [2.0])
        >>> value, grads[0][0].tolist(), grads[0][1]
        (1.0, [[6.0]], None)
    """
    t = trace(
        arrays,
        x,
        y,
        activation=activation,
        loss=loss,
        weight=weight,
        regularizer=regularizer,
        cotangent=cotangent,
    )
    return t.loss + t.penalty, [(t.dW[layer], t.db[layer]) for layer in t.dW]


def trace(
    arrays: Arrays,
    x: ArrayLike,
    y: Any = None,
    *,
    activation: Activation = "relu",
    loss: Any = "mse",
    weight: ArrayLike | None = None,
    regularizer: Any = None,
    cotangent: ArrayLike | None = None,
) -> Trace:
    """Return every h_l, z_l, sigma'(z_l), g_l, dW_l, db_l; arguments as in `value_and_grad`.

    Examples:
        The derivative of the output itself, g_{L+1} = 1, through two units of which one is off:

        >>> t = trace([([[1.0], [-1.0]], None), ([[2.0, 3.0]], None)], [[5.0]], loss="output")
        >>> t.z[1].tolist(), t.sigma_prime[1].tolist(), t.g[2].tolist(), t.g[1].tolist()
        ([[5.0, -5.0]], [[1.0, 0.0]], [[1.0]], [[2.0, 0.0]])
    """
    sigma, derivative = get_activation(activation)
    layers = _layers(arrays)
    h, z = _forward(layers, _columns(x, layers), sigma)
    sigma_prime = {layer: derivative(z[layer]) for layer in range(1, len(layers))}
    value, g_last = _objective(*_loss_and_target(loss, y, cotangent), z[len(layers)], weight)
    g = _backward(layers, sigma_prime, g_last)
    dW = {layer: g[layer] @ h[layer].T for layer in h}
    db = {layer: g[layer].sum(axis=1) for layer in h}
    R, dR = _penalty(regularizer, layers)
    return Trace(
        h=_rows(h),
        z=_rows(z),
        sigma_prime=_rows(sigma_prime),
        g=_rows(g),
        dW={layer: dW[layer] + dR_dW for layer, (dR_dW, _) in dR.items()},
        db={layer: None if d is None else db[layer] + d for layer, (_, d) in dR.items()},
        loss=value,
        penalty=R,
    )


def _forward(layers: Layers, x: Array, sigma: Elementwise) -> tuple[ByLayer, ByLayer]:
    """z_l = W_l h_l + b_l and h_{l+1} = sigma(z_l); the last layer has no activation."""
    h, z = {1: x}, {}
    for layer, (W, b) in enumerate(layers, start=1):
        z[layer] = W @ h[layer] if b is None else W @ h[layer] + b[:, None]
        if layer < len(layers):
            h[layer + 1] = sigma(z[layer])
    return h, z


def _backward(layers: Layers, sigma_prime: ByLayer, g_last: Array) -> ByLayer:
    """g_l = (W_{l+1}^T g_{l+1}) * sigma'(z_l), from g_{L+1} down to g_1."""
    W = {layer: weights for layer, (weights, _) in enumerate(layers, start=1)}
    L = len(layers) - 1
    g = {L + 1: g_last}
    for layer in range(L, 0, -1):
        g[layer] = (W[layer + 1].T @ g[layer + 1]) * sigma_prime[layer]
    return g


def _objective(
    loss: LossFunction, y: Any, z: Array, weight: ArrayLike | None
) -> tuple[float, Array]:
    """Return the weighted mean or sum of the samples' losses, and g_{L+1}, its derivative by z."""
    per_sample, gradient = loss(z, y)
    per_sample = _shaped("loss of each sample", per_sample, z.shape[1:], "Return one per column.")
    gradient = _shaped("derivative of the loss", gradient, z.shape, "Return it like z, [C, B].")
    w = np.ones(z.shape[1]) if weight is None else weight
    w = _shaped("weight", w, z.shape[1:], "Pass one weight for each row of x.")
    total = 1.0 if getattr(loss, "reduction", "mean") == "sum" else w.sum()
    if not total > 0.0:
        raise ValueError(
            f"weight must have a positive sum where the loss is a mean: got sum(weight)={total}. "
            "Give at least one sample a positive weight."
        )
    return float((w * per_sample).sum() / total), w * gradient / total


def _penalty(
    regularizer: Any, layers: Layers
) -> tuple[float, dict[int, tuple[Array, Array | None]]]:
    """Return R and {l: (dR/dW_l, dR/db_l)} shaped like layers, zeros where R does not depend."""
    regularizer = getattr(regularizer, "reference", regularizer)
    none = 0.0, [(None, None)] * len(layers)
    R, pairs = none if regularizer is None else regularizer(layers)
    dR = {}
    for layer, ((W, b), (dR_dW, dR_db)) in enumerate(zip(layers, pairs, strict=True), start=1):
        dR[layer] = (
            _derivative(f"dR/dW_{layer}", dR_dW, W),
            None if b is None else _derivative(f"dR/db_{layer}", dR_db, b),
        )
    return float(R), dR


def _derivative(name: str, value: ArrayLike | None, by: Array) -> Array:
    zero = np.zeros_like(by)
    return zero if value is None else _shaped(name, value, by.shape, "Return it like the array.")


def _rows(columns: ByLayer) -> ByLayer:
    return {layer: columns[layer].T for layer in sorted(columns)}


def _columns(x: ArrayLike, layers: Layers) -> Array:
    """Return x as h_1 [d_0, B]: the one transpose on the way in."""
    x, width = np.asarray(x, dtype=np.float64), layers[0][0].shape[1]
    if x.ndim != 2 or x.shape[1] != width or len(x) == 0:
        raise ValueError(
            f"x must be [B, d_0={width}] with B >= 1: got shape {x.shape}. Pass samples as rows, "
            "with one entry for each column of W_1."
        )
    return x.T


def get_activation(activation: Activation) -> tuple[Elementwise, Elementwise]:
    """Return (sigma, sigma') as functions of float64 arrays."""
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    if isinstance(activation, tuple) and len(activation) == 2 and all(map(callable, activation)):
        sigma, sigma_prime = activation
        return _elementwise("sigma(z)", sigma), _elementwise("sigma_prime(z)", sigma_prime)
    raise ValueError(
        f"activation must be one of {', '.join(ACTIVATIONS)} or a pair of functions: got "
        f"activation={activation!r}. Use one of these names or (sigma, sigma_prime)."
    )


def _elementwise(name: str, function: Callable[[Array], ArrayLike]) -> Elementwise:
    """Hold a user's function to float64 results of its argument's shape."""
    return lambda z: _shaped(name, function(z), z.shape, "Return one value for each entry of z.")


def _loss_and_target(loss: Any, y: Any, v: ArrayLike | None) -> tuple[Callable[..., Any], Any]:
    """Return the loss that a name, an object or a cotangent v stands for, and its y."""
    if v is not None:
        if y is not None:
            raise ValueError(
                f"cotangent must come without y: got y of shape {np.shape(y)}. Drop one of them."
            )
        return cotangent(), v
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss](), y
    function: Any = getattr(loss, "reference", loss)
    if not callable(function):
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)} or a function: got loss={loss!r}. Use one of "
            "these names or (z [C, B], y) -> (loss of each sample [B], derivative by z [C, B])."
        )
    return function, y


def _layers(arrays: Arrays) -> Layers:
    """Return arrays in float64, once each W_l fits the one before and each b_l its W_l."""
    if len(arrays) == 0:
        raise ValueError("arrays must hold one layer or more: got none. Pass [(W_1, b_1), ...].")
    layers: Layers = []
    for layer, (weights, bias) in enumerate(arrays, start=1):
        W = np.asarray(weights, dtype=np.float64)
        if W.ndim != 2 or (layers and W.shape[1] != len(layers[-1][0])):
            previous = f", W_{layer - 1} of shape {layers[-1][0].shape}" if layers else ""
            raise ValueError(
                f"W_{layer} must be [d_{layer}, d_{layer - 1}]: got shape {W.shape}{previous}. "
                "Give it one column for each row of the W before it."
            )
        advice = f"Pass one entry for each row of W_{layer}, or None."
        layers.append((W, None if bias is None else _shaped(f"b_{layer}", bias, (len(W),), advice)))
    return layers


def _targets(name: str, y: ArrayLike | None, z: Array) -> Array:
    """Return rows y [B, C], or [B] when C = 1, as columns [C, B] like z."""
    if len(z) == 1 and y is not None and np.ndim(y) == 1:
        y = np.asarray(y)[:, None]
    return _shaped(name, y, z.T.shape, "Pass [B, C], one row for each row of x.").T


def _one_hot(y: ArrayLike | None, z: Array) -> Array:
    """Return labels y [B] as columns of the identity, [C, B]."""
    labels, classes = np.asarray(y), np.arange(len(z))
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != z.shape[1:]:
        raise ValueError(
            f"y must be integer labels of shape {z.shape[1:]}: got shape {labels.shape}, dtype "
            f"{labels.dtype}. Pass the index of the class for each row of x."
        )
    wrong = ~np.isin(labels, classes)
    if wrong.any():
        raise ValueError(
            f"y must be labels 0 .. {len(z) - 1}: got y[{wrong.argmax()}]="
            f"{labels[wrong.argmax()]}. Number the classes from 0, or widen the last layer."
        )
    return (classes[:, None] == labels).astype(np.float64)


def _binary(y: Array) -> Array:
    wrong = y[(y != 0.0) & (y != 1.0)]
    if wrong.size:
        raise ValueError(f"y must be 0 or 1: got an entry y={wrong[0]}. Map the labels to 0 and 1.")
    return y


def _shaped(name: str, value: ArrayLike | None, shape: tuple[int, ...], advice: str) -> Array:
    """Return value in float64, once it has this shape."""
    array = np.asarray(value, dtype=np.float64)
    if array.shape != shape:
        got = "None" if value is None else f"shape {array.shape}"
        raise ValueError(f"{name} must have shape {shape}: got {got}. {advice}")
    return array


def _check_number(name: str, value: float, at_most: float = math.inf) -> None:
    if not (0.0 <= value <= at_most and math.isfinite(value)):
        raise ValueError(
            f"{name} must be a finite number from 0 to {at_most}: got {name}={value}. "
            "Pass one in this range."
        )
