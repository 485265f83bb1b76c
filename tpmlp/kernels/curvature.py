"""Products with the Gauss-Newton matrix of the loss, on one device's blocks: J^T H J v.

J is the derivative of the outputs z_{L+1} in the parameters, H that of g_{L+1} in the outputs, so
each factor is a piece of the kernel:

    dz = J v        the forward pass along v, by jax.jvp; sigma' is the backward pass's own
    dg = H dz       the loss's gradient along dz, by jax.jvp, with the weights of the samples
    J^T dg          the explicit backward pass, from dg instead of g_{L+1}

References: Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient
descent, Neural Computation 14.
"""

from typing import Any

import jax

from tpmlp.kernels import backprop
from tpmlp.kernels.backprop import Chain, Layers
from tpmlp.kernels.objective import Samples, sum_parts, terms_of
from tpmlp.losses import Loss
from tpmlp.regularizers import ElementwisePenalty


def gauss_newton_product(
    layers: Layers,
    x: jax.Array,
    y: Any,
    weight: jax.Array,
    v: Layers,
    *,
    chain: Chain,
    loss: Loss,
    penalty: ElementwisePenalty | None,
) -> Layers:
    """Compute J^T H J v for the data loss, and add the product with the Hessian of R.

    Gathered inputs are not kept, whatever the strategy says: they would be both h and dh.

    Cost per device:
        compute        5 products a layer, where a gradient has 3
        communication  the forward pass's twice, the backward pass's once

    Args:
        layers: local blocks of ((W_1, b_1), ...).
        x: "B/d I/s/g", samples as rows.
        y: targets, "B/d" or "B/d C/g/s" as the loss says.
        weight: "B/d".
        v: laid out as the layers.
        chain: placement and activation.
        loss: the loss.
        penalty: an elementwise R.

    Returns:
        J^T H J v + H_R v, laid out as the layers.
    """
    terms = terms_of(chain)
    total = terms.total_weight(weight, chain)

    def one_pass(part: Samples, chain: Chain, reduce: bool) -> tuple[jax.Array, Layers]:
        x, y, weight = part

        def outputs(layers: Layers) -> tuple[jax.Array, Any]:
            passed = backprop.forward(layers, x, chain)
            return passed.z[-1], backprop.keep(passed, chain).z

        def gradient(z: jax.Array) -> tuple[jax.Array, Any]:
            sums, g = terms.at_outputs(z, y, weight, total, chain, loss)
            return g, sums

        z, dz, kept = jax.jvp(outputs, (layers,), (v,), has_aux=True)
        _, dg, sums = jax.jvp(gradient, (z,), (dz,), has_aux=True)
        kept = backprop.Kept(kept, [None] * len(layers))
        return sums, backprop.backward(layers, x, kept, dg, chain, reduce=reduce).grads

    _, product = sum_parts(one_pass, layers, Samples(x, y, weight), chain)
    product = jax.tree.map(lambda product, w: product.astype(w.dtype), product, layers)
    if penalty is None:
        return product

    # Along v the gradient changes by H_R v. To differentiate R itself JAX would have to run the
    # loops of its sum backwards under reduction="invariant", which it cannot.
    def with_penalty(layers: Layers, product: Layers) -> Layers:
        return terms.add_penalty(layers, product, chain, penalty)

    return jax.jvp(with_penalty, (layers, product), (v, product))[1]
