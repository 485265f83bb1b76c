"""How far rounding may put the results of a step whose inside is not seen.

The executor of a pipeline gives a loss and gradients, and shows no h_l or g_l of any microbatch: no
operation of it can be recomputed from its own inputs. But a trace has computed the same numbers in
another order, and its operations can. So the step is compared with the trace, and what is to be
known is how far apart rounding may put the two.

A bound carried through all layers, with |W| for W, soon exceeds the values. A computed product with
W, however, is the exact one with a W whose entries are off by no more than one sum rounds: a
backward error. What such errors do to the results is seen by making some: the reference is run with
parameters that are off by as much, at random. The step may be as far from the trace as the furthest
of these runs is from the reference, and dW and db by the rounding of their own sum besides: over
the samples, in any order, so in any microbatches. Errors made are the largest that there can be, so
that a few runs are enough: those of a real step are some tenth of that.

References: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 1.5 and 3.5;
Kenney and Laub 1994, Small-sample statistical condition estimates for general matrix functions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tpmlp import reference
from tpmlp.inspection.bounds import (
    ELEMENTWISE_ROUNDINGS,
    Operation,
    Roundoff,
    loss_operation,
    unit_roundoff,
    weight_gradient,
)

Arrays = Sequence[tuple[np.ndarray, np.ndarray | None]]


class Results(NamedTuple):
    """What a step gives.

    Attributes:
        loss: a scalar.
        grads: ((dW_1, db_1 or None), ...).
    """

    loss: Any
    grads: Sequence[tuple[Any, Any]]


# Runs with errors made at random.
NUM_RUNS = 4


def step_operations(
    computed: Results,
    traced: Results,
    arrays: Arrays,
    run: Callable[[Arrays], reference.Trace],
    y: Any,
    *,
    loss: reference.Loss,
    weight: np.ndarray,
    roundoff: Roundoff,
    rng: np.random.Generator | None,
) -> Iterator[Operation]:
    """Yield a step's loss, and dW and db of each layer, the last first.

    Args:
        computed: what the step gives, gradients padded and on their devices.
        traced: what the trace of the same step gives, at logical widths.
        arrays: the parameters, [(W_l, b_l or None)] at logical widths.
        run: the reference of the step, a function of the parameters.
        y: targets.
        loss: a loss of tpmlp.reference.
        weight: sample weights [B].
        roundoff: of the types that the step computes in.
        rng: where errors come from; None where all that is carried from layer to layer is exact.
    """
    exact, last = run(arrays), len(arrays)
    others = [run(_moved(arrays, roundoff, rng)) for _ in range(NUM_RUNS)] if rng else []

    def beside(
        operation: Operation, traced: Any, of: Callable[[reference.Trace], Any]
    ) -> Operation:
        sways = [float(np.abs(of(other) - of(exact)).max()) for other in others]
        bound = operation.bound + max(sways, default=0.0)
        return replace(operation, exact=np.asarray(traced, np.float64), bound=bound)

    u = max(roundoff.total, unit_roundoff(computed.loss.dtype))
    of_z = {"weight": weight, "loss": loss, "computed": computed.loss, "u": u}
    yield beside(
        loss_operation(last, exact.z[last], y, **of_z), traced.loss, lambda t: np.asarray(t.loss)
    )
    for l in range(last, 0, -1):
        products = weight_gradient(l, computed.grads[l - 1], exact.g[l], exact.h[l], roundoff)
        results = (lambda t, l=l: t.dW[l], lambda t, l=l: t.db[l])
        for product, array, of in zip(products, traced.grads[l - 1], results, strict=False):
            yield beside(product, array, of)


def _moved(arrays: Arrays, roundoff: Roundoff, rng: np.random.Generator) -> Arrays:
    """Return parameters with an error in every entry, row and column.

    Rounding a product's result, or its input, is an error that a row or a column has in common.
    """

    def off(u: float, *shape: int) -> np.ndarray:
        return u * rng.uniform(-1, 1, shape)

    moved = []
    for W, b in arrays:
        u = roundoff.of_product(max(W.shape)) + roundoff.of_input
        u += ELEMENTWISE_ROUNDINGS * roundoff.total
        rows, columns = off(u, len(W), 1), off(u, 1, W.shape[1])
        W = np.asarray(W, np.float64) * (1 + off(u, *W.shape) + rows + columns)
        moved.append((W, None if b is None else b * (1 + rows[:, 0])))
    return moved
