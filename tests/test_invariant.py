"""reduction="invariant": a whole training run has the same bits on every mesh, and the right ones.

A failure of bits alone means that some sum, product or elementwise function still depends on how
the arrays are cut: the name of the first part that differs says where. A failure against the
reference is in the blocks or the trees themselves.
"""

import hashlib
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest

import tpmlp
from tests.cases import Problem, Sizes, arrays, mesh_of, name_of, relative_error, samples
from tests.tolerances import FLOAT64
from tpmlp import reference
from tpmlp.losses import get_loss
from tpmlp.predict import step_collectives

ONE: Sizes = (1, 1, 1)
NUM_STEPS = 100

# What the numbers are, and what is computed with them.
RUNS: dict[str, dict[str, Any]] = {
    "float32": {"activation": "gelu", "loss": "cross_entropy"},
    "bfloat16 products": {
        "activation": "sigmoid",
        "loss": "mse",
        "compute_dtype": "bfloat16",
        "regularizer": tpmlp.elastic_net(1e-3, 0.5, biases=True),
        "optimizer": optax.sgd(0.1, momentum=0.9),
    },
    "bfloat16 throughout": {
        "activation": "tanh",
        "loss": "logistic",
        "dtype": "bfloat16",
        "keep": "recompute",
        "optimizer": optax.adamw(1e-2),
    },
}


def bits(*trees: Any) -> str:
    """Return a hash of every bit of arrays and numbers."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


# Widths that no mesh divides; two layers have both roles.
WIDTHS = (17, 12, 10)

# One axis and two, all samples on a device and one block of them, whole rows of blocks and one.
SOME: list[tuple[str, Sizes]] = [
    ("float32", (1, 8, 1)),
    ("float32", (1, 2, 4)),
    ("bfloat16 products", (8, 1, 1)),
    ("bfloat16 throughout", (2, 2, 2)),
]


@cache
def history(run: str, sizes: Sizes, widths: tuple[int, ...] = WIDTHS) -> dict[str, str]:
    """Return hashes of all that one run computes, in the order in which it is computed."""
    return history_of(sizes, widths=widths, **RUNS[run])


def history_of(
    sizes: Sizes,
    *,
    activation: str,
    widths: tuple[int, ...] = WIDTHS,
    loss: str,
    regularizer: Any = None,
    optimizer: Any = None,
    dtype: str = "float32",
    **fields: Any,
) -> dict[str, str]:
    """Trace the first step and train for 100, on samples that come in batches of 24 of 60."""
    problem = Problem(
        widths=widths, activation=activation, loss=loss, num_samples=60, weighted=True
    )
    model, mesh = problem.model, mesh_of(sizes)
    strategy = tpmlp.Strategy(**{"reduction": "invariant", **fields})
    where: dict[str, Any] = {"mesh": mesh, "strategy": strategy}
    x, y, weight = samples(problem)
    params = model.init(jax.random.key(0), mesh, strategy=strategy, dtype=dtype)
    objective = {"loss": loss, "regularizer": regularizer}
    t = tpmlp.trace(model, params, x, y, weight=weight, **objective, **where)
    layers = range(1, model.num_layers + 1)
    found = {f"{name}_{l}": bits(t.logical(name, l)) for l in layers for name in ("h", "z")}
    found |= {"loss": bits(t.loss)}
    found |= {f"g_{l}": bits(t.logical("g", l)) for l in reversed(layers)}
    for l, (dW, db) in reversed(list(enumerate(tpmlp.to_numpy(model, t.grads), 1))):
        found |= {f"dW_{l}": bits(dW), f"db_{l}": bits(db)}
    found["norm of the gradient"] = bits(tpmlp.global_norm(model, t.grads, **where))
    result = tpmlp.fit(
        model,
        (x, y, weight),
        **objective,
        **where,
        params=params,
        optimizer=optimizer or optax.adam(1e-2),
        steps=NUM_STEPS,
        batch_size=24,
        validation=(x[:20], y[:20]),
        log_every=1,
        progress=False,
    )
    timings = ("seconds", "samples_per_s")
    for record in result.history:
        numbers = [v for k, v in sorted(record.items()) if k not in timings]
        found[f"step {record['step']}"] = bits(numbers)
    assert result.steps == len(result.history) == NUM_STEPS
    found["trained"] = bits(tpmlp.to_numpy(model, result.params))
    if strategy.reduction == "invariant":  # Else the state is padded otherwise on each mesh.
        found["state of the optimiser"] = bits(result.opt_state)
    return found


def assert_same_bits(found: dict[str, str], wanted: dict[str, str]) -> None:
    first = next((name for name in wanted if found[name] != wanted[name]), None)
    assert first is None, f"the first that differs is {first}"


@pytest.mark.parametrize(("run", "sizes"), SOME, ids=name_of)
def test_a_whole_training_run_has_the_same_bits_on_every_mesh(run: str, sizes: Sizes) -> None:
    assert_same_bits(history(run, sizes), history(run, ONE))


# All are one sample to a block, some of them padding: what each device adds to dW is one product.
SMALL_BATCHES = (1, 5, 8)
SMALL: list[Sizes] = [(8, 1, 1), (2, 2, 2)]


@cache
def steps_of_small_batches(sizes: Sizes) -> dict[str, str]:
    """Return hashes of the loss and the gradient of a few samples, a batch after another."""
    problem = Problem(widths=WIDTHS, activation="gelu", num_samples=8)
    where: dict[str, Any] = {
        "mesh": mesh_of(sizes),
        "strategy": tpmlp.Strategy(reduction="invariant"),
    }
    x, y, _ = samples(problem)
    params = problem.model.init(jax.random.key(0), **where)
    step = tpmlp.value_and_grad(problem.model, loss=problem.loss, **where)
    found = {}
    for n in SMALL_BATCHES:
        value, grads = step(params, x[:n], y[:n])
        found[f"loss of {n}"] = bits(value)
        for l, layer in enumerate(tpmlp.to_numpy(problem.model, grads), 1):
            found |= {f"d{name}_{l} of {n}": bits(d) for name, d in zip("Wb", layer, strict=True)}
    return found


@pytest.mark.parametrize("sizes", SMALL, ids=name_of)
def test_a_batch_of_a_few_samples_has_the_same_bits_on_every_mesh(sizes: Sizes) -> None:
    assert_same_bits(steps_of_small_batches(sizes), steps_of_small_batches(ONE))


def test_another_sum_would_have_other_bits() -> None:
    """The hashes see a last bit: a run that is not invariant differs from mesh to mesh."""
    fast = [
        history_of(sizes, activation="gelu", loss="cross_entropy", reduction="fast")
        for sizes in (ONE, (2, 2, 2))
    ]
    with pytest.raises(AssertionError, match="the first that differs is z_1"):
        assert_same_bits(*fast)


# Right numbers, moved as predicted


REAL = Problem(weighted=True, num_samples=30)


@cache
def step_of(sizes: Sizes, problem: Problem, regularizer: Any = None) -> tuple[Any, Any, Any]:
    """Return a step, its parameters and its batch."""
    where: dict[str, Any] = {
        "mesh": mesh_of(sizes),
        "strategy": tpmlp.Strategy(reduction="invariant"),
    }
    x, y, weight = samples(problem)
    params = tpmlp.from_numpy(problem.model, arrays(problem), **where)
    batch = tpmlp.shard_batch(problem.model, x, y, weight=weight, loss=problem.loss, **where)
    step = tpmlp.value_and_grad(problem.model, loss=problem.loss, regularizer=regularizer, **where)
    return step, params, batch


@pytest.mark.parametrize("sizes", [ONE, (1, 4, 1), (2, 2, 2)], ids=name_of)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "logistic", "output"])
def test_float64_gradients_equal_the_reference(sizes: Sizes, loss: str) -> None:
    problem = Problem(weighted=True, loss=loss)
    x, y, weight = samples(problem)
    meant, R = get_loss(loss).reference, tpmlp.l2(0.1)
    wanted = reference.value_and_grad(
        arrays(problem), x, y, activation="sigmoid", loss=meant, weight=weight,
        regularizer=R.reference,
    )  # fmt: skip
    step, params, batch = step_of(sizes, problem, R)
    value, grads = step(params, *batch)
    assert relative_error(value, wanted[0]) <= FLOAT64
    logical = tpmlp.to_numpy(problem.model, grads)
    for got, right in zip(jax.tree.leaves(logical), jax.tree.leaves(wanted[1]), strict=True):
        assert relative_error(got, right) <= FLOAT64


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2), (8, 1, 1)], ids=name_of)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_step_moves_what_is_predicted(sizes: Sizes, loss: str) -> None:
    problem = Problem(loss=loss)
    step, params, batch = step_of(sizes, problem, tpmlp.l1(0.1))
    objective = step.objective
    predicted = step_collectives(
        objective.placement,
        bias=True,
        batch_size=problem.num_samples,
        dtype="float64",
        loss=objective.loss,
        penalty=True,
    )
    audit = tpmlp.audit(step, params, *batch)
    kinds = {row.kind for row in predicted}
    assert "all_reduce" not in audit.counts
    for kind in kinds | set(audit.counts):
        wanted = sum(row.bytes for row in predicted if row.kind == kind)
        assert audit.bytes_by(kind) == wanted, kind


# What is refused


REFUSED = {
    "overlap": ({"overlap": "ring"}, "overlap='ring'"),
    "reduce_dtype": ({"reduce_dtype": "bfloat16"}, "reduce_dtype='bfloat16'"),
    "shard_weights": ({"shard_weights": True}, "shard_weights=True"),
    "microbatches": ({"microbatches": 2}, "microbatches=2"),
}


@pytest.mark.parametrize(("fields", "words"), REFUSED.values(), ids=REFUSED)
def test_what_adds_in_an_order_of_its_own_is_refused(fields: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tpmlp.Strategy(reduction="invariant", **fields)


def test_an_axis_that_does_not_divide_the_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must divide 8.*got \{'x': 3\}"):
        tpmlp.MLP((4, 2)).init(
            jax.random.key(0), mesh_of((2, 3, 1)), strategy=tpmlp.Strategy(reduction="invariant")
        )


def test_a_users_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"regularizer must be tpmlp\.l2.*invariant"):
        step_of(ONE, REAL, lambda layers: layers[0][0].sum())


SUMMING = {
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "scale_by_trust_ratio": optax.lamb(1e-3),
    "add_noise": optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
    "centralize": optax.chain(optax.centralize(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", SUMMING)
def test_an_optimizer_that_is_not_elementwise_is_refused_by_name(name: str) -> None:
    x, y, _ = samples(REAL)
    with pytest.raises(ValueError, match=rf"must be elementwise .* got .*{name}"):
        tpmlp.fit(
            REAL.model,
            (x, y),
            loss="cross_entropy",
            mesh=mesh_of((1, 2, 2)),
            strategy=tpmlp.Strategy(reduction="invariant"),
            optimizer=SUMMING[name],
            steps=1,
            batch_size=30,
            progress=False,
        )
