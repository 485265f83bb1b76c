"""The executor: runs any schedule, one tick after another, all stages in step.

A tick is one turn of a loop. Every stage looks up its task and its slots in the schedule's tables
(tpmlp.pipeline.buffers), runs it, and then messages move one step round the ring of stages: z to
the stage after, g to the one before. Buffers have as many slots as the schedule's peak, not as
there are microbatches, and one more for what nobody will read.

All stages are in step: messages end a tick, so that it takes as long as its slowest task. A runtime
with a process a stage waits for what a task needs and for nothing else. Where F, B and W take the
same, as the products of an MLP do, both take as long; else the difference is what lockstep costs,
by tpmlp.simulate for 4 stages and 8 microbatches, in units of the mean task of a whole stage:

    schedule            F = B = W = 1            F = 1, B = 1.2, W = 0.8
                        both                     a process a stage   in step
    gpipe               33                       33                  33
    1f1b                33                       33                  37.6
    interleaved, v = 2  28.5                     28.5                32.1
    zb-h1               27                       28.2                31.2
    zb-h2               27                       27                  30
    zb-v                25.5                     29.6                29.6

Ticks of one F, one B and one W each (Simulated.paired_s) would take longer: 1f1b 42, zb-h1 39.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.collectives import all_reduce, per_stage, zeros
from tpmlp.kernels import terms
from tpmlp.kernels.objective import Samples, Value
from tpmlp.losses import Loss
from tpmlp.pipeline import chunk as stage
from tpmlp.pipeline.buffers import NOTHING, B, F, W
from tpmlp.pipeline.chunk import Chunk, Pair
from tpmlp.pipeline.network import Pipeline
from tpmlp.pipeline.on_stage import OnStage
from tpmlp.pipeline.staged import Staged
from tpmlp.pipeline.tables import Row, columns
from tpmlp.regularizers import ElementwisePenalty
from tpmlp.xla import after, hold


class Carry(NamedTuple):
    """What a stage has between two ticks.

    Attributes:
        activations: z_in, z_1 .. z_{K-1} of a chunk, "S K F/g/s B/d" in the compute type.
        inbox_h: z_in that have come, "S F/g/s B/d".
        inbox_g: g_K that have come, likewise, in the total type.
        deferred: g_1 .. g_K that wait for W, "S K F/g/s B/d".
        leaving: the g_in that leaves with the W after its B, "F/s/g B/d"; None where B sends it.
        grads: sums so far, "+d", as the layers use them: the ends whole.
        sums: of loss and correct, "K +d".
    """

    activations: jax.Array
    inbox_h: jax.Array
    inbox_g: jax.Array
    deferred: jax.Array
    leaving: jax.Array | None
    grads: tuple[Pair, ...]
    sums: jax.Array


class Done(NamedTuple):
    """What a task leaves; zeros where it does not.

    Attributes:
        z: z_in, z_1 .. z_{K-1}, for the activations.
        all_g: g_1 .. g_K, for deferred.
        z_out: z_K, for the stage after.
        g_out: g_in for the stage before; of the last F, g_K for the stage itself.
        g_last: g of the outputs.
        sums: of loss and correct.
    """

    z: jax.Array
    all_g: jax.Array
    z_out: jax.Array
    g_out: jax.Array
    g_last: jax.Array
    sums: jax.Array


def value_and_grad(
    params: Staged,
    x: jax.Array,
    y: Any,
    weight: jax.Array,
    *,
    network: Pipeline,
    loss: Loss,
    penalty: ElementwisePenalty | None,
) -> tuple[Value, Staged]:
    """Compute the loss of a batch and its gradient; as tpmlp.kernels.objective.accumulate."""
    total = terms.total_weight(weight, network)
    step = _Step(params, Samples(x, y, weight), total, network, loss)
    carry, _ = lax.scan(
        step.tick, step.start(), columns(network.placement.buffers, step.here.stage)
    )
    sums = all_reduce("K +d+p -> K +d", carry.sums, p="stage", **network.head.axes)
    mean, correct = terms.means(sums, total, network, loss)
    value = Value(*(scalar.astype(step.dtype) for scalar in (mean, total, correct)))
    grads = step.here.reduced(carry.grads)
    grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), grads, params)
    return value, terms.add_penalty(params, grads, network, penalty) if penalty else grads


class _Step:
    """One training step on one device's blocks."""

    def __init__(
        self, params: Staged, samples: Samples, total: jax.Array, network: Pipeline, loss: Loss
    ) -> None:
        self.network, self.placement, self.loss, self.total = (
            network,
            network.placement,
            loss,
            total,
        )
        self.here = OnStage(params, network.placement, network.chain)
        self.dtype, self.per_chunk = params.first[0].dtype, self.placement.stages.slots_per_chunk
        m = self.placement.strategy.microbatches
        self.parts = jax.tree.map(lambda a: a.reshape(m, -1, *a.shape[1:]), samples)

    @property
    def splits(self) -> bool:
        """Whether a gradient leaves after B, not after the W that follows."""
        return self.placement.schedule.splits_backward

    def start(self) -> Carry:
        """Return buffers of zeros, a slot more than the schedule needs of each."""
        here, plan, chain = self.here, self.placement.buffers, self.placement.chain
        width = chain.padded_widths[1] // here.num_tensor_devices
        rows, per_chunk = self.parts.x.shape[1], max(1, self.per_chunk)
        axes, types = {**chain.axes[0], "p": "stage"}, here.types

        def buffer(size: int, dtype: Any, *slots: int) -> jax.Array:
            layout = "S K O/g/s B/d +p" if slots else "S O/g/s B/d +p"
            return zeros(layout, (size + 1, *slots, width, rows), dtype, **axes)

        def gradient(pair: Pair, axes: dict[str, str]) -> Pair:
            W, b = pair
            layouts = ("O/g I/s +d+p", "O/g/s +d+p")
            named = {**axes, "p": "stage"}
            return (
                zeros(layouts[0], W.shape, types.accumulate, **named),
                None if b is None else zeros(layouts[1], b.shape, types.accumulate, **named),
            )

        return Carry(
            activations=buffer(plan.num_activations, types.compute, per_chunk),
            inbox_h=buffer(plan.num_inbox_h, types.compute),
            inbox_g=buffer(plan.num_inbox_g, types.total),
            deferred=buffer(plan.num_deferred, types.total, per_chunk),
            leaving=None if self.splits else buffer(0, types.total)[0],
            grads=tuple(gradient(pair, axes) for pair, axes in here.pairs),
            sums=zeros("K +d+p", (2,), types.accumulate, **axes),
        )

    def tick(self, carry: Carry, row: Row) -> tuple[Carry, None]:
        """Run a task on each stage, then move messages.

        A branch gives back only what one task leaves: XLA copies whatever goes through one.
        """
        part: Samples = jax.tree.map(lambda a: _at(a, row.microbatch), self.parts)
        read = (
            part,
            _at(carry.activations, row.activations),
            _at(carry.inbox_h, row.inbox_h),
            _at(carry.inbox_g, row.inbox_g),
        )
        tasks: list[Callable[..., Done]] = [self.idle]
        for c in range(self.placement.schedule.num_chunks):
            tasks += [partial(self.forward, c), partial(self.backward, c), self.idle]
        branches = [lambda *read, task=task: per_stage(task(*read)) for task in tasks]
        done = lax.switch(row.task, branches, *read)
        all_g = _at(carry.deferred, row.deferred)
        grads = self.with_gradients(carry.grads, row, part.x, read[1], all_g, done)
        g_out, leaving = done.g_out, carry.leaving
        if leaving is not None:
            is_B, is_W = ((row.task - 1) % 3 == kind for kind in (1, 2))
            g_out = jnp.where(is_W & (row.task > 0), leaving, g_out)
            leaving = jnp.where(is_B, done.g_out, leaving)
        # Buffers are written when all have read them, or XLA would write a copy.
        kept, deferred = (_after_all(array, grads) for array in (done.z, done.all_g))
        carry = carry._replace(
            activations=_put(carry.activations, row.keeps, kept),
            deferred=_put(carry.deferred, row.defers, deferred),
            leaving=leaving,
            grads=grads,
            sums=carry.sums + done.sums,
        )
        return self.moved(carry, row, done.z_out, g_out), None

    def with_gradients(
        self,
        grads: tuple[Pair, ...],
        row: Row,
        x: jax.Array,
        z: jax.Array,
        all_g: jax.Array,
        done: Done,
    ) -> tuple[Pair, ...]:
        """Return sums of gradients with those of this tick added, one layer after another.

        Of the slots with W; of layer 1 with its B, and of layer L+1 with its F, whose g and h are
        there then and nowhere kept.
        """
        per_chunk, route = self.per_chunk, self.placement.schedule.route
        summed = list(grads)
        jobs = []
        for c in range(self.placement.schedule.num_chunks):
            chunk = self.here.chunk(c)
            for k in range(1, per_chunk + 1):
                here = row.task == 3 * c + W
                here = here if chunk.filled is None else here & (chunk.filled >= k)
                jobs.append((c * per_chunk + k, here, all_g[k - 1], z[k - 1], k + 1, chunk))
        for i, virtual, kind, g, h, l in (
            (0, 0, B, done.g_out, x, 1),
            (-1, route.num_virtual_stages - 1, F, done.g_last, done.z_out, per_chunk + 2),
        ):
            stage_of, c = route.place(virtual)
            here = (row.task == 3 * c + kind) & (self.here.stage == stage_of)
            jobs.append((i, here, g, h, l, self.here.chunk(c)))
        before = None
        for i, here, g, h, l, chunk in jobs:
            g = g if before is None else hold((after(g, before), before))[0]
            summed[i] = self.add(summed[i], here, g, h, l, chunk)
            before = summed[i][0]
        return tuple(summed)

    def add(
        self, sums: Pair, here: jax.Array, g: jax.Array, before: jax.Array, l: int, chunk: Chunk
    ) -> Pair:
        """Return the sums of a layer's gradients with a microbatch's added, where this is due."""

        def due(g: jax.Array, before: jax.Array) -> Pair:
            return per_stage(stage.weight_gradient(g, before, l, chunk, bias=sums[1] is not None))

        shapes = jax.tree.map(jnp.zeros_like, sums)
        nothing = jax.tree.map(lambda a: a.astype(self.here.types.total), shapes)
        part = lax.cond(here, due, lambda g, before: nothing, g, before)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, part)

    def moved(self, carry: Carry, row: Row, z: jax.Array, g: jax.Array) -> Carry:
        """Move z and g round the ring, and put what has come into the inboxes."""
        plan = self.placement.buffers
        inbox_h, inbox_g = carry.inbox_h, carry.inbox_g
        ways = zip((-1, 1, 0), (plan.from_before, plan.from_after, plan.from_self), strict=True)
        for (by, arrivals), (h_slot, g_slot) in zip(ways, row.arrivals, strict=True):
            if (arrivals.h != NOTHING).any():
                inbox_h = _put(inbox_h, h_slot, self.here.moved_h(z, by))
            if (arrivals.g != NOTHING).any():
                # What the loss leaves for its own stage is as B reads it.
                came = self.here.moved_g(g, by) if by else g
                inbox_g = _put(inbox_g, g_slot, came)
        return carry._replace(inbox_h=inbox_h, inbox_g=inbox_g)

    def idle(self, part: Samples, z: jax.Array, came: jax.Array, g: jax.Array) -> Done:
        """Do nothing, and leave zeros."""
        total = self.here.types.total
        outputs = self.placement.chain.padded_widths[-1] // self.here.num_tensor_devices
        axes = self.placement.chain.axes[-1]
        return Done(
            z=jnp.zeros_like(z),
            all_g=jnp.zeros_like(z, total),
            z_out=jnp.zeros_like(came),
            g_out=jnp.zeros_like(g),
            g_last=zeros("O/g/s B/d", (outputs, g.shape[1]), total, **axes),
            sums=zeros("K +d", (2,), self.here.types.accumulate, **axes),
        )

    def forward(self, c: int, part: Samples, z: jax.Array, came: jax.Array, g: jax.Array) -> Done:
        """Run F of a chunk."""
        chunk, route = self.here.chunk(c), self.placement.schedule.route
        nothing = self.idle(part, z, came, g)
        z_in = self.here.where(
            route.place(0),
            c,
            lambda: self.here.types.to_compute(
                stage.layer_forward(part.x, self.here.first, 1, chunk)
            ),
            lambda: came,
        )
        passed = stage.forward(z_in, chunk)
        kept = jnp.stack([z_in, *passed[:-1]])
        done = nothing._replace(z=kept, z_out=passed[-1] if passed else z_in)
        return self.here.where(
            route.place(route.num_virtual_stages - 1),
            c,
            lambda: self.at_loss(done, part, chunk),
            lambda: done,
        )

    def at_loss(self, done: Done, part: Samples, chunk: Chunk) -> Done:
        """Run the last layer and the loss, and come back to g_K."""
        z, l = done.z_out, len(chunk.slots) + 2
        outputs = stage.layer_forward(z, self.here.last, l, chunk).astype(self.dtype)
        sums, g = terms.at_outputs(
            outputs, part.y, part.weight, self.total, self.network, self.loss
        )
        g = g.astype(self.here.types.total)
        g_out = stage.input_gradient(g, z, self.here.last, l, chunk)
        return done._replace(g_out=g_out, g_last=g, sums=sums.astype(self.here.types.accumulate))

    def backward(self, c: int, part: Samples, z: jax.Array, came: jax.Array, g: jax.Array) -> Done:
        """Run B of a chunk."""
        nothing = self.idle(part, z, came, g)
        all_g, g_in = stage.backward(list(z), g, self.here.chunk(c))
        return nothing._replace(all_g=jnp.stack(all_g) if all_g else nothing.all_g, g_out=g_in)


def _after_all(array: jax.Array, others: Any) -> jax.Array:
    """Return an array that is not there before others are."""
    for other in jax.tree.leaves(others):
        array = after(array, other)
    return hold((array, others))[0]


def _at(buffer: Any, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(buffer, index, keepdims=False)


def _put(buffer: jax.Array, slot: jax.Array, array: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, array.astype(buffer.dtype), slot, 0)
