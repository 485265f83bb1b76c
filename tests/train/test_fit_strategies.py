"""fit under strategies: the same run, a device's share of the state, no second copy of anything.

Of the step itself tests/test_strategies.py says more: a failure here alone is in the update.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tpmlp
from tests.cases import mesh_of, relative_error
from tests.strategies import Row, made, real_task
from tests.tolerances import FLOAT64
from tpmlp.batch import Batch
from tpmlp.train.probe import make_optimizer
from tpmlp.train.run import compile_step

SIZES = (2, 2, 2)
SPLIT = tpmlp.Strategy(shard_weights=True, microbatches=2, keep="recompute")


def run(strategy: tpmlp.Strategy, **changes: Any) -> Any:
    """Train on the real data from its parameters: 2 epochs of 13, 13 and 4 samples."""
    task, where = real_task(), {"mesh": mesh_of(SIZES), "strategy": strategy}
    arguments: dict[str, Any] = {
        "loss": task.loss,
        "regularizer": task.regularizer,
        "optimizer": optax.adam(1e-2),
        "epochs": 2,
        "batch_size": 13,
        "params": tpmlp.from_numpy(task.model, task.arrays, **where),
        "progress": False,
    }
    return tpmlp.fit(task.model, task.samples, **where, **arguments | changes)


@cache
def split_run() -> Any:
    return run(SPLIT)


def test_a_run_with_split_weights_in_microbatches_is_the_plain_run() -> None:
    model, plain = real_task().model, run(tpmlp.Strategy())
    numbers = [
        jax.tree.leaves(tpmlp.to_numpy(model, result.params)) for result in (split_run(), plain)
    ]
    for got, wanted in zip(*numbers, strict=True):
        assert relative_error(got, wanted) <= FLOAT64
    for got, wanted in zip(split_run().history, plain.history, strict=True):
        assert relative_error(got["loss"], wanted["loss"]) <= FLOAT64


def test_each_device_holds_its_share_of_parameters_and_state_after_training() -> None:
    result = split_run()
    arrays = [a for a in jax.tree.leaves((result.params, result.opt_state)) if a.ndim]
    assert len(arrays) == 3 * 6
    for array in arrays:
        blocks = [shard.data.nbytes for shard in array.addressable_shards]
        assert blocks == [array.nbytes // 8] * 8


@pytest.mark.parametrize("shard_weights", [False, True])
def test_a_step_of_training_reuses_the_memory_of_parameters_and_state(shard_weights: bool) -> None:
    row = Row(sizes=SIZES, layout="column-row", shard_weights=shard_weights)
    task, step, params, batch = made(row)
    placement = step.objective.placement
    optimizer = make_optimizer(
        optax.adam(1e-3), model=task.model, placement=placement, dtype=jnp.float64
    )
    state = optimizer.init(params)
    consumed = jax.tree.leaves((params, state))
    samples = Batch(*batch.values())
    compiled: Any = compile_step(step.objective, optimizer, params, state, samples)
    on_a_device = sum(array.addressable_shards[0].data.nbytes for array in consumed)
    assert tpmlp.audit(compiled).alias_bytes == on_a_device


def test_training_in_bfloat16_reaches_nearly_the_loss_of_float32() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(128, 8)).astype(np.float32)
    labels = np.argmax(x @ rng.normal(size=(8, 4)), axis=1)
    model, losses = tpmlp.MLP((8, 16, 4)), []
    for strategy in (
        tpmlp.Strategy(),
        tpmlp.Strategy(compute_dtype="bfloat16", reduce_dtype="bfloat16"),
    ):
        result = tpmlp.fit(
            model,
            (x, labels),
            loss="cross_entropy",
            mesh=mesh_of((2, 2, 1)),
            strategy=strategy,
            optimizer=optax.adam(3e-2),
            steps=150,
            batch_size=128,
            progress=False,
        )
        assert {array.dtype for array in jax.tree.leaves(result.params)} == {np.dtype("float32")}
        losses.append([record["loss"] for record in result.history])
    (first, *_, last), (_, *_, last_bfloat16) = losses
    assert last < first / 10
    # Gradients that err by some 2^-8 lead elsewhere, but not to a much larger loss.
    assert abs(last_bfloat16 - last) < first / 100
