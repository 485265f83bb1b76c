"""Any schedule on any mesh with stages computes the unsharded reference's loss and gradients.

A failure of all cases is one of the executor; of one schedule, one of its order or of its buffers;
of one mesh, one of what moves between stages; of uneven layers, one of empty slots.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import optax
import pytest

import tpmlp
from tests.tolerances import BFLOAT16_ROUNDOFF, FLOAT64
from tpmlp import reference
from tpmlp.losses import get_loss
from tpmlp.pipeline.schedule import Schedule
from tpmlp.strategy import Keep

BATCH = 24


@dataclass(frozen=True, kw_only=True)
class Case:
    """A schedule on a mesh (data, stage, x, y), with a number of layers and of microbatches."""

    sizes: tuple[int, int, int, int]
    schedule: str | Schedule
    microbatches: int
    num_layers: int
    chunks: int = 1
    layout: str = "auto"
    bias: bool = True
    loss: str = "cross_entropy"
    hidden: int = 10
    keep: Keep = "shard"
    keep_every: int | None = None
    shard_weights: bool = False

    def __str__(self) -> str:
        name = self.schedule if isinstance(self.schedule, str) else self.schedule.name
        of = f"{self.num_layers} layers, m={self.microbatches}"
        kept = "" if self.keep == "shard" else f", {self.keep}{self.keep_every or ''}"
        split = ", split weights" * self.shard_weights
        sizes = "x".join(map(str, self.sizes))
        return f"{name}, {sizes}, {of}, {self.layout}, {self.loss}{kept}{split}"

    @property
    def mesh(self) -> Any:
        data, stage, x, y = self.sizes
        return tpmlp.make_mesh(data=data, stage=stage, x=x, y=y)

    @property
    def model(self) -> tpmlp.MLP:
        # Widths that the meshes do not divide, and sigmoid, which shows what leaks of padding.
        interior = (self.hidden,) * (self.num_layers - 1)
        return tpmlp.MLP((7, *interior, 5), activation="sigmoid", bias=self.bias)

    @property
    def strategy(self) -> tpmlp.Strategy:
        return tpmlp.Strategy(
            schedule=self.schedule,
            microbatches=self.microbatches,
            chunks=self.chunks,
            layout=self.layout,
            keep=self.keep,
            keep_every=self.keep_every,
            shard_weights=self.shard_weights,
        )


OWN = Schedule.from_text("F0 F1 .  .  B0 W0 B1 W1\n.  F0 B0 F1 B1 W0 W1 .", name="own")
SPLIT_WEIGHTS = Case(
    sizes=(2, 2, 1, 2),
    schedule="1f1b",
    microbatches=4,
    num_layers=7,
    keep="gathered",
    shard_weights=True,
)
EVERY_SECOND = Case(
    sizes=(2, 2, 2, 1),
    schedule="interleaved",
    microbatches=2,
    num_layers=13,
    chunks=2,
    keep="recompute",
    keep_every=2,
    shard_weights=True,
    bias=False,
)
# Each schedule on one and on two tensor axes; 2, 4 and 8 stages; 3 and 6 devices; layers that the
# stages do not divide, an even and an odd number of slots, none at all.
CASES = [
    Case(sizes=(1, 2, 1, 1), schedule="1f1b", microbatches=1, num_layers=2),
    Case(sizes=(1, 4, 2, 1), schedule="1f1b", microbatches=8, num_layers=9),
    Case(sizes=(1, 2, 2, 2), schedule="1f1b", microbatches=4, num_layers=7, loss="mse"),
    Case(sizes=(1, 8, 1, 1), schedule="1f1b", microbatches=3, num_layers=8, bias=False),
    Case(sizes=(1, 2, 2, 2), schedule="gpipe", microbatches=4, num_layers=6),
    Case(sizes=(2, 3, 1, 1), schedule="gpipe", microbatches=2, num_layers=5, loss="output"),
    Case(sizes=(1, 2, 3, 1), schedule="interleaved", microbatches=4, num_layers=9, chunks=2),
    Case(sizes=(1, 2, 2, 2), schedule="interleaved", microbatches=2, num_layers=7, chunks=3),
    Case(sizes=(2, 2, 2, 1), schedule="zb-h1", microbatches=4, num_layers=5, layout="row"),
    Case(sizes=(1, 2, 2, 2), schedule="zb-h1", microbatches=2, num_layers=9),
    Case(sizes=(1, 2, 1, 3), schedule="zb-h2", microbatches=4, num_layers=8, layout="alternate"),
    Case(sizes=(1, 4, 1, 2), schedule="zb-v", microbatches=4, num_layers=11, layout="column"),
    Case(sizes=(1, 2, 2, 2), schedule="zb-v", microbatches=3, num_layers=8, loss="logistic"),
    Case(sizes=(1, 2, 2, 2), schedule="zb-v", microbatches=2, num_layers=5),
    Case(sizes=(1, 2, 2, 1), schedule=OWN, microbatches=2, num_layers=4),
    Case(sizes=(1, 2, 2, 2), schedule="1f1b", microbatches=2, num_layers=7, keep="gathered"),
    Case(sizes=(1, 2, 2, 2), schedule="zb-h1", microbatches=2, num_layers=9, keep="recompute"),
    SPLIT_WEIGHTS,
    EVERY_SECOND,
]


@cache
def data_of(case: Case, integers: bool = False) -> dict[str, Any]:
    rng, widths = np.random.default_rng(5), case.model.widths

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        if integers:
            return rng.integers(-1, 2, shape).astype(np.float64)
        return rng.normal(size=shape) * scale

    arrays = [
        (draw(d_out, d_in, scale=d_in**-0.5), draw(d_out) if case.bias else None)
        for d_in, d_out in pairwise(widths)
    ]
    targets = {
        "cross_entropy": rng.integers(0, widths[-1], BATCH),
        "mse": rng.normal(size=(BATCH, widths[-1])),
        "logistic": rng.integers(0, 2, (BATCH, widths[-1])).astype(np.float64),
    }
    weight = rng.integers(1, 3, BATCH) if integers else rng.uniform(0.5, 2, BATCH)
    return {
        "arrays": arrays,
        "x": draw(BATCH, widths[0]),
        "y": targets.get(case.loss),
        "weight": weight.astype(np.float64),
    }


def step_of(case: Case, model: tpmlp.MLP, data: dict[str, Any], **given: Any) -> tuple[Any, Any]:
    """Return the loss and the gradients, by layer, of a step of a case."""
    mesh, strategy = case.mesh, case.strategy
    params = tpmlp.from_numpy(model, data["arrays"], mesh, strategy=strategy)
    step = tpmlp.value_and_grad(model, loss=case.loss, mesh=mesh, strategy=strategy, **given)
    loss, grads = step(params, data["x"], data["y"], data["weight"])
    return loss, tpmlp.to_numpy(model, grads)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_references(case):
    check_step(case)


def check_step(case: Case) -> None:
    """Hold the loss and the gradients of a step to the reference's."""
    data = data_of(case)
    loss, grads = step_of(case, case.model, data)
    oracle = reference.trace(
        data["arrays"],
        data["x"],
        data["y"],
        activation="sigmoid",
        loss=get_loss(case.loss),
        weight=data["weight"],
    )
    assert abs(loss - oracle.loss) <= FLOAT64 * abs(oracle.loss)
    for l, (dW, db) in enumerate(grads, 1):
        assert np.abs(dW - oracle.dW[l]).max() <= FLOAT64 * np.abs(oracle.dW[l]).max(), f"dW_{l}"
        assert (db is None) != case.bias
        if case.bias:
            wanted = np.asarray(oracle.db[l])
            assert np.abs(db - wanted).max() <= FLOAT64 * np.abs(wanted).max(), f"db_{l}"


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_step_on_integers_is_the_references_bit_for_bit(schedule):
    case = Case(sizes=(1, 2, 2, 2), schedule=schedule, microbatches=4, num_layers=5, loss="output")
    data, model = data_of(case, integers=True), tpmlp.MLP(case.model.widths, activation="relu")
    loss, grads = step_of(case, model, data)
    given = {"activation": "relu", "loss": tpmlp.output(), "weight": data["weight"]}
    oracle = reference.trace(data["arrays"], data["x"], None, **given)
    assert loss == oracle.loss
    for l, (dW, db) in enumerate(grads, 1):
        assert (dW == oracle.dW[l]).all()
        assert (db == oracle.db[l]).all()


PADDED = Case(sizes=(2, 2, 2, 1), schedule="1f1b", microbatches=4, num_layers=6)


def test_gradients_of_padding_and_of_empty_slots_are_zero():
    case = Case(sizes=(1, 2, 2, 2), schedule="1f1b", microbatches=2, num_layers=5)
    mesh, strategy, model, data = case.mesh, case.strategy, case.model, data_of(case)
    params = tpmlp.from_numpy(model, data["arrays"], mesh, strategy=strategy)
    step = tpmlp.value_and_grad(model, loss="cross_entropy", mesh=mesh, strategy=strategy)
    _, grads = step(params, data["x"], data["y"])
    specs = jax.tree.leaves(model.specs(grads))
    for spec, array in zip(specs, jax.tree.leaves(grads), strict=True):
        padding = np.array(array)
        padding[tuple(map(slice, spec.shape))] = 0
        assert not padding.any()
    stages = grads.stages
    places = [(slot, stage) for slot in range(stages.num_slots) for stage in range(2)]
    empty = [(slot, stage) for slot, stage in places if stages.layer_in(slot, stage) is None]
    assert empty
    for slot, stage in empty:
        assert not any(np.asarray(array)[stage].any() for array in grads.slots[slot])


def test_a_batch_that_microbatches_do_not_divide_is_padded_with_weight_0():
    case, data = PADDED, data_of(PADDED)
    short = {**data, **{name: data[name][:21] for name in ("x", "y", "weight")}}
    loss, _ = step_of(case, case.model, short)
    oracle = reference.value_and_grad(
        data["arrays"],
        short["x"],
        short["y"],
        activation="sigmoid",
        loss=tpmlp.cross_entropy(),
        weight=short["weight"],
    )
    assert loss == pytest.approx(oracle[0], rel=FLOAT64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_in_a_narrower_type_are_those_without_stages(dtype):
    """Microbatches on one stage, in the same types: what is rounded is the same."""
    case, data = PADDED, data_of(PADDED)
    strategy = {"microbatches": 4, "compute_dtype": dtype}
    whole = tpmlp.make_mesh(data=2, x=2)
    losses = []
    for mesh in (case.mesh, whole):
        chosen = tpmlp.Strategy(**strategy)
        params = tpmlp.from_numpy(case.model, data["arrays"], mesh, strategy=chosen)
        step = tpmlp.value_and_grad(case.model, loss="mse", mesh=mesh, strategy=chosen)
        losses.append(float(step(params, data["x"], np.ones((BATCH, 5)))[0]))
    # Sums are float64 in another order; what is then kept may be rounded to a neighbour.
    neighbour = {"float32": 2**-23, "bfloat16": BFLOAT16_ROUNDOFF}[dtype]
    assert losses[0] == pytest.approx(losses[1], rel=neighbour)


def test_parameters_are_the_same_on_every_mesh_and_go_from_one_to_another():
    case, key = PADDED, jax.random.key(3)
    whole = tpmlp.make_mesh(x=8)
    other = Case(sizes=(1, 2, 2, 2), schedule="zb-v", microbatches=2, num_layers=6)
    staged = case.model.init(key, case.mesh, strategy=case.strategy)
    plain = case.model.init(key, whole)
    moved = [
        tpmlp.reshard(case.model, plain, case.mesh, strategy=case.strategy),
        tpmlp.reshard(case.model, staged, whole),
        tpmlp.reshard(case.model, staged, other.mesh, strategy=other.strategy),
        staged,
    ]
    expected = jax.tree.leaves(tpmlp.to_numpy(case.model, plain))
    for params in moved:
        for a, b in zip(jax.tree.leaves(tpmlp.to_numpy(case.model, params)), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_looking_and_norms_are_those_without_stages():
    data = data_of(PADDED)
    model, whole = PADDED.model, tpmlp.make_mesh(x=2)
    regularizer = tpmlp.elastic_net(0.1, 0.5)
    seen = []
    for mesh, strategy in ((PADDED.mesh, PADDED.strategy), (whole, None)):
        params = tpmlp.from_numpy(model, data["arrays"], mesh, strategy=strategy)
        given: dict[str, Any] = {"mesh": mesh, "strategy": strategy}
        step = tpmlp.value_and_grad(model, loss="mse", regularizer=regularizer, **given)
        loss, grads = step(params, data["x"], np.ones((BATCH, 5)))
        evaluation = tpmlp.evaluate(
            model, params, (data["x"], data["y"]), loss="cross_entropy", **given
        )
        outputs = tpmlp.apply(model, params, data["x"], **given)
        norm = tpmlp.global_norm(model, grads, **given)
        seen.append([loss, evaluation.loss, evaluation.accuracy, norm, np.asarray(outputs)])
    for a, b in zip(*seen, strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT64, atol=FLOAT64)


def test_training_is_that_without_stages():
    case = Case(sizes=(1, 2, 2, 1), schedule="zb-v", microbatches=4, num_layers=5)
    data = data_of(case)
    runs = []
    for mesh, strategy in ((case.mesh, case.strategy), (tpmlp.make_mesh(x=2), None)):
        params = tpmlp.from_numpy(case.model, data["arrays"], mesh, strategy=strategy)
        result = tpmlp.fit(
            case.model,
            (data["x"], data["y"]),
            loss="cross_entropy",
            mesh=mesh,
            strategy=strategy,
            optimizer=optax.adam(1e-2),
            steps=5,
            batch_size=8,
            params=params,
        )
        runs.append((result.history, tpmlp.to_numpy(case.model, result.params)))
    (history, staged), (expected, plain) = runs
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in expected])
    for a, b in zip(jax.tree.leaves(staged), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
