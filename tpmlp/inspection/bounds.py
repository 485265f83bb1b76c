"""One operation at a time: recomputed in float64 from its own inputs, with a bound on the error.

A bound carried through the layers of a network soon exceeds its values. So each z_l, h_l, g_l,
dW_l, db_l of a run is compared with the exact result of *that operation on the run's own inputs*,
and the bound has one sum in it. With u the unit roundoff, a sum of n products in any order errs by
at most gamma_n sum |a||b|, gamma_n = n u / (1 - n u). Operands that are rounded to a narrower type
first, and what crosses devices in one, add a gamma of that type; a compiler may leave such a
rounding out, so it is in the bound and not in the exact result.

h_l and z_l are the forward pass's, sigma'(z_l) is the factor of g_l (tpmlp.trace). Where the
backward pass makes h_l or z_l again, it repeats the same operations, and an error in these is one
of dW_l or sigma'(z_l).

The first operation outside its bound is where something other than rounding happened: all before it
are right, and its inputs are. Each is compared device by device, padding included, which is 0.

References: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 and 4.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from tpmlp import reference

Phase = Literal["forward", "loss", "backward"]

# Roundings inside an elementwise function: a library exp, erfc, tanh or log1p is good to a few
# units in the last place, and the longest formula here (gelu') strings six operations together.
ELEMENTWISE_ROUNDINGS = 16

# The exact results are computed in this.
EXACT_ROUNDOFF = 2.0**-53

# No |sigma'| and no |sigma''| here is larger.
LARGEST_SLOPE = 1.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One computed tensor, its exact value and the bound on their difference, elementwise.

    Attributes:
        tensor: for example "dW_2".
        layer: l, 1-based, of the layer whose forward or backward pass computes it; of a Graph the
            vertex's name.
        phase: of the step.
        computed: what the run computed, padded, on its devices.
        exact: the same operation on the same inputs, in float64, without padding.
        bound: the largest error that rounding can make.
        has_samples: whether the first dim is the batch, whose padding may be anything.
    """

    tensor: str
    layer: int | str
    phase: Phase
    computed: jax.Array
    exact: np.ndarray
    bound: np.ndarray
    has_samples: bool = False

    def by_device(self) -> dict[int, float]:
        """Return the largest error on each device of this process, by the device's id.

        As a multiple of its bound: more than 1 is not rounding. A device that holds nothing but
        padding is left out, unless that is wrong.
        """
        shape = self.computed.shape
        if self.has_samples:
            shape = (len(self.exact), *shape[1:])
        exact, bound = (_padded(array, shape) for array in (self.exact, self.bound))
        errors = {}
        for shard in self.computed.addressable_shards:
            at = shard.index
            error = _ratio(np.asarray(shard.data), exact[at], bound[at])
            if error or self.exact[at].size:
                errors[shard.device.id] = error
        return errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Roundoff:
    """Unit roundoffs of the types of a run.

    Attributes:
        compute: of products' operands.
        total: of sums within a device.
        reduce: of sums over devices.
        num_devices: terms of the longest sum over devices.
    """

    compute: float
    total: float
    reduce: float
    num_devices: int = 1

    def of_product(self, num_terms: int) -> float:
        """Return the error of a sum of products, as a multiple of the sum of their sizes."""
        narrow = _gamma(3, self.compute) if self.compute > self.total else 0.0
        moved = _gamma(self.num_devices + 1, self.reduce) if self.reduce > self.total else 0.0
        within = _gamma(num_terms + 2, self.total) + _gamma(num_terms + 2, EXACT_ROUNDOFF)
        return within + narrow + moved

    @property
    def of_input(self) -> float:
        """How far the z that a run goes on with may be from the z that it shows."""
        return 2 * self.compute if self.compute > self.total else 0.0


def unit_roundoff(dtype: Any) -> float:
    """Return u of a floating type, 2^-24 for float32."""
    return float(jax.numpy.finfo(dtype).eps) / 2


def operations(
    arrays: Any,
    trace: Any,
    y: Any,
    *,
    activation: Any,
    loss: reference.Loss,
    weight: np.ndarray,
    roundoff: Roundoff,
) -> Iterator[Operation]:
    """Yield every operation of a step, first to last.

    Args:
        arrays: the parameters, [(W_l, b_l or None)] at logical widths.
        trace: the run's tpmlp.Trace, of a step without R.
        y: targets.
        activation: a name in reference.ACTIVATIONS, or a pair of functions.
        loss: a loss of tpmlp.reference.
        weight: sample weights [B].
        roundoff: of the types that the run computes in.
    """
    num_layers = len(arrays)
    sigma, sigma_prime = reference.get_activation(activation)

    def run(name: Any, l: int) -> np.ndarray:
        return trace.logical(name, l).astype(np.float64)

    for l, (W, b) in enumerate(arrays, 1):
        h, z = run("h", l), run("z", l)
        bias = 0.0 if b is None else np.asarray(b, np.float64)
        yield _product(
            (f"z_{l}", l, "forward"),
            trace.z[l],
            h,
            np.asarray(W, np.float64).T,
            roundoff,
            extra=bias,
        )
        if l < num_layers:
            yield _hidden(trace, l, z, sigma(z), sigma_prime(z), roundoff)
    yield from loss_operations(
        (f"g_{num_layers}", num_layers),
        run("z", num_layers),
        y,
        weight,
        loss=loss,
        computed=(trace.loss, trace.g[num_layers]),
        u=max(roundoff.total, unit_roundoff(trace.z[num_layers].dtype)),
    )
    for l in range(num_layers, 0, -1):
        g = run("g", l)
        yield from weight_gradient(l, trace.grads[l - 1], g, run("h", l), roundoff)
        if l > 1:
            z, W = run("z", l - 1), np.asarray(arrays[l - 1][0], np.float64)
            yield _slope(trace, l - 1, z, sigma_prime(z), roundoff)
            yield _product(
                (f"g_{l - 1}", l, "backward"),
                trace.g[l - 1],
                g,
                W,
                roundoff,
                factor=run("sigma_prime", l - 1),
                factor_error=_unsure(z, roundoff),
            )


def weight_gradient(
    l: int, computed: tuple[Any, Any], g: np.ndarray, h: np.ndarray, roundoff: Roundoff
) -> Iterator[Operation]:
    """Yield dW_l = g_l^T h_l, samples as rows, and db_l if there is one."""
    dW, db = computed
    yield _product((f"dW_{l}", l, "backward"), dW, g.T, h, roundoff, has_samples=False)
    if db is not None:
        ones = np.ones(len(g))
        yield _product((f"db_{l}", l, "backward"), db, g.T, ones, roundoff, has_samples=False)


def _hidden(
    trace: Any, l: int, z: np.ndarray, exact: Any, slope: Any, roundoff: Roundoff
) -> Operation:
    """Return h_{l+1} = sigma(z_l)."""
    exact = np.asarray(exact, np.float64)
    # sigma(z (1 + e)) = sigma(z) + z sigma'(z) e: rounding before and after.
    condition = np.abs(z * np.asarray(slope, np.float64)) + np.abs(exact)
    each = ELEMENTWISE_ROUNDINGS * roundoff.total + roundoff.of_input
    return Operation(
        tensor=f"h_{l + 1}",
        layer=l,
        phase="forward",
        computed=trace.h[l + 1],
        exact=exact,
        bound=each * condition + stored(trace.h[l + 1], roundoff, exact),
        has_samples=True,
    )


def _slope(trace: Any, l: int, z: np.ndarray, exact: Any, roundoff: Roundoff) -> Operation:
    """Return sigma'(z_l), whose terms are at most LARGEST_SLOPE in size, and may cancel."""
    return Operation(
        tensor=f"sigma_prime_{l}",
        layer=l,
        phase="backward",
        computed=trace.sigma_prime[l],
        exact=np.asarray(exact, np.float64),
        bound=ELEMENTWISE_ROUNDINGS * roundoff.total + _unsure(z, roundoff),
        has_samples=True,
    )


def _unsure(z: np.ndarray, roundoff: Roundoff) -> np.ndarray:
    """Return how far sigma' of the z that is shown may be from that of the z that was used."""
    return roundoff.of_input * LARGEST_SLOPE * (np.abs(z) + 1)


def _product(
    name: tuple[str, int, Phase],
    computed: jax.Array,
    a: np.ndarray,
    b: np.ndarray,
    roundoff: Roundoff,
    *,
    extra: np.ndarray | float = 0.0,
    factor: np.ndarray | float = 1.0,
    factor_error: np.ndarray | float = 0.0,
    has_samples: bool = True,
) -> Operation:
    """Return (a b + extra) * factor, its error one sum long."""
    tensor, layer, phase = name
    size = np.abs(a) @ np.abs(b) + np.abs(extra)
    exact = (a @ b + extra) * factor
    bound = size * (roundoff.of_product(a.shape[1]) * np.abs(factor) + factor_error)
    return Operation(
        tensor=tensor,
        layer=layer,
        phase=phase,
        computed=computed,
        exact=exact,
        bound=bound + stored(computed, roundoff, exact),
        has_samples=has_samples,
    )


def loss_operations(
    name: tuple[str, int | str],
    z: np.ndarray,
    y: Any,
    weight: np.ndarray,
    *,
    loss: reference.Loss,
    computed: tuple[jax.Array, jax.Array],
    u: float,
) -> Iterator[Operation]:
    """Yield the loss and g of the outputs.

    Each sample's loss and gradient are sums over C outputs of functions of z - max z, whose
    rounding is amplified by its size: |z| + |max z| + C + the elementwise roundings, times the
    sizes of what is added. The mean over the batch adds one sum of B. The loss has the outputs'
    type, the parameters' own.

    Args:
        name: of g, and of what gives the outputs.
        z: outputs [B, C] in float64.
        y: targets of each.
        weight: of each.
        loss: a loss of tpmlp.reference.
        computed: the run's loss, and its g, whose last dim is C and the others the B of z.
        u: unit roundoff of the outputs' type.
    """
    tensor, last = name
    batch, num_outputs = z.shape
    yield loss_operation(last, z, y, weight, loss=loss, computed=computed[0], u=u)
    _, gradient = loss(z.T, y)
    scale, roundings = _scale(weight, loss), _roundings(z)
    target = np.abs(gradient) + (loss.reduction == "mean")
    bound = scale * target * (roundings * u + _gamma(batch + 2, u))
    shape = (-1, *computed[1].shape[1:-1], num_outputs)
    yield Operation(
        tensor=tensor,
        layer=last,
        phase="loss",
        computed=computed[1],
        exact=(gradient * scale).T.reshape(shape),
        bound=bound.T.reshape(shape),
        has_samples=True,
    )


def loss_operation(
    last: int | str,
    z: np.ndarray,
    y: Any,
    weight: np.ndarray,
    *,
    loss: reference.Loss,
    computed: jax.Array,
    u: float,
) -> Operation:
    """Return the loss of outputs, whose layer is `last`; arguments as in `loss_operations`."""
    per_sample, _ = loss(z.T, y)
    size = np.abs(per_sample) + 2 * np.abs(z).max(axis=1) + 1
    scale, each = _scale(weight, loss), _roundings(z) * u + _gamma(2 * len(z) + 2, u)
    return Operation(
        tensor="loss",
        layer=last,
        phase="loss",
        computed=computed,
        exact=np.asarray((scale * per_sample).sum()),
        bound=np.asarray((scale * size * each).sum()),
    )


def _scale(weight: np.ndarray, loss: reference.Loss) -> np.ndarray:
    return weight / weight.sum() if loss.reduction == "mean" else weight


def _roundings(z: np.ndarray) -> np.ndarray:
    """Return how many units of roundoff the loss of each sample may be off, of what it adds."""
    return 2 * np.abs(z).max(axis=1) + z.shape[1] + ELEMENTWISE_ROUNDINGS


def stored(computed: jax.Array, roundoff: Roundoff, exact: np.ndarray) -> np.ndarray | float:
    """Return the error of rounding a result to the type in which it is kept."""
    u = unit_roundoff(computed.dtype)
    return 2 * u * np.abs(exact) if u > roundoff.total else 0.0


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    missing = [(0, whole - n) for n, whole in zip(array.shape, shape, strict=True)]
    return np.pad(array, missing) if missing else array


def _ratio(computed: np.ndarray, exact: np.ndarray, bound: np.ndarray) -> float:
    """Return the largest error as a multiple of its bound; NaN is infinitely wrong."""
    computed = computed[tuple(slice(n) for n in exact.shape)].astype(np.float64)
    error = np.abs(computed - exact)
    ratio = np.where(error == 0, 0.0, error / np.where(bound > 0, bound, 1e-300))
    return float(np.max(np.where(np.isfinite(error), ratio, np.inf), initial=0.0))


def _gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u)
