"""One task of a stage: F, B or W of a chunk of layers, on one device's blocks.

    F   z_in -> z_1 .. z_K            z_k = W_k sigma(z_{k-1}) + b_k,  z_0 = z_in
    B   g_K -> g_K .. g_1, g_in       g_{k-1} = (W_k^T g_k) * sigma'(z_{k-1})
    W   dW_k = g_k sigma(z_{k-1})^T,  db_k = sum of g_k over the batch

The first virtual stage makes its z_in from the samples, layer 1: z_in = W_1 x + b_1, and its B
ends with dW_1. The last one goes on to layer L+1 and the loss in its F, and comes back with
dW_{L+1} and g_K: what others get from the stage after.

A stage runs a chain of layers 1 .. K+2 (tpmlp.pipeline.placement), so slot k is layer k+1 there;
the functions of a layer are those of the kernel without stages. An empty slot hands on what it
gets, in the order of axes in which a layer would.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from tpmlp.collectives import per_stage, turn_in_group
from tpmlp.kernels import dense
from tpmlp.kernels.backprop import Chain, gradient_and_slope, layer_input, whole_weight
from tpmlp.kernels.execution import Execution

Pair = tuple[jax.Array, jax.Array | None]


class Chunk(NamedTuple):
    """A chunk's layers on one device.

    Attributes:
        chain: layers 1 .. K+2 as a stage has them.
        run: types.
        slots: (W, b) of its slots, local blocks.
        filled: how many of them this stage has, a scalar; None where every stage has all.
    """

    chain: Chain
    run: Execution
    slots: tuple[Pair, ...]
    filled: jax.Array | None


def forward(z: jax.Array, chunk: Chunk) -> list[jax.Array]:
    """Compute z_1 .. z_K from z_in; each "O/g/s B/d" in the compute type."""
    passed = []
    for k, pair in enumerate(chunk.slots, 1):

        def layer(z: jax.Array, k: int = k, pair: Pair = pair) -> jax.Array:
            return chunk.run.to_compute(layer_forward(z, pair, k + 1, chunk))

        z = _if_filled(k, chunk, layer, lambda z, k=k: _turned(z, k, chunk), z)
        passed.append(z)
    return passed


def backward(z: list[jax.Array], g: jax.Array, chunk: Chunk) -> tuple[list[jax.Array], jax.Array]:
    """Run the recursion from g_K; return g_1 .. g_K and g_in: `forward`, transposed.

    Args:
        z: z_in, z_1 .. z_{K-1}.
        g: g_K, "O/g/s B/d" in the total type.
        chunk: the layers.
    """
    all_g = []
    for k in range(len(chunk.slots), 0, -1):
        all_g.append(g)

        def layer(g: jax.Array, z: jax.Array, k: int = k) -> jax.Array:
            return input_gradient(g, z, chunk.slots[k - 1], k + 1, chunk)

        def absent(g: jax.Array, z: jax.Array, k: int = k) -> jax.Array:
            return _turned(g, k + 1, chunk)

        g = _if_filled(k, chunk, layer, absent, g, z[k - 1])
    return all_g[::-1], g


def layer_forward(before: jax.Array, pair: Pair, l: int, chunk: Chunk) -> jax.Array:
    """Compute z_l of the stage's chain from z_{l-1}, or from x for layer 1; in the total type."""
    (W, b), run, axes = pair, chunk.run, chunk.chain.placement.axes[l - 1]
    h = dense.gather_input(layer_input(before, l, run, chunk.chain), run, **axes)
    bias = None if b is None else dense.gather_bias(b, run, **axes)
    return dense.forward(whole_weight(W, h, run, axes), bias, h, run, **axes)


def input_gradient(g: jax.Array, before: jax.Array, pair: Pair, l: int, chunk: Chunk) -> jax.Array:
    """Compute g_{l-1} = (W_l^T g_l) * sigma'(z_{l-1})."""
    run, axes = chunk.run, chunk.chain.placement.axes[l - 1]
    g_all = dense.gather_gradient(run.to_compute(g), run, **axes)
    dh = dense.backward_input(whole_weight(pair[0], g, run, axes), g_all, run, **axes)
    return gradient_and_slope(dh, before, l - 1, run, chunk.chain)[0]


def weight_gradient(g: jax.Array, before: jax.Array, l: int, chunk: Chunk, *, bias: bool) -> Pair:
    """Compute dW_l = g_l h_l^T "O/g I/s +d" and db_l "O/g/s +d" of a microbatch."""
    run, axes = chunk.run, chunk.chain.placement.axes[l - 1]
    g_all = dense.gather_gradient(run.to_compute(g), run, **axes)
    h = dense.gather_input(layer_input(before, l, run, chunk.chain), run, **axes)
    dW = dense.backward_weight(g_all, h, run, **axes)
    return dW, dense.backward_bias(g, **axes) if bias else None


def _turned(array: jax.Array, l: int, chunk: Chunk) -> jax.Array:
    """Return an array like z_l in the order of axes of z_{l+1} and of z_{l-1}."""
    return turn_in_group("O/g/s B/d -> O/s/g B/d", array, **chunk.chain.placement.axes[l - 1])


def _if_filled(
    k: int, chunk: Chunk, layer: Callable[..., Any], absent: Callable[..., Any], *args: Any
) -> Any:
    """Run a layer where this stage has one in slot k, counted from 1."""
    if chunk.filled is None:
        return layer(*args)
    return lax.cond(
        chunk.filled >= k, lambda *a: per_stage(layer(*a)), lambda *a: per_stage(absent(*a)), *args
    )
