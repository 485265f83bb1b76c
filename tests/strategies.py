"""Strategies as rows: what a row computes, and everything there is to know of its one program.

A Row is a strategy on a mesh, with the type of the parameters. Where all types are float64 its data
are real numbers, compared at 1e-12. Elsewhere they are integers so small that nothing is rounded,
in bfloat16 neither, and so the gradients are equal bit for bit.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import jax
import numpy as np

import tpmlp
from tests.cases import LAYOUTS, Sizes, mesh_of, name_of
from tests.pairwise import Value, covering
from tpmlp import reference
from tpmlp.batch import Batch
from tpmlp.kernels.cost import Collective
from tpmlp.losses import Cotangent
from tpmlp.predict import step_collectives
from tpmlp.step import Step

WIDTHS = (17, 12, 20, 10)
NUM_LAYERS = len(WIDTHS) - 1
TENSORS = ("loss", *(f"{kind}_{l}" for kind in ("dW", "db") for l in range(1, NUM_LAYERS + 1)))

# LLVM's optimisations are half of the time that compiling takes, and change no collective.
QUICKLY: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}

# Names of keep and keep_every together.
KEEPS: dict[str, dict[str, Any]] = {
    "shard": {"keep": "shard"},
    "gathered": {"keep": "gathered"},
    "recompute": {"keep": "recompute"},
    "recompute1": {"keep": "recompute", "keep_every": 1},
    "recompute2": {"keep": "recompute", "keep_every": 2},
    "recompute3": {"keep": "recompute", "keep_every": 3},
}
# sizes are (data, x, y): 3 and 6 devices, rings of 2, 3 and 4, one and two tensor axes, and none.
FIELDS: dict[str, tuple[Any, ...]] = {
    "sizes": ((1, 3, 1), (2, 2, 2), (2, 1, 4), (8, 1, 1), (3, 2, 1)),
    "layout": tuple(LAYOUTS),
    # Of three layers every second one is kept by default: recompute2 is the same program.
    "keep": tuple(keep for keep in KEEPS if keep != "recompute2"),
    "overlap": ("none", "ring", "bidirectional_ring"),
    "shard_weights": (False, True),
    "microbatches": (1, 2, 3),
    "param_dtype": ("float64", "float32"),
    "compute_dtype": (None, "float64", "float32", "bfloat16"),
    "reduce_dtype": (None, "float32", "bfloat16"),
}


def compatible(a: Value, b: Value) -> bool:
    """Return whether two values may meet: not what is refused, nor what is another's program."""
    return _fits(*a, *b) and _fits(*b, *a)


def _fits(field: str, value: Any, other: str, other_value: Any) -> bool:
    if field != "sizes":
        return True
    data, x, y = value
    return {
        # Where x and y are both larger than 1 layers alternate; where both are 1 no word matters.
        "layout": other_value == "column" if x * y == 1 else 1 in (x, y) or "-" in str(other_value),
        # A ring of two has one hop, whichever way round.
        "overlap": max(x, y) >= {"none": 1, "ring": 2, "bidirectional_ring": 3}.get(other_value, 0),
        "shard_weights": data > 1 or not other_value,
    }.get(other, True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A strategy on a mesh; fields as in FIELDS."""

    sizes: Sizes
    layout: str
    keep: str = "shard"
    overlap: Any = "none"
    shard_weights: bool = False
    microbatches: int = 1
    param_dtype: str = "float64"
    compute_dtype: str | None = None
    reduce_dtype: str | None = None

    def __str__(self) -> str:
        parts = {**asdict(self), "sizes": name_of(self.sizes)}
        parts["shard_weights"] = "split" if self.shard_weights else "whole"
        return "-".join(str(part) for part in parts.values())

    @property
    def strategy(self) -> tpmlp.Strategy:
        """The strategy."""
        words = LAYOUTS[self.layout]
        return tpmlp.Strategy(
            layout=tuple(words[i % len(words)] for i in range(NUM_LAYERS)),
            **KEEPS[self.keep],
            overlap=self.overlap,
            shard_weights=self.shard_weights,
            microbatches=self.microbatches,
            compute_dtype=self.compute_dtype,
            reduce_dtype=self.reduce_dtype,
        )

    @property
    def is_real(self) -> bool:
        """Whether all is float64, so that real numbers can be compared at 1e-12."""
        computes = self.compute_dtype in (None, "float64") and self.reduce_dtype is None
        return self.param_dtype == "float64" and computes


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and its objective, with the gradient by the reference."""

    model: tpmlp.MLP
    arrays: Any
    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    loss: Any
    regularizer: Any
    expected: Mapping[str, np.ndarray]

    @property
    def samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples, targets and weights, on the host."""
        return self.x, self.y, self.weight


@cache
def real_task() -> Task:
    """Return float64 data, with weights of samples and a penalty."""
    rng = np.random.default_rng(11)
    arrays = [(rng.normal(size=(o, i)) / i**0.5, rng.normal(size=o)) for i, o in pairwise(WIDTHS)]
    x, y, weight = rng.normal(size=(30, 17)), rng.integers(0, 10, 30), rng.uniform(0, 2, 30)
    loss, grads = reference.value_and_grad(
        arrays, x, y, activation="sigmoid", loss="cross_entropy", weight=weight,
        regularizer=reference.l2(0.1),
    )  # fmt: skip
    return Task(
        model=tpmlp.MLP(WIDTHS, activation="sigmoid"),
        arrays=arrays,
        x=x,
        y=y,
        weight=weight,
        loss="cross_entropy",
        regularizer=tpmlp.l2(0.1),
        expected=named(loss, grads),
    )


# bfloat16 has 8 significant bits: it holds every integer up to 2^8.
LARGEST = 2**8


@cache
def integer_task() -> Task:
    """Return integers of whose products no partial sum, in any order, is larger than LARGEST."""
    arrays, x, y, weight, run = next(filter(_is_small, map(_integers, range(100))))
    return Task(
        model=tpmlp.MLP(WIDTHS, activation="relu"),
        arrays=arrays,
        x=x,
        y=y,
        weight=weight,
        loss=Cotangent(),
        regularizer=None,
        expected=named(run.loss, [(run.dW[l], run.db[l]) for l in run.dW]),
    )


def _integers(seed: int) -> tuple[Any, ...]:
    """Draw mostly zeros, else 1 or 2 of either sign; one sample has weight 0, one 2."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, share: float) -> np.ndarray:
        sign = rng.choice([-1.0, 1.0], shape)
        return np.where(rng.random(shape) < share, sign * rng.integers(1, 3, shape), 0)

    arrays = [(draw(o, i, share=0.2), draw(o, share=0.5)) for i, o in pairwise(WIDTHS)]
    x, v = draw(10, WIDTHS[0], share=0.3), draw(10, WIDTHS[-1], share=0.6)
    weight = np.array([1.0, 0, 1, 2, 1, 1, 1, 1, 1, 1])
    run = reference.trace(
        arrays, x, v, activation="relu", loss=reference.cotangent(), weight=weight
    )
    return arrays, x, v, weight, run


def _is_small(task: tuple[Any, ...]) -> bool:
    """Return whether magnitudes of terms add up to LARGEST at most: in z, dh, dW and db."""
    arrays, *_, run = task
    sums = []
    for l, (W, b) in enumerate(arrays, 1):
        h, g, W, b = map(np.abs, (run.h[l], run.g[l], W, b))
        sums += [(h @ W.T + b).max(), (g @ W).max(), (g.T @ h).max(), g.sum(axis=0).max()]
    return max(sums) <= LARGEST


def named(loss: Any, grads: Any) -> dict[str, np.ndarray]:
    """Return loss and gradients by the names of TENSORS."""
    tensors = {"loss": np.asarray(loss)}
    for l, (dW, db) in enumerate(grads, 1):
        tensors |= {f"dW_{l}": dW, f"db_{l}": db}
    return tensors


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one row's program computed, and what it is.

    Attributes:
        task: the task.
        step: its step.
        params: parameters, placed.
        batch: the step's other arguments by name, placed.
        result: (loss, gradients), padded.
        tensors: the same by name, without padding.
        audit: of the program.
    """

    task: Task
    step: Step
    params: Any
    batch: Mapping[str, Any]
    result: Any
    tensors: Mapping[str, np.ndarray]
    audit: tpmlp.Audit


def made(row: Row) -> tuple[Task, Step, Any, dict[str, Any]]:
    """Return a row's task, step, placed parameters, and the step's arguments by name."""
    task, where = task_of(row), {"mesh": mesh_of(row.sizes), "strategy": row.strategy}
    arrays = [tuple(a.astype(row.param_dtype) for a in layer) for layer in task.arrays]
    params = tpmlp.from_numpy(task.model, arrays, **where)
    takes_cotangent = isinstance(task.loss, Cotangent)
    loss = None if takes_cotangent else task.loss
    step = tpmlp.value_and_grad(task.model, loss=loss, regularizer=task.regularizer, **where)
    x, y, weight = tpmlp.shard_batch(
        task.model, task.x, task.y, weight=task.weight, loss=task.loss, **where
    )
    target = "cotangent" if takes_cotangent else "y"
    return task, step, params, {"x": x, target: y, "weight": weight}


def task_of(row: Row) -> Task:
    """Return what a row computes."""
    return real_task() if row.is_real else integer_task()


# Real numbers on every mesh, with every keep and overlap; the other rows are the generator's.
FLOAT64_ROWS = (
    ((1, 3, 1), "row", "recompute", "bidirectional_ring", False, 2, None),
    ((2, 2, 2), "row-column", "shard", "ring", True, 3, None),
    ((2, 1, 4), "column-row", "recompute", "bidirectional_ring", True, 1, "float64"),
    ((8, 1, 1), "column", "gathered", "none", True, 3, None),
    ((3, 2, 1), "row-column", "recompute3", "ring", True, 2, "float64"),
    ((1, 2, 3), "column-row", "recompute1", "none", False, 2, None),
)


def pairwise_rows() -> list[Row]:
    """Return rows that have every compatible pair of values of FIELDS."""
    start = [
        dict(zip(FIELDS, (*row[:6], "float64", row[6], None), strict=True)) for row in FLOAT64_ROWS
    ]
    return [Row(**row) for row in covering(FIELDS, compatible, start)]


def covering_values(rows: list[Row]) -> list[Row]:
    """Return few of the rows that still have every value of every field."""
    missing = {(field, value) for field, values in FIELDS.items() for value in values}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(missing & asdict(row).items()))
        missing -= asdict(best).items()
        chosen.append(best)
    return chosen


ROWS = pairwise_rows()
FEW_ROWS = covering_values(ROWS)


# The claims of one row follow one another; a few rows back is enough.
@lru_cache(maxsize=4)
def outcome(row: Row) -> Outcome:
    """Compile a row's step once; run and audit it."""
    task, step, params, batch = made(row)
    # Of a row in FEW_ROWS the step is called again, which does not compile quickly.
    compiled = step.lower(params, **batch).compile(None if row in FEW_ROWS else QUICKLY)
    loss, grads = compiled(params, Batch(*batch.values()))
    return Outcome(
        task=task,
        step=step,
        params=params,
        batch=batch,
        result=(np.asarray(loss), jax.tree.map(np.asarray, grads)),
        tensors=named(np.asarray(loss), tpmlp.to_numpy(task.model, grads)),
        audit=tpmlp.audit(compiled),
    )


Volumes = dict[tuple[str, frozenset[str]], Fraction]


def predicted(row: Row) -> list[Collective]:
    """Return the collectives that a row is predicted to have."""
    run = outcome(row)
    return step_collectives(
        run.step.objective.placement,
        bias=True,
        batch_size=len(run.task.x),
        dtype=row.param_dtype,
        loss=run.step.objective.loss,
        penalty=run.task.regularizer is not None,
    )


def volumes(rows: list[Collective]) -> Volumes:
    """Return the predicted bytes by kind and axes, exact."""
    total = Volumes()
    for row in rows:
        rounds = 2 if row.kind == "all_reduce" else 1
        words = Fraction(rounds * row.elements * (row.num_devices - 1), row.num_devices)
        key = row.kind, frozenset(row.axes)
        total[key] = total.get(key, Fraction()) + words * row.item_bytes * row.times
    return total


def counts(rows: list[Collective]) -> dict[str, int]:
    """Return how often each kind is predicted to run; those of a ring are hops."""
    total = Counter[str]()
    for row in rows:
        total[row.kind] += row.times * (row.num_devices - 1 if row.kind == "ppermute" else 1)
    return dict(total)


def volumes_of(audit: tpmlp.Audit) -> Volumes:
    """Return the bytes that a program moves by kind and axes."""
    total = Volumes()
    for row in audit.collectives:
        assert row.count is not None
        key = row.kind, frozenset(row.axes)
        total[key] = total.get(key, Fraction()) + row.exact_bytes * row.count
    return total


def program(
    widths: tuple[int, ...], sizes: Sizes, batch_size: int, loss: Any = "mse", **fields: Any
) -> jax.stages.Compiled:
    """Compile a step of zeros in float32, for what its program is."""
    model, mesh, strategy = tpmlp.MLP(widths), mesh_of(sizes), tpmlp.Strategy(**fields)
    zeros = [
        (np.zeros(shape, np.float32), np.zeros(shape[0], np.float32))
        for shape in model.layer_shapes
    ]
    params = tpmlp.from_numpy(model, zeros, mesh, strategy=strategy)
    step = tpmlp.value_and_grad(model, loss=loss, mesh=mesh, strategy=strategy)
    x, y = (np.zeros((batch_size, width), np.float32) for width in (widths[0], widths[-1]))
    return step.lower(params, x, y).compile(QUICKLY)
