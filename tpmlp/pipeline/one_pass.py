"""One pass through all stages, one after another, the whole batch at once: for what only looks.

Layers are those of tpmlp.pipeline.chunk and messages those of tpmlp.pipeline.on_stage, as the
executor runs them; what is not here is the schedule. All stages but one wait, so nothing is fast.

Arrays are by chunk, and each stage has its own: z[c] is z_in, z_1 .. z_K of its chunk c.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_reduce, zeros
from tpmlp.kernels.backprop import Arrays, gradient_and_slope, layer_input
from tpmlp.kernels.network import Finished
from tpmlp.pipeline.body import only_at
from tpmlp.pipeline.chunk import Deferred, Kept, Pair, slot_forward
from tpmlp.pipeline.on_stage import OnStage

ByChunk = dict[int, list[jax.Array]]


class Forward(NamedTuple):
    """What the forward pass gives.

    Attributes:
        z: z_in, z_1 .. z_K, each "O/g/s B/d" in the compute type.
        outputs: z_{L+1} on every stage, "O/g/s B/d" in the parameters' type.
    """

    z: ByChunk
    outputs: jax.Array


class Backward(NamedTuple):
    """What the recursion gives, in the total type.

    Attributes:
        g: g_1 .. g_K, each "O/g/s B/d".
        g_first: g_1 of the model, on its first stage.
        g_last: g_{L+1}, on every stage.
    """

    g: ByChunk
    g_first: jax.Array
    g_last: jax.Array


def forward(x: jax.Array, here: OnStage) -> Forward:
    """Run forward; x is "B/d I/s/g", samples as rows."""
    route, by_chunk = here.placement.schedule.route, {}
    z = here.enter(x)
    for virtual in range(route.num_virtual_stages):
        at, c = route.place(virtual)
        if virtual:
            z = here.moved_h(z, -route.ring(route.place(virtual - 1)[0], at, "F"))
        passed = only_at(
            (at, c),
            c,
            here,
            lambda z=z, c=c: _through(z, c, here),
            lambda z=z, c=c: [jnp.zeros_like(z) for _ in here.chunk(c).slots],
        )
        by_chunk[c] = _own([z, *passed], by_chunk.get(c), at, here)
        z = [z, *passed][-1]
    return Forward(by_chunk, _outputs(z, here))


def _through(z: jax.Array, c: int, here: OnStage) -> list[jax.Array]:
    """Return z_1 .. z_K of a chunk from z_in: all of them, whatever F would keep."""
    passed = []
    for k in range(1, len(here.chunk(c).slots) + 1):
        z, _ = slot_forward(z, k, here.chunk(c))
        passed.append(z)
    return passed


def _outputs(z: jax.Array, here: OnStage) -> jax.Array:
    """Return z_{L+1} on every stage, from z_L on the last one."""
    chain, dtype = here.placement.chain, here.first[0].dtype
    place, axes = _last_place(here), {**chain.axes[-1], "p": "stage"}
    shape = (chain.padded_widths[-1] // here.num_tensor_devices, z.shape[1])
    outputs = only_at(
        place,
        place[1],
        here,
        lambda: here.leave(z),
        lambda: zeros("O/g/s B/d", shape, dtype, **axes),
    )
    return all_reduce("O/g/s B/d +p -> O/g/s B/d", outputs, **axes)


def backward(x: jax.Array, passed: Forward, g: jax.Array, here: OnStage) -> Finished:
    """Run the recursion from g_{L+1}, on every stage, and return what it leaves."""
    recursion = _recursion(passed, g, here)
    return Finished(
        here.reduced(_gradients(x, passed, recursion, here)), _arrays(passed, recursion, here)
    )


def _recursion(passed: Forward, g: jax.Array, here: OnStage) -> Backward:
    """Return g of all layers: `forward`, transposed."""
    route, total, by_chunk = here.placement.schedule.route, here.types.total, {}
    place = _last_place(here)
    z_last, g_last = passed.z[place[1]][-1], g.astype(total)
    g = only_at(
        place,
        place[1],
        here,
        lambda: here.leave_backward(z_last, g_last),
        lambda: jnp.zeros_like(z_last, total),
    )
    for virtual in reversed(range(route.num_virtual_stages)):
        at, c = route.place(virtual)
        if virtual + 1 < route.num_virtual_stages:
            g = here.moved_g(g, -route.ring(route.place(virtual + 1)[0], at, "B"))
        all_g, g = only_at(
            (at, c),
            c,
            here,
            lambda g=g, c=c: _back(passed, g, c, here),
            lambda g=g, c=c: ([jnp.zeros_like(g) for _ in here.chunk(c).slots], jnp.zeros_like(g)),
        )
        by_chunk[c] = _own(all_g, by_chunk.get(c), at, here)
    return Backward(by_chunk, g, g_last)


def _kept(passed: Forward, c: int) -> tuple[Kept, ...]:
    """Return z_{k-1} of every slot of a chunk."""
    return tuple(Kept(z, None) for z in passed.z[c][:-1])


def _back(
    passed: Forward, g: jax.Array, c: int, here: OnStage
) -> tuple[list[jax.Array], jax.Array]:
    """Return g_1 .. g_K of a chunk and g_in, from g_K."""
    deferred, g = here.backward(c, _kept(passed, c), g)
    return [of.g for of in deferred], g


def _gradients(
    x: jax.Array, passed: Forward, recursion: Backward, here: OnStage
) -> tuple[Pair, ...]:
    """Return (dW, db) of the first layer, the slots and the last; 0 where a stage has none."""
    last_at, last_c = _last_place(here)

    def only(is_here: jax.Array | bool, pair: Pair) -> Pair:
        return jax.tree.map(lambda a: jnp.where(is_here, a, jnp.zeros_like(a)), pair)

    slots = [
        only(here.has(c, k), here.slot_gradients(c, k, kept, Deferred(g, None)))
        for c, all_g in sorted(recursion.g.items())
        for k, (g, kept) in enumerate(zip(all_g, _kept(passed, c), strict=True))
    ]
    first = here.first_gradients(x, recursion.g_first)
    last = here.last_gradients(passed.z[last_c][-1], recursion.g_last)
    is_first = here.stage == here.placement.stages.stage_of(1)
    return (only(is_first, first), *slots, only(here.stage == last_at, last))


def _arrays(passed: Forward, recursion: Backward, here: OnStage) -> Arrays:
    """Return what a trace shows, every array on every stage, in the order of axes of its layer.

    z_l as its stage computes it, h_l as it reads it, g_l as its stage gets it: what is lost between
    stages is seen.
    """
    stages, types, chain = here.placement.stages, here.types, here.chain
    z, g, h, slopes = [], [], [], []

    def show(array: jax.Array, layout: str, l: int) -> jax.Array:
        axes = {**chain.placement.axes[stages.in_chain(l) - 1], "p": "stage"}
        mine = jnp.where(here.stage == stages.stage_of(l), array, jnp.zeros_like(array))
        return all_reduce(f"{layout} +p -> {layout}", mine, **axes)

    for l in range(1, stages.num_layers + 1):
        c, k = stages.chunk_of(l), stages.in_chain(l) - 1  # z[c][k] is z_l, z[c][k - 1] its input
        if l > 1:
            h.append(show(layer_input(passed.z[c][k - 1], k + 1, types, chain), "I/s/g B/d", l))
        if l == stages.num_layers:
            continue
        z_l = passed.z[c][k]
        _, slope = gradient_and_slope(z_l.astype(types.total), z_l, k + 1, types, chain)
        z.append(show(z_l, "O/g/s B/d", l))
        slopes.append(show(slope, "O/g/s B/d", l))
        g.append(show(recursion.g[c][k - 1] if l > 1 else recursion.g_first, "O/g/s B/d", l))
    return Arrays([None, *h], [*z, passed.outputs], slopes, [*g, recursion.g_last])


def _last_place(here: OnStage) -> tuple[int, int]:
    """Return the (stage, chunk) that ends with layer L+1."""
    route = here.placement.schedule.route
    return route.place(route.num_virtual_stages - 1)


def _own(new: list[Any], old: list[Any] | None, at: int, here: OnStage) -> list[Any]:
    """Return a chunk's arrays, the new ones on one stage."""
    if old is None:
        return new
    return [jnp.where(here.stage == at, a, b) for a, b in zip(new, old, strict=True)]
