"""One operation at a time: recomputed in float64 from its own inputs, with a bound on the error.

A bound carried through the layers of a network soon exceeds its values. So each z_l, h_l, g_l,
dW_l, db_l of a run is compared with the exact result of *that operation on the run's own inputs*,
and the bound has one sum in it. With u the unit roundoff, a sum of n products in any order errs by
at most gamma_n sum |a||b|, gamma_n = n u / (1 - n u).

References: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 and 4.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpmlp import reference

# Roundings inside an elementwise function: a library exp, erfc, tanh or log1p is good to a few
# units in the last place, and the longest formula here (gelu') strings six operations together.
ELEMENTWISE_ROUNDINGS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One computed tensor, its exact value and the bound on their difference, elementwise.

    Attributes:
        tensor: for example "dW_2".
        computed: what the run computed.
        exact: the same operation on the same inputs, in float64.
        bound: the largest error that rounding can make.
    """

    tensor: str
    computed: np.ndarray
    exact: np.ndarray
    bound: np.ndarray

    @property
    def worst(self) -> float:
        """The largest error as a multiple of its bound; more than 1 is not rounding."""
        error = np.abs(self.computed - self.exact)
        ratio = np.where(error == 0, 0.0, error / np.where(self.bound > 0, self.bound, 1e-300))
        return float(np.max(np.where(np.isfinite(error), ratio, np.inf)))


def operations(
    arrays: Any,
    trace: Any,
    grads: Any,
    y: Any,
    *,
    activation: Any,
    loss: reference.Loss,
    weight: np.ndarray,
    unit_roundoff: float,
) -> Iterator[Operation]:
    """Yield every operation of a step, first to last.

    Args:
        arrays: the parameters, [(W_l, b_l or None)] at logical widths.
        trace: the run's tpmlp.Trace.
        grads: the run's gradients without R, [(dW_l, db_l or None)] at logical widths.
        y: targets.
        activation: a name in reference.ACTIVATIONS, or a pair of functions.
        loss: a loss of tpmlp.reference.
        weight: sample weights [B].
        unit_roundoff: u of the type the run computes in; 2^-24 for float32.
    """
    u, num_layers = unit_roundoff, len(arrays)
    sigma, sigma_prime = reference.get_activation(activation)

    def run(name: Any, l: int) -> np.ndarray:
        return trace.logical(name, l).astype(np.float64).T

    for l, (W, b) in enumerate(arrays, 1):
        h, z = run("h", l), run("z", l)
        bias = np.zeros((len(z), 1)) if b is None else np.asarray(b, np.float64)[:, None]
        yield _product(f"z_{l}", z, W, h, u, extra=bias)
        if l < num_layers:
            # sigma(z (1 + e)) = sigma(z) + z sigma'(z) e: rounding before and after.
            condition = np.abs(z * sigma_prime(z)) + np.abs(sigma(z))
            bound = ELEMENTWISE_ROUNDINGS * u * condition
            yield Operation(
                tensor=f"h_{l + 1}", computed=run("h", l + 1), exact=sigma(z), bound=bound
            )
            # Terms of every sigma' here are at most 1.2 in size, and may cancel.
            yield Operation(
                tensor=f"sigma_prime_{l}",
                computed=run("sigma_prime", l),
                exact=sigma_prime(z),
                bound=np.full(z.shape, ELEMENTWISE_ROUNDINGS * u),
            )
    yield from _loss_operations(
        trace, run("z", num_layers), run("g", num_layers), y, loss, weight, u
    )
    for l in range(num_layers, 0, -1):
        g, h = run("g", l), run("h", l)
        dW, db = grads[l - 1]
        yield _product(f"dW_{l}", dW, g, h.T, u)
        if db is not None:
            yield _product(f"db_{l}", db[:, None], g, np.ones((g.shape[1], 1)), u)
        if l > 1:
            W, slope = np.asarray(arrays[l - 1][0], np.float64), run("sigma_prime", l - 1)
            yield _product(f"g_{l - 1}", run("g", l - 1), W.T, g, u, factor=slope)


def _product(
    tensor: str,
    computed: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    u: float,
    *,
    extra: np.ndarray | float = 0.0,
    factor: np.ndarray | float = 1.0,
) -> Operation:
    """Return (a b + extra) * factor with gamma_{n+2} (|a| |b| + |extra|) |factor|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = np.abs(a) @ np.abs(b) + np.abs(extra)
    return Operation(
        tensor=tensor,
        computed=np.asarray(computed, np.float64),
        exact=(a @ b + extra) * factor,
        bound=_gamma(a.shape[1] + 2, u) * size * np.abs(factor),
    )


def _loss_operations(
    trace: Any,
    z: np.ndarray,
    g: np.ndarray,
    y: Any,
    loss: reference.Loss,
    weight: np.ndarray,
    u: float,
) -> Iterator[Operation]:
    """Yield the loss and g_{L+1}.

    Each sample's loss and gradient are sums over C outputs of functions of z - max z, whose
    rounding is amplified by its size: |z| + |max z| + C + the elementwise roundings, times the
    sizes of what is added. The mean over the batch adds one sum of B.
    """
    num_outputs, batch = z.shape
    per_sample, gradient = loss(z, y)
    scale = weight / weight.sum() if loss.reduction == "mean" else weight
    spread = 2 * np.abs(z).max(axis=0)
    roundings = spread + num_outputs + ELEMENTWISE_ROUNDINGS
    size = np.abs(per_sample) + spread + 1
    yield Operation(
        tensor="loss",
        computed=np.asarray(trace.loss, np.float64),
        exact=np.asarray((scale * per_sample).sum()),
        bound=(scale * size * (roundings * u + _gamma(2 * batch + 2, u))).sum(),
    )
    target = np.abs(gradient) + (loss.reduction == "mean")
    yield Operation(
        tensor=f"g_{len(trace.z)}",
        computed=g,
        exact=gradient * scale,
        bound=scale * target * (roundings * u + _gamma(batch + 2, u)),
    )


def _gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u)
