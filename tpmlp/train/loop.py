"""fit: everything checked, then run."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tpmlp.checks import check_count
from tpmlp.kernels.network import param_dtype
from tpmlp.models import Model
from tpmlp.objective import make_objective
from tpmlp.parameters import check_params
from tpmlp.preflight import check_collectives_once
from tpmlp.strategy import Strategy
from tpmlp.train.batches import Plan, Samples, read_samples
from tpmlp.train.callbacks import Callback, check_callbacks
from tpmlp.train.interrupt import interruption
from tpmlp.train.optimizer import default_optimizer
from tpmlp.train.probe import make_optimizer
from tpmlp.train.progress import open_progress
from tpmlp.train.run import FitResult, Run

# A run that does not say otherwise has about this many records.
DEFAULT_NUM_RECORDS = 100


def fit(
    model: Model,
    data: Any,
    *,
    loss: Any,
    mesh: Mesh,
    optimizer: Any = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int,
    strategy: Strategy | None = None,
    regularizer: Any = None,
    validation: Any = None,
    params: Any = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    progress: bool = True,
    log_every: int | None = None,
) -> FitResult:
    """Train a model; the same numbers on every mesh, up to rounding.

    With Strategy(reduction="invariant") the same bits: losses, parameters, the optimiser's state.

    Args:
        model: the model.
        data: (x, y) or (x, y, weight), anything that NumPy takes. Rows of weight 0 are left out.
        loss: as in tpmlp.value_and_grad.
        mesh: the mesh.
        optimizer: an optax.GradientTransformation; optax.adam(1e-3) by default. One that needs
            value= is given the objective. Where widths are padded, those that padding would
            change are refused.
        steps: how many updates to make; or
        epochs: how many times to visit every sample.
        batch_size: samples of a batch; the last of an epoch may have fewer.
        strategy: Strategy() by default.
        regularizer: as in tpmlp.value_and_grad.
        validation: samples like data, evaluated after each epoch and after the last step.
        params: where to start; they are copied. model.init with the seed by default.
        callbacks: functions of (record, params), called after each record; True stops the run.
            params are live: copy what you keep.
        seed: of the order of the samples and of the first parameters.
        progress: whether to show a bar, or lines where standard output is no terminal.
        log_every: steps between records, so that there are about 100 by default. The last step
            has one, and each step with a validation.

    Returns:
        A FitResult, also after Ctrl-C (pressed twice it is a KeyboardInterrupt) and when the
        objective is no longer finite.

    Raises:
        ValueError: what is wrong with an argument, before anything is compiled.
        RuntimeError: with many processes, a collective that gives wrong numbers on this mesh, in
            arrays no larger than the run's.
        ModuleNotFoundError: optax is not installed, or rich, which draws the progress.

    Examples:
        >>> import numpy as np, tpmlp
        >>> x = np.linspace(-1, 1, 64)[:, None]
        >>> mlp = tpmlp.MLP((1, 10, 1), activation="tanh")
        >>> mesh = tpmlp.make_mesh(x=4, y=2)
        >>> result = fit(mlp, (x, x**2), loss="mse", mesh=mesh, steps=50, batch_size=16,
        ...              progress=False)
        >>> result.stopped, result.steps, result.history[-1]["epoch"]
        ('finished', 50, 13)
    """
    objective = make_objective(
        model, loss=loss, mesh=mesh, regularizer=regularizer, strategy=strategy
    )
    placement, seed = objective.placement, _check_seed(seed)
    if params is not None:
        params = check_params(model, params, placement)
    dtype = jnp.dtype(jnp.float32 if params is None else param_dtype(params))
    read = partial(read_samples, placement=placement, loss=objective.loss, dtype=dtype)
    samples = read("data", data)
    plan = _make_plan(samples, steps=steps, epochs=epochs, batch_size=batch_size, seed=seed)
    validated = None if validation is None else read("validation", validation)
    tx = default_optimizer() if optimizer is None else optimizer
    run = Run(
        objective=objective,
        optimizer=make_optimizer(tx, model=model, placement=placement, dtype=dtype),
        samples=samples,
        plan=plan,
        validation=validated,
        callbacks=check_callbacks(callbacks, validated=validated is not None),
        log_every=_record_interval(log_every, plan),
    )
    if jax.process_count() > 1:
        check_collectives_once(mesh, _largest_bytes(model, batch_size, dtype))
    # Steps reuse the memory of what they are given, and params are the caller's.
    start = (
        model.init(jax.random.key(seed), mesh, strategy=strategy)
        if params is None
        else jax.tree.map(jnp.copy, params)
    )
    with interruption() as interrupted, open_progress(progress, plan.num_steps) as shown:
        return run(start, interrupted, shown)


def _make_plan(
    samples: Samples, *, steps: int | None, epochs: int | None, batch_size: int, seed: int
) -> Plan:
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"exactly one of steps and epochs must be given: got steps={steps}, epochs={epochs}."
        )
    size, num_samples = check_count("batch_size", batch_size), samples.num_samples
    if size > num_samples:
        raise ValueError(
            f"batch_size must not be larger than the data: got batch_size={size}, data with "
            f"{num_samples} samples of weight above 0. Use batch_size={num_samples}."
        )
    per_epoch = -(-num_samples // size)
    num_steps = (
        check_count("steps", steps) if epochs is None else check_count("epochs", epochs) * per_epoch
    )
    return Plan(seed=seed, num_samples=num_samples, batch_size=size, num_steps=num_steps)


def _largest_bytes(model: Model, batch_size: int, dtype: jnp.dtype) -> int:
    """Return a size that no array of a step exceeds, nor what a device holds of it."""
    parameters = (prod(spec.shape) for spec in jax.tree.leaves(model.parameters))
    return max(batch_size * model.largest_sample, *parameters) * dtype.itemsize


def _record_interval(log_every: int | None, plan: Plan) -> int:
    if log_every is None:
        return -(-plan.num_steps // DEFAULT_NUM_RECORDS)
    return check_count("log_every", log_every)


def _check_seed(seed: Any) -> int:
    integer = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not integer or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in 0 .. 2^32 - 1: got seed={seed!r}.")
    return int(seed)
