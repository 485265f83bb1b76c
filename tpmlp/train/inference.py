"""predict and evaluate: a trained model on any number of samples, batch by batch.

All batches have one shape, the last one filled up, so each function compiles once for a model, a
mesh and a batch size, and keeps what it compiled for the next call.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from tpmlp.checks import check_count
from tpmlp.kernels.network import Network, param_dtype
from tpmlp.models import Model
from tpmlp.objective import Evaluated, Objective, make_objective
from tpmlp.parameters import check_params
from tpmlp.strategy import Strategy
from tpmlp.train.batches import Samples, read_samples

T = TypeVar("T")
Kind = Literal["outputs", "classes", "probabilities"]

# Rows of a batch when the caller does not say: enough to keep devices busy, few enough to fit.
DEFAULT_BATCH_SIZE = 1024

# Steps dispatched and not waited for. One to hide the host's work; with many, the threads of
# simulated devices can wait for each other's collectives for ever.
MAX_IN_FLIGHT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The objective on all samples of a set.

    Attributes:
        loss: the data loss: the weighted mean over all samples, or the sum for a loss that sums.
        penalty: R(W).
        accuracy: the weighted share of right predictions; None for a loss that has none.
        num_samples: samples that count: those with a weight above 0.
    """

    loss: float
    penalty: float
    accuracy: float | None
    num_samples: int


def predict(
    model: Model,
    params: Any,
    x: Any,
    *,
    mesh: Mesh,
    strategy: Strategy | None = None,
    batch_size: int | None = None,
    kind: Kind = "outputs",
) -> np.ndarray:
    """Return what a model says of samples, as a NumPy array.

    Args:
        model: the model.
        params: placed for this mesh and strategy.
        x: samples [N, d_0].
        mesh: the mesh.
        strategy: Strategy() by default.
        batch_size: rows at a time; 1024, or all if there are fewer, by default.
        kind: "outputs" [N, d_out], h(W, x); "classes" [N], the largest output, or, where there
            is one output, whether it is above 0; "probabilities" [N, d_out], the softmax, or,
            where there is one output, the sigmoid.

    Raises:
        ValueError: parameters of another model, mesh or layout; x of a wrong shape or dtype, or
            with a NaN or an infinity; an unknown kind; a batch_size that is not positive.

    Examples:
        >>> import jax, numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(x=4, y=2)
        >>> mlp = tpmlp.MLP((3, 8, 10))
        >>> params = mlp.init(jax.random.key(0), mesh)
        >>> predict(mlp, params, np.ones((30, 3)), mesh=mesh, batch_size=16).shape
        (30, 10)
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}: got kind={kind!r}.")
    objective = make_objective(model, loss="output", mesh=mesh, strategy=strategy)
    samples = _checked(objective, params, (x, None))
    size = eval_batch_size(batch_size, samples.num_samples)
    outputs = _compiled_outputs(objective)
    width = objective.placement.outputs.width
    results = (outputs(params, batch) for batch, _ in samples.in_order(size))
    rows = [np.asarray(result)[:size, ..., :width] for result in in_flight(results)]
    return _KINDS[kind](np.concatenate(rows)[: samples.num_samples])


def evaluate(
    model: Model,
    params: Any,
    data: Any,
    *,
    loss: Any,
    mesh: Mesh,
    strategy: Strategy | None = None,
    regularizer: Any = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Return the loss and accuracy of a model on a set of samples.

    Args:
        model: the model.
        params: placed for this mesh and strategy.
        data: (x, y) or (x, y, weight).
        loss: as in tpmlp.value_and_grad.
        mesh: the mesh.
        strategy: Strategy() by default.
        regularizer: R; None by default.
        batch_size: rows at a time; 1024, or all if there are fewer, by default.

    Raises:
        ValueError: what is wrong with the data, the parameters or an argument.
    """
    objective = make_objective(
        model, loss=loss, mesh=mesh, regularizer=regularizer, strategy=strategy
    )
    samples = _checked(objective, params, data)
    size = eval_batch_size(batch_size, samples.num_samples)
    return evaluate_samples(objective, params, samples, size)


def evaluate_samples(
    objective: Objective, params: Any, samples: Samples, batch_size: int
) -> Evaluation:
    """Return the objective on samples that are checked; means are joined in float64."""
    run = _compiled_evaluate(objective)
    weights: list[float] = []

    def results() -> Iterator[Evaluated]:
        for batch, weight in samples.in_order(batch_size):
            weights.append(weight)
            yield run(params, batch)

    rows = np.array([jax.device_get(result) for result in in_flight(results())], np.float64)
    loss, penalty, correct = rows.T
    mean = objective.loss.reduction == "mean"
    accuracy = float(np.average(correct, weights=weights))
    return Evaluation(
        loss=float(np.average(loss, weights=weights) if mean else loss.sum()),
        penalty=float(penalty[0]),
        accuracy=None if math.isnan(accuracy) else accuracy,
        num_samples=samples.num_samples,
    )


def warm_up(objective: Objective, params: Any, samples: Samples, batch_size: int) -> None:
    """Compile what `evaluate_samples` will run."""
    batch, _ = next(samples.in_order(batch_size))
    jax.block_until_ready(_compiled_evaluate(objective)(params, batch))


def in_flight(results: Iterable[T]) -> Iterator[T]:
    """Yield results in order, with at most MAX_IN_FLIGHT begun and not waited for."""
    begun: deque[T] = deque()
    for result in results:
        begun.append(result)
        if len(begun) == MAX_IN_FLIGHT:
            yield jax.block_until_ready(begun.popleft())
    yield from begun


def eval_batch_size(batch_size: int | None, num_samples: int) -> int:
    """Return the rows of a batch; never more than there are samples."""
    wanted = DEFAULT_BATCH_SIZE if batch_size is None else check_count("batch_size", batch_size)
    return min(wanted, num_samples)


def _checked(objective: Objective, params: Any, data: Any) -> Samples:
    check_params(objective.model, params, objective.placement)
    dtype = param_dtype(params)
    return read_samples(
        "data", data, placement=objective.placement, loss=objective.loss, dtype=dtype
    )


@lru_cache(maxsize=16)
def _compiled_evaluate(objective: Objective) -> Callable[..., Evaluated]:
    return jax.jit(objective.evaluate)


@lru_cache(maxsize=16)
def _compiled_outputs(objective: Objective) -> Callable[..., jax.Array]:
    sizes = objective.placement.outputs.shape[:-1]

    def outputs(network: Network, params: Any, x: Any, y: None, weight: jax.Array) -> jax.Array:
        columns, _ = network.outputs(params, x)
        return columns.T.reshape(-1, *sizes, columns.shape[0])

    return jax.jit(objective.map(outputs, objective.placement.outputs.values.spec))


def _classes(outputs: np.ndarray) -> np.ndarray:
    if outputs.shape[-1] == 1:
        return (outputs[..., 0] > 0).astype(int)
    return outputs.argmax(axis=-1)


def _probabilities(outputs: np.ndarray) -> np.ndarray:
    if outputs.shape[-1] == 1:
        # The sigmoid is the softmax of (z, 0).
        return _softmax(np.concatenate([outputs, np.zeros_like(outputs)], axis=-1))[..., :1]
    return _softmax(outputs)


def _softmax(outputs: np.ndarray) -> np.ndarray:
    exp = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


_KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "outputs": lambda outputs: outputs,
    "classes": _classes,
    "probabilities": _probabilities,
}
