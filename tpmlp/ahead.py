"""Ahead of time: programs compiled for shapes alone, and what is said of one that does not fit."""

from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.batch import Batch, batch_shardings, padded_shapes
from tpmlp.checks import check_count, check_dtype
from tpmlp.objective import Objective
from tpmlp.placement import SampleSpec


def step_shapes(objective: Objective, batch_size: int, dtype: Any = None) -> tuple[Any, ...]:
    """Return parameters, a batch, and a key if one is needed, as ShapeDtypeStructs.

    Args:
        objective: the objective, on a mesh whose devices may be only described.
        batch_size: samples of one step.
        dtype: of the parameters, samples, values and weights; float32 by default.

    Raises:
        ValueError: batch_size is not positive, dtype is no type to train in, or the loss is a
            user's, whose targets have no known shape.
    """
    placement, model = objective.placement, objective.model
    dtype = jnp.dtype(check_dtype("dtype", jnp.float32 if dtype is None else dtype))
    check_count("batch_size", batch_size, "Give the samples of one step.")
    shapes = padded_shapes(placement, objective.loss, batch_size)
    placed = batch_shardings(placement, objective.loss)

    def of(dtype: Any) -> Any:
        return lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)

    def of_source(spec: SampleSpec, shape: Any) -> jax.ShapeDtypeStruct:
        return of(dtype if spec.vocabulary is None else jnp.int32)(shape, spec.sharding)

    targets = of(jnp.int32 if objective.loss.targets == "labels" else dtype)
    batch = Batch(
        jax.tree.map(of_source, placement.samples, shapes.x),
        jax.tree.map(targets, shapes.y, placed.y),
        of(dtype)(shapes.weight, placed.weight),
    )
    params = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(
            spec.padded(placement.num_blocks), dtype, sharding=sharding
        ),
        model.specs(placement),
        model.shardings(placement),
    )
    keys = [jax.eval_shape(jax.random.key, 0)] if getattr(model, "dropouts", ()) else []
    return params, batch, *keys


def compile_lowered(
    lowered: Any, objective: Objective, batch_size: int, dtype: Any = None
) -> jax.stages.Compiled:
    """Compile a step; where it does not fit, say what was predicted.

    Args:
        lowered: the lowered program of a step of this objective.
        objective: the objective.
        batch_size: samples of one step.
        dtype: of the parameters; float32 by default.

    Raises:
        MemoryError: the program does not fit the device.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"the step must fit the memory of a device: got batch_size={batch_size} on "
            f"{objective.placement.sizes}, and the compiler ran out. Use more devices, "
            "keep='recompute', microbatches, shard_weights or a smaller type. Predicted:\n"
            f"{objective.summary(batch_size, dtype)}"
        ) from error
