"""Arrays of a pipeline on the devices of the stage that computes them: where a fault would be.

A trace has every array on every stage, copies; a slot of gradients is one array of all stages.
"""

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from tpmlp.inspection.trace import ByLayer, Trace
from tpmlp.mesh import stage_mesh
from tpmlp.pipeline.staged import Pair, Staged


def trace_on_own_stages(trace: Trace) -> Trace:
    """Return a trace whose arrays are on one stage each; gradients by layer."""
    grads: Any = trace.grads
    stage_of = grads.stages.stage_of

    def own(arrays: ByLayer) -> ByLayer:
        return ByLayer(arrays.name, [_on(stage_of(l), array) for l, array in arrays.items()])

    return replace(
        trace,
        h=own(trace.h),
        z=own(trace.z),
        sigma_prime=own(trace.sigma_prime),
        g=own(trace.g),
        grads=gradients_on_own_stages(grads),
    )


def gradients_on_own_stages(grads: Staged) -> tuple[Pair, ...]:
    """Return (dW_l, db_l) by layer; of the first and the last every stage has a part."""

    def layer(l: int) -> Pair:
        slot, stage = grads.stages.where[l]
        dW, db = (None if a is None else _on(stage, a, of_slot=True) for a in grads.slots[slot])
        return dW, db

    interior = [layer(l) for l in range(2, grads.stages.num_layers)]
    return (grads.first, *interior, grads.last)


def _on(stage: int, array: jax.Array, *, of_slot: bool = False) -> jax.Array:
    """Return what one stage's devices hold of an array, of a slot without the dim of stages."""
    sharding: Any = array.sharding
    mesh, spec = stage_mesh(sharding.mesh, stage), sharding.spec[1 if of_slot else 0 :]
    parts = [s.data for s in array.addressable_shards if s.device in mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(
        array.shape[1:] if of_slot else array.shape,
        NamedSharding(mesh, PartitionSpec(*spec)),
        [part[0] for part in parts] if of_slot else parts,
    )
