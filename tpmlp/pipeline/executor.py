"""The executor: runs any schedule, one tick after another, all stages in step.

A tick is one turn of a loop. Every stage looks up its task and its slots in the schedule's tables
(tpmlp.pipeline.buffers), runs it, and then messages move one step round the ring of stages: z to
the stage after, g to the one before. Buffers have as many slots as the schedule's peak, not as
there are microbatches, and one more for what nobody will read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tpmlp.activations import Activation
from tpmlp.collectives import (
    all_gather,
    all_reduce,
    per_stage,
    reduce_scatter,
    shift,
    shift_and_turn,
    stage_index,
    zeros,
)
from tpmlp.kernels import dense, terms
from tpmlp.kernels.backprop import Chain
from tpmlp.kernels.execution import execution
from tpmlp.kernels.network import Finished, Passed
from tpmlp.kernels.objective import Samples, Value
from tpmlp.losses import Head, Loss
from tpmlp.pipeline import chunk as stage
from tpmlp.pipeline.buffers import IDLE, NOTHING, Arrivals, B, F, W
from tpmlp.pipeline.chunk import Chunk, Pair
from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.pipeline.staged import Staged
from tpmlp.regularizers import ElementwisePenalty
from tpmlp.xla import after, hold


class Pipeline(NamedTuple):
    """A chain of dense layers on a mesh with stages.

    Attributes:
        placement: where its arrays are, and its schedule.
        activation: sigma and sigma'.
    """

    placement: PipelinePlacement
    activation: Activation

    @property
    def chain(self) -> Chain:
        """The layers that a stage has at most."""
        return Chain(self.placement.chain, self.activation)

    @property
    def head(self) -> Head:
        """Where z_{L+1} is."""
        return self.chain.head

    @property
    def adds(self) -> bool:
        """Nothing: it adds nothing to the objective."""
        return False

    def forward(self, params: Staged, x: jax.Array, share: jax.Array | None) -> Passed:
        """Run forward, the whole batch at once, one stage after another."""

        def back(g: jax.Array, reduce: bool) -> Finished:
            raise NotImplementedError("a pipeline's step is value_and_grad")

        return Passed(outputs(params, x, self), None, back)

    @property
    def kept_specs(self) -> tuple[()]:
        """Nothing is kept."""
        return ()

    def outputs(self, params: Staged, x: jax.Array) -> tuple[jax.Array, tuple[()]]:
        """Return z_{L+1}; nothing is kept."""
        return outputs(params, x, self), ()

    def gradients(self, params: Staged, x: jax.Array, kept: Any, g: jax.Array) -> Any:
        """Refuse: what was not kept cannot be gone back through."""
        raise ValueError(
            "apply must not be differentiated on a mesh with stages, where it keeps nothing: got "
            f"stage={self.placement.sizes['stage']}. Use value_and_grad(model, loss=None, ...) and "
            "step(params, x, cotangent=...)."
        )

    def dropping(self, words: jax.Array) -> "Pipeline":
        """Return the pipeline: it drops nothing."""
        return self


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


class Row(NamedTuple):
    """What a stage does in one tick; slots of buffers, the last one of each for nothing.

    Attributes:
        task: 0 for nothing, or 1 + 3 * chunk + 0, 1 or 2 for F, B or W.
        microbatch: of the task.
        activations: read by B and W.
        inbox_h: read by F.
        inbox_g: read by B.
        deferred: read by W.
        keeps: slot of the activations that F fills.
        defers: slot of deferred that B fills.
        arrivals: slots (h, g) for what the three rings bring: from the stage before, from the
            stage after, from itself.
    """

    task: Any
    microbatch: Any
    activations: Any
    inbox_h: Any
    inbox_g: Any
    deferred: Any
    keeps: Any
    defers: Any
    arrivals: tuple[tuple[Any, Any], ...]


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
    carry = step.run()
    axes = {**network.head.axes, "p": "stage"}
    sums = all_reduce("K +d+p -> K +d", carry.sums, **axes)
    mean, correct = terms.means(sums, total, network, loss)
    value = Value(mean, total, correct)
    value = Value(*(scalar if scalar is None else scalar.astype(step.dtype) for scalar in value))
    grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), step.reduced(carry.grads), params)
    return value, terms.add_penalty(params, grads, network, penalty) if penalty else grads


def outputs(params: Staged, x: jax.Array, network: Pipeline) -> jax.Array:
    """Compute z_{L+1}, "C/g/s B/d" on every stage, of a batch that goes through as one.

    Each stage waits for the one before: it is for looking, where nothing has to be fast.
    """
    samples = Samples(x, None, jnp.zeros(x.shape[0], x.dtype))
    step = _Step(params, samples, jnp.zeros((), x.dtype), network, None)
    return step.look(x)


class _Step:
    """One training step on one device's blocks."""

    def __init__(
        self,
        params: Staged,
        samples: Samples,
        total: jax.Array,
        network: Pipeline,
        loss: Loss | None,
    ) -> None:
        placement = network.placement
        self.network, self.placement, self.loss, self.total = network, placement, loss, total
        self.dtype = params.first[0].dtype
        self.types = execution(placement, self.dtype)
        self.stage, self.stages = stage_index(), placement.stages
        self.first, self.last = (
            _whole(pair, axes)
            for pair, axes in zip((params.first, params.last), placement.ends_axes, strict=True)
        )
        self.slots = [tuple(None if a is None else a[0] for a in pair) for pair in params.slots]
        m = placement.strategy.microbatches if loss is not None else 1
        self.parts = jax.tree.map(lambda a: a.reshape(m, -1, *a.shape[1:]), samples)

    @property
    def num_tensor_devices(self) -> int:
        """The devices that share the features of a stage."""
        return self.placement.sizes["x"] * self.placement.sizes["y"]

    @property
    def splits(self) -> bool:
        """Whether a gradient leaves after B, not after the W that follows."""
        return self.placement.schedule.splits_backward

    def run(self) -> Carry:
        """Run the table."""
        carry, _ = lax.scan(self.tick, self.start(), self.rows())
        return carry

    def look(self, x: jax.Array) -> jax.Array:
        """Run the layers of one virtual stage after another, each on its own stage."""
        route, per_chunk = self.placement.schedule.route, self.stages.slots_per_chunk
        chain = self.placement.chain
        z = per_stage(self.types.to_compute(stage.layer_forward(x, self.first, 1, self.chunk(0))))
        for virtual in range(route.num_virtual_stages):
            at, c = route.place(virtual)

            def run(z: jax.Array, c: int = c) -> jax.Array:
                return per_stage([z, *stage.forward(z, self.chunk(c))][-1])

            z = lax.cond(self.stage == at, run, jnp.zeros_like, z)
            if virtual + 1 < route.num_virtual_stages:
                receiver, _ = route.place(virtual + 1)
                by = -route.ring(at, receiver, "F")
                z = _moved(z, by, per_chunk, chain.axes[per_chunk])
        axes = {**chain.axes[-1], "p": "stage"}

        def last(z: jax.Array) -> jax.Array:
            outputs = stage.layer_forward(z, self.last, per_chunk + 2, self.chunk(0))
            return per_stage(outputs.astype(self.dtype))

        shape = (chain.padded_widths[-1] // self.num_tensor_devices, x.shape[0])
        nothing = zeros("O/g/s B/d +p", shape, self.dtype, **axes)
        found = lax.cond(self.stage == at, last, lambda z: nothing, z)
        return all_reduce("O/g/s B/d +p -> O/g/s B/d", found, **axes)

    def rows(self) -> Row:
        """Return this stage's columns of the tables."""
        plan = self.placement.buffers

        def column(table: np.ndarray) -> jax.Array:
            return lax.dynamic_index_in_dim(jnp.asarray(table), self.stage, 1, keepdims=False)

        def slots(table: np.ndarray, size: int, *, of: int | None = None) -> jax.Array:
            unused = table == NOTHING if of is None else plan.kind != of
            return column(np.where(unused, np.int32(size), table))

        def arrivals(of: Arrivals) -> tuple[jax.Array, jax.Array]:
            return slots(of.h, plan.num_inbox_h), slots(of.g, plan.num_inbox_g)

        return Row(
            task=column(np.where(plan.kind == IDLE, np.int32(0), 3 * plan.chunk + plan.kind)),
            microbatch=column(np.maximum(plan.microbatch, np.int32(0))),
            activations=slots(plan.activations, plan.num_activations),
            inbox_h=slots(plan.inbox_h, plan.num_inbox_h),
            inbox_g=slots(plan.inbox_g, plan.num_inbox_g),
            deferred=slots(plan.deferred, plan.num_deferred),
            keeps=slots(plan.activations, plan.num_activations, of=F),
            defers=slots(plan.deferred, plan.num_deferred, of=B),
            arrivals=tuple(map(arrivals, (plan.from_before, plan.from_after, plan.from_self))),
        )

    def start(self) -> Carry:
        """Return buffers of zeros, a slot more than the schedule needs of each."""
        plan, chain = self.placement.buffers, self.placement.chain
        width = chain.padded_widths[1] // self.num_tensor_devices
        rows, per_chunk = self.parts.x.shape[1], max(1, self.stages.slots_per_chunk)
        axes, types = {**chain.axes[0], "p": "stage"}, self.types

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
            grads=tuple(
                gradient(pair, axes)
                for pair, axes in zip(
                    (self.first, *self.slots, self.last), self.axes_of_layers, strict=True
                )
            ),
            sums=zeros("K +d+p", (2,), types.accumulate, **axes),
        )

    @property
    def axes_of_layers(self) -> list[dict[str, str]]:
        """Mesh axes of the roles of the first layer, the slots and the last layer."""
        first, *interior, last = self.placement.chain.axes
        return [first, *interior * self.placement.schedule.num_chunks, last]

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
        per_chunk, route = self.stages.slots_per_chunk, self.placement.schedule.route
        summed = list(grads)
        jobs = []
        for c in range(self.placement.schedule.num_chunks):
            chunk = self.chunk(c)
            for k in range(1, per_chunk + 1):
                here = row.task == 3 * c + W
                here = here if chunk.filled is None else here & (chunk.filled >= k)
                jobs.append((c * per_chunk + k, here, all_g[k - 1], z[k - 1], k + 1, chunk))
        for i, virtual, kind, g, h, l in (
            (0, 0, B, done.g_out, x, 1),
            (-1, route.num_virtual_stages - 1, F, done.g_last, done.z_out, per_chunk + 2),
        ):
            stage_of, c = route.place(virtual)
            here = (row.task == 3 * c + kind) & (self.stage == stage_of)
            jobs.append((i, here, g, h, l, self.chunk(c)))
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
        nothing = jax.tree.map(lambda a: a.astype(self.types.total), shapes)
        part = lax.cond(here, due, lambda g, before: nothing, g, before)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, part)

    def moved(self, carry: Carry, row: Row, z: jax.Array, g: jax.Array) -> Carry:
        """Move z and g round the ring, and put what has come into the inboxes."""
        plan, per_chunk = self.placement.buffers, self.stages.slots_per_chunk
        inbox_h, inbox_g = carry.inbox_h, carry.inbox_g
        axes = self.placement.chain.axes
        ways = zip((-1, 1, 0), (plan.from_before, plan.from_after, plan.from_self), strict=True)
        for (by, arrivals), (h_slot, g_slot) in zip(ways, row.arrivals, strict=True):
            if (arrivals.h != NOTHING).any():
                came = _moved(z, by, per_chunk, axes[per_chunk])
                inbox_h = _put(inbox_h, h_slot, came)
            if (arrivals.g != NOTHING).any():
                # What the loss leaves for its own stage is as B reads it.
                came = _moved(g, by, per_chunk, axes[0]) if by else g
                inbox_g = _put(inbox_g, g_slot, came)
        return carry._replace(inbox_h=inbox_h, inbox_g=inbox_g)

    def idle(self, part: Samples, z: jax.Array, came: jax.Array, g: jax.Array) -> Done:
        """Do nothing, and leave zeros."""
        total = self.types.total
        outputs = self.placement.chain.padded_widths[-1] // self.num_tensor_devices
        axes = self.placement.chain.axes[-1]
        return Done(
            z=jnp.zeros_like(z),
            all_g=jnp.zeros_like(z, total),
            z_out=jnp.zeros_like(came),
            g_out=jnp.zeros_like(g),
            g_last=zeros("O/g/s B/d", (outputs, g.shape[1]), total, **axes),
            sums=zeros("K +d", (2,), self.types.accumulate, **axes),
        )

    def forward(self, c: int, part: Samples, z: jax.Array, came: jax.Array, g: jax.Array) -> Done:
        """Run F of a chunk."""
        chunk, route = self.chunk(c), self.placement.schedule.route
        nothing = self.idle(part, z, came, g)
        z_in = self.where(
            route.place(0),
            c,
            lambda: self.types.to_compute(stage.layer_forward(part.x, self.first, 1, chunk)),
            lambda: came,
        )
        passed = stage.forward(z_in, chunk)
        kept = jnp.stack([z_in, *passed[:-1]])
        done = nothing._replace(z=kept, z_out=passed[-1] if passed else z_in)
        return self.where(
            route.place(route.num_virtual_stages - 1),
            c,
            lambda: self.at_loss(done, part, chunk),
            lambda: done,
        )

    def at_loss(self, done: Done, part: Samples, chunk: Chunk) -> Done:
        """Run the last layer and the loss, and come back to g_K."""
        z, l = done.z_out, len(chunk.slots) + 2
        outputs = stage.layer_forward(z, self.last, l, chunk).astype(self.dtype)
        sums, g = terms.at_outputs(
            outputs, part.y, part.weight, self.total, self.network, self.loss
        )
        g = g.astype(self.types.total)
        g_out = stage.input_gradient(g, z, self.last, l, chunk)
        return done._replace(g_out=g_out, g_last=g, sums=sums.astype(self.types.accumulate))

    def backward(self, c: int, part: Samples, z: jax.Array, came: jax.Array, g: jax.Array) -> Done:
        """Run B of a chunk."""
        nothing = self.idle(part, z, came, g)
        all_g, g_in = stage.backward(list(z), g, self.chunk(c))
        return nothing._replace(all_g=jnp.stack(all_g) if all_g else nothing.all_g, g_out=g_in)

    def chunk(self, c: int) -> Chunk:
        """Return a chunk of this stage."""
        per_chunk = self.stages.slots_per_chunk
        counts = [self.stages.count(s, c) for s in range(self.placement.sizes["stage"])]
        filled = None if min(counts) == per_chunk else jnp.asarray(counts)[self.stage]
        slots = tuple(self.slots[c * per_chunk : (c + 1) * per_chunk])
        return Chunk(self.network.chain, self.types, slots, filled)

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

    def reduced(self, grads: tuple[Pair, ...]) -> Staged:
        """Sum gradients over data, and those of the ends to where they are."""
        over_data = [
            (
                dense.reduce_weight(W, self.types, **axes),
                None if b is None else dense.reduce_bias(b, self.types, **axes),
            )
            for (W, b), axes in zip(grads, self.axes_of_layers, strict=True)
        ]
        first, *slots, last = over_data
        ends = self.placement.ends_axes
        stacked = [tuple(None if a is None else a[None] for a in pair) for pair in slots]
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


def _moved(array: jax.Array, by: int, num_slots: int, axes: dict[str, str]) -> jax.Array:
    """Return what the stage `by` places on holds, turned where a chunk has an odd number of slots.

    z leaves a chunk in the order of axes of its last layer, and enters one in that of the first's
    input; g the other way round.
    """
    axes = {**axes, "p": "stage"}
    if num_slots % 2:
        return shift_and_turn("O/g/s B/d -> O/s/g B/d", array, "p", by, **axes)
    return shift("O/g/s B/d", array, "p", by, **axes) if by else array


def _after_all(array: jax.Array, others: Any) -> jax.Array:
    """Return an array that is not there before others are."""
    for other in jax.tree.leaves(others):
        array = after(array, other)
    return hold((array, others))[0]


def _at(buffer: Any, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(buffer, index, keepdims=False)


def _put(buffer: jax.Array, slot: jax.Array, array: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, array.astype(buffer.dtype), slot, 0)
