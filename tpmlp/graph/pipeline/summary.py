"""Summary of a graph in a pipeline: which stage has which blocks, and what a device holds.

The shapes of what is kept and deferred are those of a traced body (tpmlp.graph.pipeline.body). Of a
task that runs, what it reads and leaves is counted, and the largest gradient of a matrix with what
it is a product of; not what else it makes on its way.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpmlp.graph.kinds import Dense, Embedding
from tpmlp.graph.pipeline.network import GraphPipeline
from tpmlp.graph.pipeline.placement import GraphOnStages
from tpmlp.graph.placement import GraphPlacement
from tpmlp.kernels.execution import execution
from tpmlp.layout import padded
from tpmlp.pipeline.body import Empty
from tpmlp.pipeline.memory import StepBytes
from tpmlp.pipeline.messages import message_bytes
from tpmlp.pipeline.summary import PipelineSummary, of_schedule, param_words


def summarize_graph_pipeline(
    placement: GraphOnStages, specs: Any, *, batch_size: int, dtype: Any
) -> PipelineSummary:
    """Return what one device holds in a training step; what its collectives move is not predicted.

    Args:
        placement: the graph on its mesh.
        specs: what each array of the parameters is.
        batch_size: samples of one step.
        dtype: of the parameters.
    """
    empty, ends = _shapes(placement, specs, batch_size, dtype)
    return PipelineSummary(
        **of_schedule(placement, lambda stage: None),
        repeated="blocks",
        param_bytes=param_words(specs, placement.num_blocks) * jnp.dtype(dtype).itemsize,
        step=_step_bytes(placement, empty, ends, batch_size, dtype),
        messages=message_bytes(placement, _bytes(empty.message), _bytes(empty.gradient)),
    )


def _shapes(
    placement: GraphOnStages, specs: Any, batch_size: int, dtype: Any
) -> tuple[Empty, list[Any]]:
    """Return what a body leaves on one device, and the parameters of the ends there."""
    rows = padded(batch_size, placement.row_blocks) // placement.row_blocks
    found: list[Any] = []

    def look(params: Any) -> jax.Array:
        body = GraphPipeline(placement).body(params)
        found.append(jax.eval_shape(lambda: body.empty(rows)))
        found.append(jax.tree.leaves((body.first, body.last.params)))
        return jnp.zeros(())

    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.padded(placement.num_blocks), dtype), specs
    )
    param_specs = jax.tree.map(lambda sharding: sharding.spec, placement.shardings)
    jax.eval_shape(
        jax.shard_map(
            look, mesh=placement.mesh, in_specs=(param_specs,), out_specs=PartitionSpec()
        ),
        params,
    )
    empty, ends = found
    return empty, list({id(array): array for array in ends}.values())


def _step_bytes(
    placement: GraphOnStages, empty: Empty, ends: list[Any], batch_size: int, dtype: Any
) -> StepBytes:
    run, plan = execution(placement, dtype), placement.buffers
    message, g, kept, deferred = map(
        _bytes, (empty.message, empty.gradient, empty.kept, empty.deferred)
    )
    first, *slots, last = map(_bytes, empty.grads)
    # As tpmlp.pipeline.memory: sums of slots are the results where nothing comes between.
    whole = run.splits_data or placement.sizes["data"] == 1
    in_results = run.accumulate == jnp.dtype(dtype) and whole
    parts = (placement.first, placement.block, placement.last)
    products = [_product(part, batch_size, dtype) for part in parts]
    return StepBytes(
        activations=(plan.num_activations + 1) * kept,
        deferred=(plan.num_deferred + 1) * deferred,
        inboxes=(plan.num_inbox_h + 1) * message
        + (plan.num_inbox_g + (1 if placement.schedule.splits_backward else 2)) * g,
        gradients=first + last + (0 if in_results else sum(slots)),
        ends=sum(map(_bytes, ends)),
        task=2 * kept + deferred + 2 * (message + g) + _bytes(empty.outputs) + max(products),
    )


def _product(part: GraphPlacement, batch_size: int, dtype: Any) -> int:
    """Return the bytes of the largest gradient of a matrix of a part, and of its factors."""
    run, sizes, largest = execution(part, dtype), part.sizes, 0
    rows = padded(batch_size, part.row_blocks) // part.row_blocks
    for node in part.program:
        if isinstance(node.kind, Dense | Embedding):
            W = part.graph.arrays[node.owner]["W"]
            made, read = part.padded_shape(W)
            columns = rows * node.shape.positions
            g, s = (sizes[node.axes[role]] for role in "gs")
            dW = made * read // (g * s) * run.total.itemsize
            largest = max(largest, dW + (made // g + read // s) * columns * run.compute.itemsize)
    return largest


def _bytes(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))
