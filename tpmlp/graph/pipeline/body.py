"""One stage of a graph on one device: a tpmlp.pipeline.body.Body.

    F   a block forward                        keeps what the engine keeps, and the message it read
    B   back through it to the message         leaves g of the vertices that have parameters
    W   gradients of parameters, from both

Under keep="recompute" F keeps the message alone; B runs the block forward again, and what that
keeps goes on to W. The ends keep nothing: their passes back run them forward again, in the tick
that did so first or in the one whose g they take.
"""

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.collectives import (
    block_index,
    per_stage,
    shift,
    stage_index,
    turn_in_group,
    zeros,
    zeros_of,
)
from tpmlp.graph import engine
from tpmlp.graph.engine import Arrays, Forward, Kept, Params
from tpmlp.graph.pipeline.gradients import no_gradients, reduced, whole_ends
from tpmlp.graph.pipeline.part import Part
from tpmlp.graph.pipeline.placement import GraphOnStages
from tpmlp.graph.pipeline.staged import StagedGraph
from tpmlp.graph.placement import GraphPlacement, Orientation
from tpmlp.graph.rules import Given
from tpmlp.graph.shape import seed_of
from tpmlp.kernels.execution import execution
from tpmlp.kernels.network import param_dtype
from tpmlp.pipeline.body import Empty


class Deferred(NamedTuple):
    """What W reads of a block's B.

    Attributes:
        g: by vertex that uses parameters, laid out as r, in the total type.
        kept: what the block kept when B ran it again; None where F kept it.
    """

    g: Arrays
    kept: Kept | None


class GraphOnStage:
    """A stage's blocks on one device.

    Attributes:
        placement: where everything is.
        stages: which block is where.
        dtype: of the parameters.
        types: of products and sums.
        stage: this device's stage, known when the program runs.
        first: parameters of the first part, whole.
        last: the last part.
        slots: the blocks.
    """

    def __init__(
        self, params: StagedGraph, placement: GraphOnStages, words: jax.Array | None
    ) -> None:
        self.placement, self.stages = placement, placement.stages
        self.dtype = param_dtype(params)
        self.types = execution(placement, self.dtype)
        self.stage = stage_index()
        self.given = Given(self.types, placement.sizes, words, first_sample=0, share=None)
        ends = whole_ends(params, placement)
        cut = placement.cut
        self.first = {here: ends[owner] for here, owner in cut.first.owners}
        last = {here: ends[owner] for here, owner in cut.last.owners}
        self.last = Part(last, placement.last, self.given)
        self._shapes: dict[int, Any] = {}
        self.slots = [
            Part(
                jax.tree.map(lambda a: a[0], slot),
                placement.block,
                self.given._replace(seeds=self._seeds(k)),
            )
            for k, slot in enumerate(params.slots)
        ]

    def at(self, microbatch: Any, rows: int) -> "GraphOnStage":
        """Return the body for one microbatch."""
        num_microbatches = self.placement.strategy.microbatches
        first = (block_index("B/d", d="data") * num_microbatches + microbatch) * rows
        body = copy(self)

        def of_part(part: Part) -> Part:
            return part._replace(given=part.given._replace(first_sample=first))

        body.given = self.given._replace(first_sample=first)
        body.last, body.slots = of_part(self.last), [of_part(block) for block in self.slots]
        return body

    def empty(self, rows: int) -> Empty:
        """Return zeros for microbatches of `rows` samples a device."""
        placement, output = self.placement, self.placement.last.output
        columns = rows * placement.block.output.shape.positions
        message, g = self._messages(columns)
        kept, deferred = self._left(columns)
        of_outputs = (
            output.padded_width // output.num_tensor_devices,
            rows * output.shape.positions,
        )
        head = {**placement.last.head_axes, "p": "stage"}
        slot = no_gradients(self.slots[0].params, placement.block, self.types)
        return Empty(
            message=message,
            gradient=g,
            kept=(kept,) * self.stages.slots_per_chunk,
            deferred=(deferred,) * self.stages.slots_per_chunk,
            outputs=zeros("C/g/s B/d +p", of_outputs, self.types.total, **head),
            grads=(
                no_gradients(self.first, placement.first, self.types),
                *(slot,) * self.stages.num_slots,
                no_gradients(self.last.params, placement.last, self.types),
            ),
        )

    def enter(self, x: Any) -> jax.Array:
        """Run the first part."""
        part = self.placement.first
        passed = engine.forward(self.first, part.named_inputs(x), self.given, part)
        return self._leaving(passed, part)

    def forward(self, c: int, z: jax.Array) -> tuple[tuple[Kept, ...], jax.Array]:
        """Run F of a chunk."""
        kept = []
        for k, block in enumerate(self._chunk(c)):

            def there(z: jax.Array, block: Part = block) -> tuple[Kept, jax.Array]:
                return self._block_forward(block, z)

            def absent(z: jax.Array) -> tuple[Kept, jax.Array]:
                return self._left(z.shape[1])[0], z

            mine, z = self._if_filled(c, k, there, absent, z)
            kept.append(mine)
        return tuple(kept), z

    def leave(self, z: jax.Array) -> jax.Array:
        """Run the last part; its outputs in the type of the parameters."""
        # Not .output: a part without parameters knows no type of its own.
        passed, output = self.last.forward(z), self.placement.last.graph.output
        return passed.values[output].astype(self.dtype)

    def leave_backward(self, z: jax.Array, g: jax.Array) -> jax.Array:
        """Go back through the last part."""
        kept = self.last.forward(z).kept
        return self.last.backward(kept, g).inputs[self.last.source]

    def backward(
        self, c: int, kept: tuple[Kept, ...], g: jax.Array
    ) -> tuple[tuple[Deferred, ...], jax.Array]:
        """Run B of a chunk."""
        deferred = []
        for k, block in reversed(list(enumerate(self._chunk(c)))):

            def there(kept: Kept, g: jax.Array, block: Part = block) -> tuple[Deferred, jax.Array]:
                return self._block_backward(block, kept, g)

            def absent(kept: Kept, g: jax.Array) -> tuple[Deferred, jax.Array]:
                return self._left(g.shape[1])[1], g

            mine, g = self._if_filled(c, k, there, absent, kept[k], g)
            deferred.append(mine)
        return tuple(deferred[::-1]), g

    def first_gradients(self, x: Any, g: jax.Array) -> Params:
        """Compute those of the first part."""
        part = self.placement.first
        inputs = part.named_inputs(x)
        kept = engine.forward(self.first, inputs, self.given, part).kept
        g = self._turned(g, self._start, part.oriented(part.graph.output))
        reduce = self.types.splits_data
        return engine.backward(self.first, inputs, kept, g, self.given, part, reduce=reduce).grads

    def slot_gradients(self, c: int, k: int, kept: Kept, deferred: Deferred) -> Params:
        """Run W of a slot."""
        again = deferred.kept
        return self._chunk(c)[k].gradients(kept if again is None else again, deferred.g)

    def last_gradients(self, z: jax.Array, g: jax.Array) -> Params:
        """Compute those of the last part."""
        kept = self.last.forward(z).kept
        return self.last.gradients(kept, self.last.backward(kept, g).g)

    def has(self, c: int, k: int) -> jax.Array | bool:
        """Return whether this stage has a block in a slot."""
        counts = [self.stages.count(s, c) for s in range(self.placement.sizes["stage"])]
        return True if min(counts) > k else jnp.asarray(counts)[self.stage] > k

    def moved_h(self, z: jax.Array, by: int) -> jax.Array:
        """Return the z that has come from the stage `by` places on, as a chunk takes it in."""
        return shift("F/s/g B/d", z, "p", by, **self.placement.message_axes) if by else z

    def moved_g(self, g: jax.Array, by: int) -> jax.Array:
        """Return the g that has come from the stage `by` places on, as B takes it in."""
        return self.moved_h(g, by)

    def reduced(self, grads: tuple[Params, ...]) -> StagedGraph:
        """Sum gradients over data, and those of the ends to where they are."""
        return reduced(grads, self.placement, self.types)

    def _block_forward(self, block: Part, z: jax.Array) -> tuple[Kept, jax.Array]:
        passed = block.forward(z)
        kept = Kept({block.source: z}, {}) if self._recomputes else passed.kept
        return kept, self._leaving(passed, block.placement)

    def _block_backward(self, block: Part, kept: Kept, g: jax.Array) -> tuple[Deferred, jax.Array]:
        again = block.forward(kept.values[block.source]).kept if self._recomputes else None
        part = block.placement
        g = self._turned(g, self._start, part.oriented(part.graph.output))
        found = block.backward(kept if again is None else again, g)
        users = [node.name for node in part.program if node.owner in part.graph.arrays]
        return Deferred({name: found.g[name] for name in users}, again), found.inputs[block.source]

    def _left(self, columns: int) -> tuple[Kept, Deferred]:
        """Return zeros like what a block's F and B leave of a message."""

        def run(z: jax.Array, g: jax.Array) -> Any:
            kept, _ = self._block_forward(self.slots[0], z)
            deferred, _ = self._block_backward(self.slots[0], kept, g)
            return per_stage((kept, deferred))

        if columns not in self._shapes:
            self._shapes[columns] = jax.eval_shape(run, *self._messages(columns))
        return zeros_of(self._shapes[columns])

    def _messages(self, columns: int) -> tuple[jax.Array, jax.Array]:
        """Return zeros like z and g of a message."""
        source = self.placement.block.nodes[self.placement.cut.source]
        shape = source.padded_width // source.num_tensor_devices, columns
        z, g = (
            zeros("F/s/g B/d +p", shape, dtype, **self.placement.message_axes)
            for dtype in (self.types.compute, self.types.total)
        )
        return z, g

    def _leaving(self, passed: Forward, part: GraphPlacement) -> jax.Array:
        """Return what a part gives as the message that the next one reads."""
        output = part.graph.output
        z = self.types.to_compute(passed.values[output])
        return self._turned(z, part.oriented(output), self._start)

    @cached_property
    def _start(self) -> Orientation:
        """The orientation of messages."""
        return self.placement.block.start

    @property
    def _recomputes(self) -> bool:
        return self.placement.strategy.keep == "recompute"

    def _turned(self, array: jax.Array, at: Orientation, wanted: Orientation) -> jax.Array:
        """Return an array in an orientation."""
        if at == wanted:
            return array
        axes = {"s": at[0], "g": at[1], "d": "data"}
        return turn_in_group("F/s/g B/d -> F/g/s B/d", array, **axes)

    def _seeds(self, slot: int) -> dict[str, jax.Array]:
        """Return what stands for the vertices that drop in random draws, in this stage's block."""
        cut = self.placement.cut
        blocks = [self.stages.layer_in(slot, s) or 0 for s in range(self.placement.sizes["stage"])]
        return {
            name: jnp.asarray([seed_of(cut.owner_in(i, name)) for i in blocks], jnp.uint32)[
                self.stage
            ]
            for name in cut.block.dropouts
        }

    def _chunk(self, c: int) -> list[Part]:
        per_chunk = self.stages.slots_per_chunk
        return self.slots[c * per_chunk : (c + 1) * per_chunk]

    def _if_filled(
        self, c: int, k: int, there: Callable[..., Any], absent: Callable[..., Any], *args: Any
    ) -> Any:
        """Run a block where this stage has one in a slot."""
        if (has := self.has(c, k)) is True:
            return there(*args)
        return lax.cond(
            has, lambda *a: per_stage(there(*a)), lambda *a: per_stage(absent(*a)), *args
        )
