"""The recursion over layers, on one device's blocks.

    h_1 = x,   z_l = W_l h_l + b_l,   h_{l+1} = sigma(z_l)               l = 1 .. L+1
    g_l = (W_{l+1}^T g_{l+1}) * sigma'(z_l)                              l = L .. 1
    dW_l = g_l h_l^T,   db_l = sum over the batch of g_l

One array a layer is kept for the backward pass, z_l, split d/M: h_{l+1} and sigma'(z_l) are
rebuilt from it. Other choices of what is kept are a field of the strategy. The recursion is
unrolled; layers are a Python list, l at index l - 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from tpmlp.activations import Activation, activate
from tpmlp.collectives import transpose, zeros
from tpmlp.kernels import blocks, dense, invariant, ring
from tpmlp.kernels.execution import Execution, execution
from tpmlp.kernels.network import Finished, Passed
from tpmlp.kernels.padding import clear_rows
from tpmlp.losses import Head
from tpmlp.placement import Placement
from tpmlp.strategy import Strategy
from tpmlp.xla import after, axis_size, hold

Layers = Any  # ((W_1, b_1 or None), ...), local blocks


class Chain(NamedTuple):
    """The static description of a chain of dense layers: a tpmlp.kernels.network.Network.

    Attributes:
        placement: roles, widths and strategy.
        activation: sigma and sigma'.
    """

    placement: Placement
    activation: Activation

    @property
    def head(self) -> Head:
        """Where z_{L+1} is."""
        return Head(num_outputs=self.placement.widths[-1], axes=self.placement.axes[-1])

    @property
    def adds(self) -> bool:
        """Nothing: it adds nothing to the objective."""
        return False

    def forward(self, layers: Layers, x: jax.Array, share: jax.Array | None) -> Passed:
        """Run `forward`, and `backward` when asked to."""
        passed = forward(layers, x, self)

        def back(g: jax.Array, reduce: bool) -> Finished:
            result = backward(layers, x, keep(passed, self), g, self, reduce=reduce)
            arrays = Arrays(passed.h, passed.z, result.sigma_prime, result.g)
            return Finished(result.grads, arrays)

        return Passed(passed.z[-1], None, back)

    @property
    def kept_specs(self) -> list[PartitionSpec | None]:
        """PartitionSpecs of z_1 .. z_L; None where it is not kept."""
        num_layers, placement = len(self.placement.words), self.placement
        return [
            placement.spec("O/g/s B/d", l) if is_kept(l, num_layers, placement.strategy) else None
            for l in range(1, num_layers)
        ]

    def outputs(self, layers: Layers, x: jax.Array) -> tuple[jax.Array, list[jax.Array | None]]:
        """Return z_{L+1} and the z that are kept; gathered inputs are not."""
        passed = forward(layers, x, self)
        return passed.z[-1], keep(passed, self).z

    def gradients(
        self, layers: Layers, x: jax.Array, kept: list[jax.Array | None], g: jax.Array
    ) -> tuple[Layers, jax.Array]:
        """Return gradients by the layers and by x, laid out as these."""
        result = backward(layers, x, Kept(kept, [None] * len(layers)), g, self)
        grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), result.grads, layers)
        return grads, result.dx.T.astype(x.dtype)

    def reduce(self, grads: Layers) -> Layers:
        """Sum gradients over the data axis that are not."""
        return reduce_gradients(grads, self)

    def zeros(self, layers: Layers, dtype: Any) -> Layers:
        """Return the gradients of no samples."""
        placement = self.placement
        split = placement.splits_data
        W_layout, b_layout = placement.param_layouts if split else ("O/g I/s +d", "O/g/s +d")
        return tuple(
            (
                zeros(W_layout, W.shape, dtype, **axes),
                None if b is None else zeros(b_layout, b.shape, dtype, **axes),
            )
            for (W, b), axes in zip(layers, placement.axes, strict=True)
        )

    def at(self, first_sample: Any, num_samples: int) -> "Chain":
        """Return the chain: all samples are alike to it."""
        return self

    def dropping(self, words: jax.Array) -> "Chain":
        """Return the chain: it drops nothing."""
        return self


class Arrays(NamedTuple):
    """What a trace shows of both passes.

    Attributes:
        h: h_1 .. h_{L+1} of the forward pass, each "I/s/g B/d".
        z: z_1 .. z_{L+1} of the forward pass, each "O/g/s B/d".
        sigma_prime: sigma'(z_1) .. sigma'(z_L) of the backward pass, each "O/g/s B/d".
        g: g_1 .. g_{L+1}, each "O/g/s B/d", gradients of the data loss.
    """

    h: Any
    z: Any
    sigma_prime: Any
    g: Any


class Forward(NamedTuple):
    """What the forward pass gives.

    Attributes:
        z: z_1 .. z_{L+1}, each "O/g/s B/d", the last in the parameters' type, the others in the
            compute type. What `keep` drops and nothing else reads is freed.
        h: h_1 .. h_{L+1}, each "I/s/g B/d" in the compute type; free when not used.
        gathered: the same, gathered: "I/s B/d", or in the blocks of a ring.
    """

    z: list[jax.Array]
    h: list[jax.Array]
    gathered: list[Any]


class Kept(NamedTuple):
    """What the backward pass is given: z_l, or None where it has to be computed again.

    Attributes:
        z: of every layer but the last.
        h: gathered inputs, or None.
    """

    z: list[jax.Array | None]
    h: list[Any]


class Backward(NamedTuple):
    """What the backward pass gives.

    Attributes:
        grads: ((dW_1, db_1 or None), ...), laid out as the parameters; summed over this device's
            part of the batch alone if they are not reduced.
        g: g_1 .. g_{L+1}, each "O/g/s B/d".
        sigma_prime: sigma'(z_1) .. sigma'(z_L), the factors of g_1 .. g_L, 0 on padding rows; free
            when not used.
        dx: d loss / d x, "I/s/g B/d"; free when not used.
    """

    grads: Layers
    g: list[jax.Array]
    sigma_prime: list[jax.Array]
    dx: jax.Array


def forward(layers: Layers, x: jax.Array, chain: Chain) -> Forward:
    """Compute z_1 .. z_{L+1} and the gathered inputs; x is "B/d I/s/g", samples as rows."""
    run = execution(chain.placement, layers[0][0].dtype)
    return _forward(layers, x, 1, len(layers), run, chain)


def keep(passed: Forward, chain: Chain) -> Kept:
    """Choose what stays for the backward pass, as the strategy says."""
    strategy, num_layers = chain.placement.strategy, len(passed.z)
    z: list[jax.Array | None] = [
        z_l if is_kept(l, num_layers, strategy) else None for l, z_l in enumerate(passed.z[:-1], 1)
    ]
    # An input that is not gathered is rebuilt from z for nothing.
    gathers = [chain.placement.sizes[axes["g"]] > 1 for axes in chain.placement.axes]
    keeps = [strategy.keep == "gathered" and gathers_l for gathers_l in gathers]
    return Kept(z, [h if kept else None for h, kept in zip(passed.gathered, keeps, strict=True)])


def is_kept(l: int, num_layers: int, strategy: Strategy) -> bool:
    """Return whether z_l is there in the backward pass, rather than computed again.

    Every k-th of L is; k + L / k arrays are there at a time, the fewest where k is sqrt(L).
    """
    if strategy.keep != "recompute":
        return l < num_layers
    period = strategy.keep_every or max(1, round(num_layers**0.5))
    return l < num_layers and l % period == 0


def backward(
    layers: Layers, x: jax.Array, kept: Kept, g: jax.Array, chain: Chain, *, reduce: bool = True
) -> Backward:
    """Run the recursion from g_{L+1} down to g_1: `forward`, transposed, last layer first.

    Each layer first passes g on, then makes its own gradient, and frees both gathered arrays: on
    CPU nothing overlaps, and only one of the large arrays need be there at a time. Elsewhere the
    next layer waits for this gradient, or all of them would be put off, each with its gathered
    arrays; for its sum over the data axis waits the one after that, so that it can overlap.

    Args:
        layers: local blocks of ((W_1, b_1), ...).
        x: "B/d I/s/g".
        kept: what `keep` chose.
        g: g_{L+1}, "O/g/s B/d".
        chain: placement and activation.
        reduce: whether gradients are summed over the data axis here.
    """
    run, layer = execution(chain.placement, layers[0][0].dtype), layer_functions(chain)
    g = g.astype(run.total)
    z, grads, all_g, slopes, dh, done = list(kept.z), [], [g], [], None, ()
    for l in range(len(layers), 0, -1):
        axes = chain.placement.axes[l - 1]
        if l > 1 and z[l - 2] is None:
            z, g = recompute(layers, x, z, l, g, run, chain)
        before = x if l == 1 else z[l - 2]
        before, (W, b), g, _ = hold((before, layers[l - 1], g, done))
        g_all = layer.gather_gradient(run.to_compute(g), run, **axes)
        dh = layer.backward_input(whole_weight(W, g, run, axes), g_all, run, **axes)
        db = None if b is None else layer.backward_bias(g, **axes)
        # Nobody may want dh of layer 1, and to wait for it would be to want it.
        before = after(before, dh if l > 1 else g if db is None else db)
        h = kept.h[l - 1]
        if h is None:
            h = layer.gather_input(layer_input(before, l, run, chain), run, **axes)
        dW = layer.backward_weight(g_all, h, run, **axes)
        dW = _in_turn(dW, grads, axes) if reduce else dW
        done = (dW, db)
        grads.append(reduced(dW, db, run, chain, axes) if reduce else (dW, db))
        if l > 1:
            g, slope = gradient_and_slope(dh, before, l - 1, run, chain)
            # This layer's gradient first: it frees the two gathered arrays.
            g = after(g, grads[-1][0])
            all_g.append(g)
            slopes.append(slope)
    assert dh is not None
    return Backward(tuple(reversed(grads)), all_g[::-1], slopes[::-1], dh)


def reduce_gradients(grads: Layers, chain: Chain) -> Layers:
    """Sum gradients that are not reduced over the data axis."""
    run = execution(chain.placement, grads[0][0].dtype)
    return tuple(
        reduced(dW, db, run, chain, axes)
        for (dW, db), axes in zip(grads, chain.placement.axes, strict=True)
    )


def sigma(z: jax.Array, layer: int, chain: Chain) -> jax.Array:
    """Compute h_{l+1} from z_l. Padding rows stay 0, whatever the activation makes of 0."""
    h = elementwise(partial(activate, chain.activation), z, chain=chain)
    return h if chain.activation.fixes_zero else _mask(h, layer, chain)


def through_sigma(
    dh: jax.Array, z: jax.Array, layer: int, run: Execution, chain: Chain
) -> jax.Array:
    """Compute g_l = dh * sigma'(z_l), 0 on padding rows."""
    return gradient_and_slope(dh, z, layer, run, chain)[0]


def gradient_and_slope(
    dh: jax.Array, z: jax.Array, layer: int, run: Execution, chain: Chain
) -> tuple[jax.Array, jax.Array]:
    """Compute g_l = dh * sigma'(z_l) and the sigma'(z_l) that is in it.

    Both are 0 on padding rows, where a user's derivative need not be finite.
    """
    z = z.astype(run.total)

    def slope_of(z: jax.Array) -> jax.Array:
        return chain.activation.sigma_prime(z)

    def g_of(dh: jax.Array, z: jax.Array) -> jax.Array:
        return dh * slope_of(z)

    # XLA joins the two. In a loop over blocks they are two loops, whose bits are the same: one
    # loop with two results would be another program where the second is not used.
    g, slope = elementwise(g_of, dh, z, chain=chain), elementwise(slope_of, z, chain=chain)
    return _mask(g, layer, chain), _mask(slope, layer, chain)


def elementwise(function: Callable[..., jax.Array], *arrays: jax.Array, chain: Chain) -> jax.Array:
    """Apply a function to arrays "O/g/s B/d" of one shape, whose sizes are those of any layer."""
    if not chain.placement.is_invariant:
        return function(*arrays)
    return blocks.elementwise(function, *arrays, axes=chain.placement.axes[0])


def _forward(
    layers: Layers, before: jax.Array, first: int, last: int, run: Execution, chain: Chain
) -> Forward:
    """Run layers first .. last; `before` is z_{first - 1}, or x where first is 1."""
    layer, passed = layer_functions(chain), Forward([], [], [])
    for l in range(first, last + 1):
        axes, (W, b) = chain.placement.axes[l - 1], layers[l - 1]
        h = layer_input(before, l, run, chain)
        h_all = layer.gather_input(h, run, **axes)
        W_l, b_l = whole_weight(W, h, run, axes), _bias(b, h, run, axes)
        z = layer.forward(W_l, b_l, h_all, run, **axes)
        before = run.to_compute(z) if l < len(layers) else z.astype(W.dtype)
        for arrays, array in zip(passed, (before, h, h_all), strict=True):
            arrays.append(array)
    return passed


def layer_input(before: jax.Array, l: int, run: Execution, chain: Chain) -> jax.Array:
    """Return h_l, "I/s/g B/d" in the compute type, from z_{l-1}, or from x for layer 1."""
    if l > 1:
        return run.to_compute(sigma(before.astype(run.total), l - 1, chain))
    x = run.to_compute(before)
    return transpose("B/d I/s/g -> I/s/g B/d", x, **chain.placement.axes[0])


def recompute(
    layers: Layers,
    x: jax.Array,
    z: list[jax.Array | None],
    l: int,
    g: jax.Array,
    run: Execution,
    chain: Chain,
) -> tuple[list[jax.Array | None], jax.Array]:
    """Return z with z_s+1 .. z_{l-1} computed again from z_s, the last kept (x is z_0), and g."""
    s = max((i for i in range(1, l - 1) if z[i - 1] is not None), default=0)
    before, segment = (x if s == 0 else z[s - 1]), layers[s : l - 1]
    before, segment, _ = hold((before, segment, g))
    again = (*layers[:s], *segment, *layers[l - 1 :])
    passed = _forward(again, after(before, g), s + 1, l - 1, run, chain)
    # g is not gathered before the large arrays of these layers are gone.
    return [*z[:s], *passed.z, *z[l - 1 :]], after(g, passed.z[-1])


def _in_turn(dW: jax.Array, grads: list[Any], axes: dict[str, str]) -> jax.Array:
    """Return dW, whose sum over the data axis then waits for the one before; XLA joins two else."""
    return dW if axis_size(axes["d"]) == 1 else hold((dW, grads[-1:]))[0]


def reduced(
    dW: jax.Array, db: jax.Array | None, run: Execution, chain: Chain, axes: dict[str, str]
) -> tuple[jax.Array, jax.Array | None]:
    """Sum a layer's gradients over the batch's parts, where its parameters are."""
    layer = layer_functions(chain)
    dW = layer.reduce_weight(dW, run, **axes)
    return dW, None if db is None else layer.reduce_bias(db, run, **axes)


def layer_functions(chain: Chain) -> Any:
    """Return the module whose functions make a layer."""
    if chain.placement.is_invariant:
        return invariant
    return dense if chain.placement.strategy.overlap == "none" else ring


def whole_weight(W: jax.Array, ready: jax.Array, run: Execution, axes: dict[str, str]) -> jax.Array:
    """Return W as the layer multiplies it; one that is gathered is gathered anew at each use."""
    return dense.gather_weights(after(W, ready) if run.splits_data else W, run, **axes)


def _bias(
    b: jax.Array | None, ready: jax.Array, run: Execution, axes: dict[str, str]
) -> jax.Array | None:
    """Return b as the layer adds it; `whole_weight` for a vector."""
    if b is None:
        return None
    return dense.gather_bias(after(b, ready) if run.splits_data else b, run, **axes)


def _mask(array: jax.Array, layer: int, chain: Chain) -> jax.Array:
    """Set the padding rows of an "O/g/s B/d" of a layer to 0."""
    width, whole = (w[layer] for w in (chain.placement.widths, chain.placement.padded_widths))
    if width == whole:
        return array
    return clear_rows(array, width, "O/g/s", **chain.placement.axes[layer - 1])
