"""One task of a stage: F, B or W of a chunk of layers, on one device's blocks.

    F   z_in -> z_1 .. z_K            z_k = W_k sigma(z_{k-1}) + b_k,  z_0 = z_in
    B   g_K -> g_K .. g_1, g_in       g_{k-1} = (W_k^T g_k) * sigma'(z_{k-1})
    W   dW_k = g_k sigma(z_{k-1})^T,  db_k = sum of g_k over the batch

The first virtual stage makes its z_in from the samples, layer 1: z_in = W_1 x + b_1, and its B
ends with dW_1. The last one goes on to layer L+1 and the loss in its F, and comes back with
dW_{L+1} and g_K: what others get from the stage after.

What is kept of layer k from F is z_{k-1}, and under keep="gathered" the gathered h of it; under
keep="recompute" z_{k-1} of every keep_every-th layer of the chunk, of the first alone by default.
B computes the others again, all at once, and hands them to W.

A stage runs a chain of layers 1 .. K+2 (tpmlp.pipeline.placement), so slot k is layer k+1 there;
the functions of a layer are those of the kernel without stages. An empty slot hands on what it
gets, in the order of axes in which a layer would.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from tpmlp.collectives import per_stage, turn_in_group, zeros
from tpmlp.kernels import dense
from tpmlp.kernels.backprop import Chain, gradient_and_slope, layer_input, reduced, whole_weight
from tpmlp.kernels.execution import Execution
from tpmlp.placement import Placement
from tpmlp.strategy import Strategy
from tpmlp.xla import after

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


class Kept(NamedTuple):
    """What B and W read of a layer's F; None is not kept.

    Attributes:
        z: z_{k-1}, "O/g/s B/d" as the layer before leaves it, in the compute type.
        h: h_k gathered, "I/s B/d".
    """

    z: jax.Array | None
    h: jax.Array | None


class Deferred(NamedTuple):
    """What W reads of a layer's B.

    Attributes:
        g: g_k, "O/g/s B/d" in the total type.
        z: z_{k-1} where F did not keep it.
    """

    g: jax.Array
    z: jax.Array | None


def keeps_z(k: int, strategy: Strategy, num_slots: int) -> bool:
    """Return whether F keeps z_{k-1} of slot k, counted from 1; of the first always."""
    return strategy.keep != "recompute" or (k - 1) % (strategy.keep_every or num_slots) == 0


def keeps_h(k: int, placement: Placement) -> bool:
    """Return whether F keeps the gathered input of slot k, where it is gathered at all."""
    return placement.strategy.keep == "gathered" and placement.sizes[placement.axes[k]["g"]] > 1


def forward(z: jax.Array, chunk: Chunk) -> tuple[tuple[Kept, ...], jax.Array]:
    """Compute z_1 .. z_K from z_in; return what is kept, and z_K in the compute type."""
    kept, num_slots, strategy = [], len(chunk.slots), chunk.chain.placement.strategy
    for k in range(1, num_slots + 1):
        before, (z, h) = z, slot_forward(z, k, chunk)
        kept.append(Kept(before if keeps_z(k, strategy, num_slots) else None, h))
    return tuple(kept), z


def backward(
    kept: tuple[Kept, ...], g: jax.Array, chunk: Chunk
) -> tuple[tuple[Deferred, ...], jax.Array]:
    """Run the recursion from g_K; return what W needs, and g_in: `forward`, transposed.

    Args:
        kept: what it kept.
        g: g_K, "O/g/s B/d" in the total type.
        chunk: the layers.
    """
    deferred, again = [], _recomputed(kept, g, chunk)
    for k in range(len(chunk.slots), 0, -1):
        before = kept[k - 1].z
        z = again[k] if before is None else before
        deferred.append(Deferred(g, again[k] if before is None else None))

        def layer(g: jax.Array, z: jax.Array, k: int = k) -> jax.Array:
            return input_gradient(g, z, chunk.slots[k - 1], k + 1, chunk)

        def absent(g: jax.Array, z: jax.Array, k: int = k) -> jax.Array:
            return _turned(g, k + 1, chunk)

        g = _if_filled(k, chunk, layer, absent, g, z)
    return tuple(deferred[::-1]), g


def _recomputed(kept: tuple[Kept, ...], g: jax.Array, chunk: Chunk) -> dict[int, jax.Array]:
    """Return z_{k-1} of the slots k that did not keep it, computed again, not before g is there."""
    again: dict[int, jax.Array] = {}
    for k in range(2, len(kept) + 1):
        if kept[k - 1].z is None:
            before = kept[k - 2].z
            z = again[k - 1] if before is None else after(before, g)
            again[k], _ = slot_forward(z, k - 1, chunk)
    return again


def slot_forward(z: jax.Array, k: int, chunk: Chunk) -> tuple[jax.Array, jax.Array | None]:
    """Return z_k of slot k, counted from 1, and the gathered h_k if that is kept."""
    keeps, run = keeps_h(k, chunk.chain.placement), chunk.run

    def layer(z: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        z, h = layer_forward(z, chunk.slots[k - 1], k + 1, chunk)
        return run.to_compute(z), h if keeps else None

    def absent(z: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return _turned(z, k, chunk), no_input(k, z.shape[1], chunk) if keeps else None

    return _if_filled(k, chunk, layer, absent, z)


def no_input(k: int, rows: int, chunk: Chunk) -> jax.Array:
    """Return zeros like the gathered input of slot k, counted from 1: "I/s B/d"."""
    placement = chunk.chain.placement
    axes = placement.axes[k]
    shape = placement.padded_widths[k] // placement.sizes[axes["s"]], rows
    return zeros("I/s B/d +p", shape, chunk.run.compute, p="stage", **axes)


def layer_forward(
    before: jax.Array, pair: Pair, l: int, chunk: Chunk
) -> tuple[jax.Array, jax.Array]:
    """Compute z_l of the stage's chain, in the total type, from z_{l-1}, or from x for layer 1.

    Returns:
        z_l, and the gathered h_l.
    """
    (W, b), run, axes = pair, chunk.run, chunk.chain.placement.axes[l - 1]
    h = gathered_input(before, l, chunk)
    bias = None if b is None else dense.gather_bias(b, run, **axes)
    return dense.forward(whole_weight(W, h, run, axes), bias, h, run, **axes), h


def input_gradient(g: jax.Array, before: jax.Array, pair: Pair, l: int, chunk: Chunk) -> jax.Array:
    """Compute g_{l-1} = (W_l^T g_l) * sigma'(z_{l-1})."""
    run, axes = chunk.run, chunk.chain.placement.axes[l - 1]
    g_all = dense.gather_gradient(run.to_compute(g), run, **axes)
    dh = dense.backward_input(whole_weight(pair[0], g, run, axes), g_all, run, **axes)
    return gradient_and_slope(dh, before, l - 1, run, chunk.chain)[0]


def weight_gradient(g: jax.Array, h: jax.Array, l: int, chunk: Chunk, *, bias: bool) -> Pair:
    """Compute dW_l = g_l h_l^T and db_l of a microbatch, from the gathered h_l.

    Summed over data where that splits the parameters; else "O/g I/s +d" and "O/g/s +d".
    """
    run, axes = chunk.run, chunk.chain.placement.axes[l - 1]
    g_all = dense.gather_gradient(run.to_compute(g), run, **axes)
    dW = dense.backward_weight(g_all, h, run, **axes)
    db = dense.backward_bias(g, **axes) if bias else None
    return reduced(dW, db, run, chunk.chain, axes) if run.splits_data else (dW, db)


def gathered_input(before: jax.Array, l: int, chunk: Chunk) -> jax.Array:
    """Return the gathered h_l, "I/s B/d", from z_{l-1}, or from x for layer 1."""
    axes = chunk.chain.placement.axes[l - 1]
    return dense.gather_input(layer_input(before, l, chunk.run, chunk.chain), chunk.run, **axes)


def slot_gradient(kept: Kept, deferred: Deferred, k: int, chunk: Chunk) -> Pair:
    """Run W of slot k, counted from 1."""
    h = kept.h
    if h is None:
        before = deferred.z if kept.z is None else kept.z
        assert before is not None
        h = gathered_input(before, k + 1, chunk)
    has_bias = chunk.slots[k - 1][1] is not None
    return weight_gradient(deferred.g, h, k + 1, chunk, bias=has_bias)


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
