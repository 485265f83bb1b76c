"""A schedule's tables as one stage reads them: a column of each, a row a tick."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tpmlp.pipeline.buffers import IDLE, NOTHING, Arrivals, B, Buffers, F


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
        moves: of h and of g, by how many places round the ring: whether any stage is brought
            something.
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
    moves: tuple[dict[int, Any], dict[int, Any]]


def columns(plan: Buffers, stage: jax.Array) -> Row:
    """Return the columns of a stage, each [tick]."""

    def column(table: np.ndarray) -> jax.Array:
        return lax.dynamic_index_in_dim(jnp.asarray(table), stage, 1, keepdims=False)

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
        arrivals=tuple(arrivals(of) for _, of in plan.rings),
        moves=jax.tree.map(jnp.asarray, (plan.moves("h"), plan.moves("g"))),
    )
