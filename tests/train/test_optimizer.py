"""An optax optimiser on padded, sharded parameters.

- state: a failure means that a device holds more than its part of the optimiser's state.
- table: every optimiser that fit accepts, against plain optax on logical widths with the same
  gradients. A failure of the numbers means that padding changes what it does, and the probe did
  not notice; of the padding, that something left 0 there.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import tpmlp
from tests.cases import mesh_of, padding, relative_error
from tests.tolerances import FLOAT64
from tpmlp.placement import place
from tpmlp.train.optimizer import ShardedOptimizer, mask, standard_promotion
from tpmlp.train.probe import QUICKLY, make_optimizer

Sizes = tuple[int, int, int]
# No mesh below divides its widths, so W and b are padded on all.
MODEL = tpmlp.MLP((9, 6))
PADDED_MESHES = ((1, 5, 1), (1, 1, 7), (1, 4, 2))


def sharded(tx: Any, sizes: Sizes, model: tpmlp.MLP = MODEL) -> ShardedOptimizer:
    placement = place(model.widths, mesh_of(sizes))
    return make_optimizer(tx, model=model, placement=placement, dtype=jnp.float64)


def start(sizes: Sizes, model: tpmlp.MLP = MODEL) -> Any:
    rng = np.random.default_rng(1)
    layers = [
        (rng.normal(size=(o, i)), rng.normal(size=o) if model.bias else None)
        for i, o in pairwise(model.widths)
    ]
    return tpmlp.from_numpy(model, layers, mesh_of(sizes))


def bytes_on_first_device(tree: Any) -> int:
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def test_mask_cuts_the_last_dims_and_leaves_the_others() -> None:
    array = np.ones((2, 4, 6))
    masked = np.asarray(mask(jnp.asarray(array), (3, 6)))
    assert masked[:, :3].all()
    assert not masked[:, 3:].any()
    assert np.asarray(mask(jnp.full((4,), jnp.nan), (2,)))[2:].tolist() == [0, 0]


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 4, 2), (2, 2, 2), (1, 5, 1), (4, 1, 2), (8, 1, 1)]
)
def test_state_is_split_as_the_parameters_are(sizes: Sizes) -> None:
    optimizer, params = sharded(optax.adam(1e-3), sizes), start(sizes)
    adam = optimizer.init(params)[0]
    for moment in (adam.mu, adam.nu):
        for leaf, param in zip(jax.tree.leaves(moment), jax.tree.leaves(params), strict=True):
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves((adam.mu, adam.nu)))
    num_blocks = sizes[1] * sizes[2]
    assert bytes_on_first_device(adam) == total // num_blocks + adam.count.nbytes


def test_the_next_state_stays_where_it_was() -> None:
    sizes = (2, 2, 2)
    optimizer, params = sharded(optax.adam(1e-3), sizes), start(sizes)
    state = optimizer.init(params)
    shardings = (jax.tree.map(lambda p: p.sharding, params), optimizer.state_shardings)
    step = jax.jit(optimizer.apply, out_shardings=shardings)
    after = step(params, state, params, jnp.ones(()))[1]
    assert bytes_on_first_device(after) == bytes_on_first_device(state)


def remember_gradients() -> optax.GradientTransformation:
    """Return a transformation whose state is the last three gradients, stacked."""

    def init(params: Any) -> Any:
        return {"memory": jax.tree.map(lambda p: jnp.ones((3, *p.shape), p.dtype), params)}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def push(memory: jax.Array, u: jax.Array) -> jax.Array:
            return jnp.concatenate([memory[1:], u[None]])

        return updates, {"memory": jax.tree.map(push, state["memory"], updates)}

    return optax.GradientTransformation(init, update)


def test_a_stack_of_arrays_like_a_parameter_is_split_and_masked_like_it() -> None:
    sizes = (1, 5, 1)
    optimizer, params = sharded(remember_gradients(), sizes), start(sizes)
    memory = optimizer.init(params)["memory"]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(memory))
    assert bytes_on_first_device(memory) == total // 5
    W = np.asarray(memory[0][0])
    assert W[:, :6, :9].all()
    assert W.sum() == 3 * 6 * 9


def test_without_padding_optimizers_that_look_at_shapes_run() -> None:
    model = tpmlp.MLP((128, 136), bias=False)
    optimizer = sharded(optax.adafactor(1e-2), (1, 4, 2), model)
    params = start((1, 4, 2), model)
    state = optimizer.init(params)
    after, _ = jax.jit(optimizer.apply)(params, state, params, jnp.ones(()))
    logical: Any = tpmlp.to_numpy(model, params)
    with standard_promotion():
        tx: Any = optax.adafactor(1e-2)
        plain, _ = tx.update(logical, tx.init(logical), logical)
    error = relative_error(tpmlp.to_numpy(model, after)[0][0], logical[0][0] + plain[0][0])
    assert error <= FLOAT64


def test_masks_cost_no_communication() -> None:
    sizes = (1, 5, 1)
    optimizer, params = sharded(optax.adam(1e-3), sizes), start(sizes)
    state = optimizer.init(params)
    assert tpmlp.audit(optimizer.apply, params, state, params, jnp.ones(())).collectives == ()


def by_rank(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "vector", params)


def drift() -> optax.GradientTransformation:
    """Return a user's own transformation, which is 0 nowhere: neither its updates nor its state."""

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.ones_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        state = jax.tree.map(lambda s: s + 1, state)
        return jax.tree.map(jnp.add, updates, state), state

    return optax.GradientTransformation(init, update)


ADAM = optax.adam(1e-2)
ACCEPTED: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "nesterov": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": lambda: ADAM,
    "adamw": lambda: optax.adamw(1e-2),
    "nadam": lambda: optax.nadam(1e-2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "adagrad": lambda: optax.adagrad(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, centered=True),
    "adadelta": lambda: optax.adadelta(1e-2),
    "adamax": lambda: optax.adamax(1e-2),
    "adan": lambda: optax.adan(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "lars": lambda: optax.lars(1e-2),
    "fromage": lambda: optax.fromage(1e-2),
    "sm3": lambda: optax.sm3(1e-2),
    "novograd": lambda: optax.novograd(1e-2),
    "rprop": lambda: optax.rprop(1e-2),
    "sign_sgd": lambda: optax.sign_sgd(1e-2),
    "optimistic": lambda: optax.optimistic_gradient_descent(1e-2),
    "polyak": lambda: optax.polyak_sgd(),
    "prodigy": lambda: optax.contrib.prodigy(1e-2),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(1e-2),
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), ADAM),
    "clip": lambda: optax.chain(optax.clip(0.1), ADAM),
    "adaptive clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1e-2)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 5)),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "every 2": lambda: optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "plateau": lambda: optax.chain(ADAM, optax.contrib.reduce_on_plateau(patience=0)),
    "partition": lambda: optax.partition({"matrix": ADAM, "vector": optax.sgd(1e-2)}, by_rank),
    "flat": lambda: optax.flatten(ADAM),
    "drift": drift,
}

# Gradients of three steps at logical widths.
RNG = np.random.default_rng(0)
GRADS = [[(RNG.normal(size=(6, 9)), RNG.normal(size=6))] for _ in range(3)]
VALUES = (2.0, 2.5, 3.0)


def plain_steps(tx: Any, params: Any) -> list[Any]:
    """Return the parameters after each step of optax itself, on one device, without padding."""
    tx = optax.with_extra_args_support(tx)

    @partial(jax.jit, compiler_options=QUICKLY)
    def step(params: Any, state: Any, grads: Any, value: Any) -> Any:
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    with standard_promotion():
        state, found = tx.init(params), []
        for grads, value in zip(GRADS, VALUES, strict=True):
            params, state = step(params, state, grads, value)
            found.append(params)
    return found


CASES = [(name, PADDED_MESHES[i % 3]) for i, name in enumerate(ACCEPTED)]
# What would not be 0 in the padding by itself, on the other meshes too.
CASES += [(n, m) for n in ("adagrad", "drift") for m in PADDED_MESHES if (n, m) not in CASES]


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=lambda v: str(v).replace(", ", "x"))
def test_an_accepted_optimizer_does_what_optax_does_and_leaves_padding_0(
    name: str, sizes: Sizes
) -> None:
    tx, mesh, params = ACCEPTED[name](), mesh_of(sizes), start(sizes)
    optimizer = sharded(tx, sizes)
    state, step = optimizer.init(params), jax.jit(optimizer.apply, compiler_options=QUICKLY)
    assert not any(np.any(p) for p in paddings(optimizer, state))
    wanted = plain_steps(tx, tpmlp.to_numpy(MODEL, params))
    for grads, value, after in zip(GRADS, VALUES, wanted, strict=True):
        placed = tpmlp.from_numpy(MODEL, grads, mesh)
        params, state = step(placed, state, params, jnp.asarray(value))
        errors = jax.tree.map(relative_error, tpmlp.to_numpy(MODEL, params), after)
        assert max(jax.tree.leaves(errors)) <= FLOAT64
        assert not any(np.any(p) for p in paddings(optimizer, params))
        assert not any(np.any(p) for p in paddings(optimizer, state))


def paddings(optimizer: ShardedOptimizer, tree: Any) -> list[np.ndarray]:
    """Return the padding of every array in the tree that has the shape of a parameter."""
    whole, part = map(jax.tree.leaves, (optimizer.masked.padded, optimizer.masked.logical))
    logical = {w.shape: p.shape for w, p in zip(whole, part, strict=True)}
    assert len(logical) == len(whole), "MODEL must have no two parameters of one shape"
    return [
        padding(np.asarray(leaf), logical[leaf.shape])
        for leaf in jax.tree.leaves(tree)
        if leaf.shape in logical
    ]
