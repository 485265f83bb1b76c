"""One stage of a chain of dense layers on one device: a tpmlp.pipeline.body.Body."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.collectives import all_gather, reduce_scatter, shift, stage_index, turn, zeros
from tpmlp.kernels.backprop import Chain, reduced
from tpmlp.kernels.execution import execution
from tpmlp.pipeline.body import Empty
from tpmlp.pipeline.chunk import (
    Chunk,
    Deferred,
    Kept,
    Pair,
    backward,
    forward,
    gathered_input,
    input_gradient,
    keeps_h,
    keeps_z,
    layer_forward,
    no_input,
    slot_gradient,
    weight_gradient,
)
from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.pipeline.staged import Staged


class OnStage:
    """A stage's layers on one device.

    Attributes:
        placement: where everything is.
        chain: the layers that a stage has at most.
        types: of products and sums.
        stage: this device's stage, known when the program runs.
        first: (W_1, b_1), whole.
        last: (W_{L+1}, b_{L+1}), whole.
        slots: (W, b) of the interior layers.
    """

    def __init__(self, params: Staged, placement: PipelinePlacement, chain: Chain) -> None:
        self.placement, self.chain, self.stages = placement, chain, placement.stages
        self.types = execution(placement, params.first[0].dtype)
        self.stage = stage_index()
        self.first, self.last = self._whole(params.first, 0), self._whole(params.last, -1)
        self.slots = [(W[0], None if b is None else b[0]) for W, b in params.slots]

    @property
    def num_tensor_devices(self) -> int:
        """The devices that share the features of a stage."""
        return self.placement.sizes["x"] * self.placement.sizes["y"]

    @property
    def pairs(self) -> list[tuple[Pair, dict[str, str]]]:
        """(W, b) of the first layer, the slots and the last, with the mesh axes of its roles."""
        first, *interior, last = self.placement.chain.axes
        axes = [first, *interior * self.placement.schedule.num_chunks, last]
        return list(zip((self.first, *self.slots, self.last), axes, strict=True))

    def chunk(self, c: int) -> Chunk:
        """Return a chunk of this stage."""
        per_chunk = self.stages.slots_per_chunk
        counts = [self.stages.count(s, c) for s in range(self.placement.sizes["stage"])]
        filled = None if min(counts) == per_chunk else jnp.asarray(counts)[self.stage]
        slots = tuple(self.slots[c * per_chunk : (c + 1) * per_chunk])
        return Chunk(self.chain, self.types, slots, filled)

    def at(self, microbatch: Any, rows: int) -> "OnStage":
        """Return the stage: all samples are alike to it."""
        return self

    def empty(self, rows: int) -> Empty:
        """Return zeros for microbatches of `rows` samples a device."""
        types, strategy = self.types, self.placement.strategy
        chain, chunk, per_chunk = self.placement.chain, self.chunk(0), self.stages.slots_per_chunk
        axes = {**chain.axes[0], "p": "stage"}

        def zero(width: int, dtype: Any) -> jax.Array:
            shape = width // self.num_tensor_devices, rows
            return zeros("O/g/s B/d +p", shape, dtype, **axes)

        def gradient(pair: Pair, axes: dict[str, str]) -> Pair:
            partial = "+p" if types.splits_data else "+d+p"
            W, b = (f"{layout} {partial}" for layout in chain.param_layouts)
            return _each(
                lambda a, layout: zeros(layout, a.shape, types.accumulate, **axes, p="stage"),
                pair,
                (W, b),
            )

        hidden = chain.padded_widths[1]
        message, g = zero(hidden, types.compute), zero(hidden, types.total)
        kept, deferred = [], []
        for k in range(1, per_chunk + 1):
            keeps = keeps_z(k, strategy, per_chunk)
            h = no_input(k, rows, chunk) if keeps_h(k, chain) else None
            kept.append(Kept(message if keeps else None, h))
            deferred.append(Deferred(g, None if keeps else message))
        return Empty(
            message=message,
            gradient=g,
            kept=tuple(kept),
            deferred=tuple(deferred),
            outputs=zero(chain.padded_widths[-1], types.total),
            grads=tuple(gradient(pair, axes) for pair, axes in self.pairs),
        )

    def enter(self, x: jax.Array) -> jax.Array:
        """Run layer 1."""
        return self.types.to_compute(layer_forward(x, self.first, 1, self.chunk(0))[0])

    def forward(self, c: int, z: jax.Array) -> tuple[tuple[Kept, ...], jax.Array]:
        """Run F of a chunk."""
        return forward(z, self.chunk(c))

    def leave(self, z: jax.Array) -> jax.Array:
        """Run layer L+1; its outputs in the type of the parameters."""
        outputs, _ = layer_forward(z, self.last, self.num_layers, self.chunk(0))
        return outputs.astype(self.first[0].dtype)

    def leave_backward(self, z: jax.Array, g: jax.Array) -> jax.Array:
        """Compute g_L from g_{L+1}."""
        return input_gradient(g, z, self.last, self.num_layers, self.chunk(0))

    def backward(
        self, c: int, kept: tuple[Kept, ...], g: jax.Array
    ) -> tuple[tuple[Deferred, ...], jax.Array]:
        """Run B of a chunk."""
        return backward(kept, g, self.chunk(c))

    def first_gradients(self, x: jax.Array, g: jax.Array) -> Pair:
        """Compute those of layer 1."""
        return self._end_gradients(x, g, 1, self.first)

    def slot_gradients(self, c: int, k: int, kept: Kept, deferred: Deferred) -> Pair:
        """Run W of a slot."""
        return slot_gradient(kept, deferred, k + 1, self.chunk(c))

    def last_gradients(self, z: jax.Array, g: jax.Array) -> Pair:
        """Compute those of layer L+1."""
        return self._end_gradients(z, g, self.num_layers, self.last)

    def _end_gradients(self, before: jax.Array, g: jax.Array, l: int, pair: Pair) -> Pair:
        chunk = self.chunk(0)
        h = gathered_input(before, l, chunk)
        return weight_gradient(g, h, l, chunk, bias=pair[1] is not None)

    @property
    def num_layers(self) -> int:
        """Layers of the stage's chain: the first, those of a chunk, the last."""
        return len(self.placement.chain.words)

    def has(self, c: int, k: int) -> jax.Array | bool:
        """Return whether this stage has a layer in a slot."""
        filled = self.chunk(c).filled
        return True if filled is None else filled > k

    def moved_h(self, z: jax.Array, by: int) -> jax.Array:
        """Return the z that has come from the stage `by` places on, as a chunk takes it in."""
        return self._moved(z, by, self.stages.slots_per_chunk)

    def moved_g(self, g: jax.Array, by: int) -> jax.Array:
        """Return the g that has come from the stage `by` places on, as B takes it in."""
        return self._moved(g, by, 0)

    def _moved(self, array: jax.Array, by: int, layer: int) -> jax.Array:
        """Move an array, turned where a chunk has an odd number of slots.

        z leaves a chunk in the order of axes of its last layer, and enters one in that of the
        first's input; g the other way round.
        """
        axes = {**self.placement.chain.axes[layer], "p": "stage"}
        if self.stages.slots_per_chunk % 2:
            return turn("O/g/s B/d -> O/s/g B/d", array, ("p", by), **axes)
        return shift("O/g/s B/d", array, "p", by, **axes) if by else array

    def reduced(self, grads: tuple[Pair, ...]) -> Staged:
        """Sum gradients over data, and those of the ends to where they are."""
        if not self.types.splits_data:  # else W has
            grads = tuple(
                reduced(*pair, self.types, self.chain, axes)
                for pair, (_, axes) in zip(grads, self.pairs, strict=True)
            )
        first, *slots, last = grads
        stacked = [(W[None], None if b is None else b[None]) for W, b in slots]
        return Staged((self._split(first, 0), *stacked, self._split(last, -1)), self.stages)

    def _whole(self, pair: Pair, end: int) -> Pair:
        """Return the first or the last (W, b) as a layer without stages has them."""
        axes = self.placement.ends_axes[end]
        return _each(
            lambda array, held, used: all_gather(f"{held} -> {used}", array, **axes),
            pair,
            self.placement.end_layouts,
            self.placement.chain.param_layouts,
        )

    def _split(self, pair: Pair, end: int) -> Pair:
        """Sum gradients of an end where its parameters are: `_whole`, transposed."""
        axes = self.placement.ends_axes[end]
        return _each(
            lambda array, held, used: reduce_scatter(f"{used} +p -> {held}", array, **axes),
            pair,
            self.placement.end_layouts,
            self.placement.chain.param_layouts,
        )


def _each(function: Callable[..., jax.Array], pair: Pair, *layouts: tuple[str, str]) -> Pair:
    """Return a function of W and of b, where there is one, each with its layouts."""
    W, b = pair
    of_W, of_b = zip(*layouts, strict=True)
    return function(W, *of_W), None if b is None else function(b, *of_b)
