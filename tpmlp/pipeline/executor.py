"""The executor: runs any schedule, one tick after another, all stages in step.

A tick is one turn of a loop. Every stage looks up its task and its slots in the schedule's tables
(tpmlp.pipeline.buffers), runs it, and then, if any has a message, messages move one step round the
ring of stages: z to the stage after, g to the one before. Buffers have as many slots as the
schedule's peak, not as there are microbatches, and one more for what nobody will read.

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

One task a tick is all that it runs. Ticks of one F, one B and one W each (Simulated.paired_s) would
take 42 with 1f1b and 39 with zb-h1, and 28.5 with interleaved, in step as well.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tpmlp.collectives import all_reduce, per_stage, zeros
from tpmlp.kernels import terms
from tpmlp.kernels.network import param_dtype
from tpmlp.kernels.objective import Samples, Value, by_prediction
from tpmlp.losses import Loss
from tpmlp.pipeline.body import Body, only_at
from tpmlp.pipeline.buffers import NOTHING, B, F, W
from tpmlp.pipeline.tables import Row, columns
from tpmlp.regularizers import ElementwisePenalty
from tpmlp.xla import after, differs_over, hold


class Carry(NamedTuple):
    """What a stage has between two ticks; a buffer is arrays whose first dim is its slots.

    Attributes:
        kept: buffers of what B and W read of an F, by layer of a chunk.
        inbox_h: buffer of the messages that have come.
        inbox_g: of the gradients that have come.
        deferred: buffers of what W reads of a B, by layer of a chunk.
        leaving: the gradient that leaves with the W after its B; None where B sends it.
        grads: sums so far, as tpmlp.pipeline.body.Empty.
        sums: of loss and correct, "K +d".
    """

    kept: tuple[Any, ...]
    inbox_h: jax.Array
    inbox_g: jax.Array
    deferred: tuple[Any, ...]
    leaving: jax.Array | None
    grads: tuple[Any, ...]
    sums: jax.Array


class Done(NamedTuple):
    """What a task leaves; zeros where it does not.

    Attributes:
        kept: what B and W will read, by layer of the chunk.
        deferred: what W will read, likewise.
        z_out: the message for the stage after.
        g_out: the gradient for the stage before; of the last F, for the stage itself.
        g_last: g of the outputs.
        sums: of loss and correct.
    """

    kept: tuple[Any, ...]
    deferred: tuple[Any, ...]
    z_out: jax.Array
    g_out: jax.Array
    g_last: jax.Array
    sums: jax.Array


class Job(NamedTuple):
    """Gradients that a tick may have to make.

    Attributes:
        to: which sums they belong to.
        due: whether this stage is to make them now.
        make: of the arrays that it reads.
        reads: those.
    """

    to: int
    due: jax.Array
    make: Callable[..., Any]
    reads: tuple[Any, Any]


def value_and_grad(
    params: Any,
    x: Any,
    y: Any,
    weight: jax.Array,
    *,
    network: Any,
    loss: Loss,
    penalty: ElementwisePenalty | None,
) -> tuple[Value, Any]:
    """Compute the loss of a batch and its gradient; as tpmlp.kernels.objective.accumulate."""
    samples = by_prediction(network, x, y, weight)
    total = terms.total_weight(samples.weight, network)
    step = _Step(params, samples, total, network, loss)
    rows = columns(network.placement.buffers, step.body.stage)
    carry, _ = lax.scan(step.tick, step.start(), rows)
    sums = all_reduce("K +d+p -> K +d", carry.sums, p="stage", **network.head.axes)
    mean, correct = terms.means(sums, total, network, loss)
    value = Value(*(scalar.astype(step.dtype) for scalar in (mean, total, correct)))
    grads = step.body.reduced(carry.grads)
    grads = jax.tree.map(lambda dw, w: dw.astype(w.dtype), grads, params)
    return value, terms.add_penalty(params, grads, network, penalty) if penalty else grads


class _Step:
    """One training step on one device's blocks."""

    def __init__(
        self, params: Any, samples: Samples, total: jax.Array, network: Any, loss: Loss
    ) -> None:
        self.network, self.loss, self.total = network, loss, total
        self.schedule, self.plan = network.placement.schedule, network.placement.buffers
        route = self.schedule.route
        self.first, self.last = route.place(0), route.place(route.num_virtual_stages - 1)
        self.body: Body = network.body(params)
        self.types, self.dtype = self.body.types, param_dtype(params)
        m = self.schedule.num_microbatches
        self.parts = jax.tree.map(lambda a: a.reshape(m, -1, *a.shape[1:]), samples)
        self.rows = jax.tree.leaves(self.parts.x)[0].shape[1]
        self.empty = self.body.empty(self.rows)
        self.no_sums = zeros("K +d+p", (2,), self.types.accumulate, p="stage", **network.head.axes)

    def start(self) -> Carry:
        """Return buffers of zeros, a slot more than the schedule needs of each."""
        plan, empty = self.plan, self.empty

        def buffer(size: int, like: Any) -> Any:
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (size + 1, *a.shape)), like)

        return Carry(
            kept=buffer(plan.num_activations, empty.kept),
            inbox_h=buffer(plan.num_inbox_h, empty.message),
            inbox_g=buffer(plan.num_inbox_g, empty.gradient),
            deferred=buffer(plan.num_deferred, empty.deferred),
            leaving=None if self.schedule.splits_backward else empty.gradient,
            grads=empty.grads,
            sums=self.no_sums,
        )

    def tick(self, carry: Carry, row: Row) -> tuple[Carry, None]:
        """Run a tick of this stage's microbatch."""
        return self.of(row.microbatch).run(carry, row), None

    def of(self, microbatch: jax.Array) -> "_Step":
        """Return the step whose body knows which microbatch its samples are."""
        step = copy(self)
        step.body = self.body.at(microbatch, self.rows)
        return step

    def run(self, carry: Carry, row: Row) -> Carry:
        """Run a tick, whose microbatch the body knows.

        A branch gives back only what one task leaves: XLA copies whatever goes through one.
        """
        part: Samples = _at(self.parts, row.microbatch)
        kept = _at(carry.kept, row.activations)
        read = part, kept, _at(carry.inbox_h, row.inbox_h), _at(carry.inbox_g, row.inbox_g)
        tasks: list[Callable[..., Done]] = [self.idle]
        for c in range(self.schedule.num_chunks):
            tasks += [partial(self.forward, c), partial(self.backward, c), self.idle]
        branches = [lambda *read, task=task: per_stage(task(*read)) for task in tasks]
        done: Done = lax.switch(row.task, branches, *read)
        deferred = _at(carry.deferred, row.deferred)
        grads, last = self.with_gradients(carry.grads, row, part.x, kept, deferred, done)
        g_out, leaving = done.g_out, carry.leaving
        if leaving is not None:
            is_B, is_W = ((row.task - 1) % 3 == kind for kind in (1, 2))
            g_out = jnp.where(is_W & (row.task > 0), leaving, g_out)
            leaving = jnp.where(is_B, done.g_out, leaving)
        # Buffers are written when all have read them, or XLA would write a copy.
        carry = carry._replace(
            kept=_put(carry.kept, row.keeps, _after_all(done.kept, last)),
            deferred=_put(carry.deferred, row.defers, _after_all(done.deferred, last)),
            leaving=leaving,
            grads=grads,
            sums=carry.sums + done.sums,
        )
        return self.moved(carry, row, done.z_out, g_out)

    def with_gradients(
        self,
        grads: tuple[Any, ...],
        row: Row,
        x: Any,
        kept: tuple[Any, ...],
        deferred: tuple[Any, ...],
        done: Done,
    ) -> tuple[tuple[Any, ...], Any]:
        """Return sums of gradients with those of this tick added, and the last that were.

        One after another: none is begun before the one before is there.
        """
        summed, before = list(grads), ()
        for i, due, make, reads in self.jobs(row, x, kept, deferred, done):
            read = (reads[0], _after_all(reads[1], before))
            before = summed[i] = self.add(summed[i], due, make, read)
        return tuple(summed), before

    def jobs(
        self, row: Row, x: Any, kept: tuple[Any, ...], deferred: tuple[Any, ...], done: Done
    ) -> list[Job]:
        """Return the gradients that a tick may make.

        Of the slots with W; of the first part with its B, and of the last with its F, whose g and
        message are there then and nowhere kept.
        """
        body, jobs, num_layers = self.body, [], len(kept)
        for c in range(self.schedule.num_chunks):
            for k in range(num_layers):
                due = (row.task == 3 * c + W) & body.has(c, k)
                make = partial(body.slot_gradients, c, k)
                jobs.append(Job(1 + c * num_layers + k, due, make, (kept[k], deferred[k])))

        def is_at(place: tuple[int, int], kind: int) -> jax.Array:
            return (row.task == 3 * place[1] + kind) & (body.stage == place[0])

        first = is_at(self.first, B), body.first_gradients, (x, done.g_out)
        last = is_at(self.last, F), body.last_gradients, (done.z_out, done.g_last)
        return [*jobs, Job(0, *first), Job(-1, *last)]

    def add(self, sums: Any, due: jax.Array, make: Callable[..., Any], reads: Any) -> Any:
        """Return sums of gradients with a microbatch's added, where these are due."""
        total = self.types.total
        nothing = jax.tree.map(lambda a: jnp.zeros_like(a, total), sums)
        made = lax.cond(due, lambda *read: per_stage(make(*read)), lambda *read: nothing, *reads)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, made)

    def moved(self, carry: Carry, row: Row, z: jax.Array, g: jax.Array) -> Carry:
        """Move messages and gradients round the ring, and put what has come into the inboxes.

        Where no stage is brought anything, nothing moves.
        """
        body, (h_moves, g_moves) = self.body, row.moves
        came_h = {by: _if(due, partial(body.moved_h, by=by), z) for by, due in h_moves.items()}
        came_g = {by: _if(due, partial(body.moved_g, by=by), g) for by, due in g_moves.items()}
        if 0 in came_g:
            # What the loss leaves for its own stage is as B reads it; at the turn of a "v" g comes
            # from a B, as from any other stage.
            came_g[0] = jnp.where((row.task - 1) % 3 == 0, g, came_g[0])
        inbox_h, inbox_g = carry.inbox_h, carry.inbox_g
        for (by, arrivals), (h_slot, g_slot) in zip(self.plan.rings, row.arrivals, strict=True):
            places = by % self.schedule.num_stages
            if (arrivals.h != NOTHING).any():
                inbox_h = _put(inbox_h, h_slot, came_h[places])
            if (arrivals.g != NOTHING).any():
                inbox_g = _put(inbox_g, g_slot, came_g[places])
        return carry._replace(inbox_h=inbox_h, inbox_g=inbox_g)

    def idle(self, part: Samples, kept: tuple[Any, ...], came: jax.Array, g: jax.Array) -> Done:
        """Do nothing, and leave zeros."""
        empty = self.empty
        return Done(
            empty.kept, empty.deferred, empty.message, empty.gradient, empty.outputs, self.no_sums
        )

    def forward(
        self, c: int, part: Samples, kept: tuple[Any, ...], came: jax.Array, g: jax.Array
    ) -> Done:
        """Run F of a chunk, with the first part before it and the last after it where these are."""
        z_in = only_at(self.first, c, self.body, lambda: self.body.enter(part.x), lambda: came)
        passed, z_out = self.body.forward(c, z_in)
        done = self.idle(part, kept, came, g)._replace(kept=passed, z_out=z_out)
        return only_at(self.last, c, self.body, lambda: self.at_loss(done, part), lambda: done)

    def at_loss(self, done: Done, part: Samples) -> Done:
        """Run the last part and the loss, and come back to the gradient of the message."""
        outputs = self.body.leave(done.z_out)
        sums, g = terms.at_outputs(
            outputs, part.y, part.weight, self.total, self.network, self.loss
        )
        g = g.astype(self.types.total)
        g_out = self.body.leave_backward(done.z_out, g)
        return done._replace(g_out=g_out, g_last=g, sums=sums.astype(self.types.accumulate))

    def backward(
        self, c: int, part: Samples, kept: tuple[Any, ...], came: jax.Array, g: jax.Array
    ) -> Done:
        """Run B of a chunk."""
        deferred, g_in = self.body.backward(c, kept, g)
        return self.idle(part, kept, came, g)._replace(deferred=deferred, g_out=g_in)


def _if(due: jax.Array, move: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """Return an array moved where that is due, on all devices or on none."""
    return lax.cond(due, move, lambda array: array, array)


def _after_all(arrays: Any, others: Any) -> Any:
    """Return arrays that are not there before others are; only before those that differ no more.

    An array that is equal on devices where another differs would count as different after it.
    """
    waited_for = jax.tree.leaves(others)

    def tied(array: jax.Array) -> jax.Array:
        mine = differs_over(array)
        alike = [other for other in waited_for if differs_over(other) <= mine]
        return after(array, *alike) if alike else array

    return hold((jax.tree.map(tied, arrays), others))[0] if waited_for else arrays


def _at(buffers: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), buffers)


def _put(buffers: Any, slot: jax.Array, arrays: Any) -> Any:
    def put(buffer: jax.Array, array: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(buffer, array.astype(buffer.dtype), slot, 0)

    return jax.tree.map(put, buffers, arrays)
