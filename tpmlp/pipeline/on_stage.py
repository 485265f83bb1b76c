"""One device of a pipeline: its stage's layers, what moves to the next stage, and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.collectives import (
    all_gather,
    per_stage,
    reduce_scatter,
    shift,
    stage_index,
    turn,
)
from tpmlp.kernels import dense
from tpmlp.kernels.backprop import Chain
from tpmlp.kernels.execution import execution
from tpmlp.pipeline.chunk import Chunk, Pair
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
        first, last = placement.ends_axes
        self.first, self.last = _whole(params.first, first), _whole(params.last, last)
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

    def where(
        self, place: tuple[int, int], c: int, there: Callable[[], Any], elsewhere: Callable[[], Any]
    ) -> Any:
        """Return one value on the stage of a place, (stage, chunk), and another elsewhere."""
        at, chunk = place
        if chunk != c:
            return elsewhere()
        return lax.cond(
            self.stage == at, lambda: per_stage(there()), lambda: per_stage(elsewhere())
        )

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
        over_data = [
            (
                dense.reduce_weight(W, self.types, **axes),
                None if b is None else dense.reduce_bias(b, self.types, **axes),
            )
            for (W, b), (_, axes) in zip(grads, self.pairs, strict=True)
        ]
        first, *slots, last = over_data
        ends = self.placement.ends_axes
        stacked = [(W[None], None if b is None else b[None]) for W, b in slots]
        layers = (_split(first, ends[0]), *stacked, _split(last, ends[1]))
        return Staged(layers, self.stages)


def _whole(pair: Pair, axes: dict[str, str]) -> Pair:
    """Return an end's (W, b) as its layer uses them."""
    W, b = pair
    whole = all_gather("O/g/p I/s -> O/g I/s", W, **axes)
    return whole, None if b is None else all_gather("O/g/s/p -> O/g/s", b, **axes)


def _split(pair: Pair, axes: dict[str, str]) -> Pair:
    """Sum an end's gradients over the stages, where its parameters are: `_whole`, transposed."""
    W, b = pair
    dW = reduce_scatter("O/g I/s +p -> O/g/p I/s", W, **axes)
    return dW, None if b is None else reduce_scatter("O/g/s +p -> O/g/s/p", b, **axes)
