"""A step of an MLP beside the NumPy reference."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tpmlp import reference
from tpmlp.inspection import bounds
from tpmlp.inspection.bounds import Operation
from tpmlp.inspection.compared import Compared, Numbers, check_exact, roundoff_of
from tpmlp.inspection.trace import Name, Trace, trace
from tpmlp.kernels.execution import Execution, execution
from tpmlp.losses import Loss, get_loss
from tpmlp.model import MLP
from tpmlp.parameters import from_numpy, to_numpy
from tpmlp.placement import Placement
from tpmlp.strategy import Strategy


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Data:
    """Made-up parameters and samples, at logical widths."""

    arrays: list[tuple[np.ndarray, np.ndarray | None]]
    x: np.ndarray
    y: Any
    weight: np.ndarray

    @classmethod
    def draw(cls, model: MLP, loss: Loss, numbers: Numbers, batch_size: int) -> "_Data":
        arrays = [
            (
                numbers.draw(d_out, d_in, scale=d_in**-0.5),
                numbers.draw(d_out) if model.bias else None,
            )
            for d_out, d_in in model.layer_shapes
        ]
        return cls(
            arrays=arrays,
            x=numbers.draw(batch_size, model.widths[0]),
            y=numbers.targets(loss, (batch_size,), model.widths[-1]),
            weight=numbers.weights(batch_size),
        )


def compare_chain(
    model: MLP,
    mesh: Mesh,
    strategy: Strategy | None,
    *,
    loss: Any,
    numbers: Numbers,
    batch_size: int,
) -> Compared:
    """Run a step of an MLP and its reference on made-up numbers.

    Raises:
        ValueError: a loss without a reference; integers that could round.
    """
    placement = model.place(mesh, strategy)
    if numbers.kind == "integers":
        model, loss = replace(model, activation="relu"), "output"
    meant = get_loss(loss)
    data = _Data.draw(model, meant, numbers, batch_size)
    types = execution(placement, data.x.dtype)
    if numbers.kind == "integers":
        _check_exact(model, meant, data, types)
    run, pairs = _run(model, mesh, strategy, meant, data)
    operations = _operations(model, placement, run, data, meant, types)
    return Compared(placement.words, pairs, list(operations))


def _run(
    model: MLP, mesh: Mesh, strategy: Strategy | None, loss: Loss, data: _Data
) -> tuple[Trace, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Run the step and the reference; return the trace, and all tensors side by side."""
    params = from_numpy(model, data.arrays, mesh, strategy=strategy)
    given: dict[str, Any] = {"weight": data.weight, "loss": loss}
    with jax.default_matmul_precision("highest"):
        run = trace(model, params, data.x, data.y, mesh=mesh, strategy=strategy, **given)
    oracle = reference.trace(data.arrays, data.x, data.y, activation=model.activation, **given)
    return run, _pairs(model, run, oracle)


def _pairs(
    model: MLP, run: Trace, oracle: reference.Trace
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return every tensor of the run beside the reference's, in the order they are computed."""
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(name: Name, l: int) -> None:
        pairs[f"{name}_{l}"] = run.logical(name, l), getattr(oracle, name)[l]

    num_layers = model.num_layers
    for l in range(1, num_layers + 1):
        add("h", l)
        add("z", l)
        if l < num_layers:
            add("sigma_prime", l)
    pairs["loss"] = np.asarray(run.loss), np.asarray(oracle.loss)
    for l, (dW, db) in reversed(list(enumerate(to_numpy(model, run.grads), 1))):
        add("g", l)
        pairs[f"dW_{l}"] = dW, oracle.dW[l]
        if db is not None:
            pairs[f"db_{l}"] = db, np.asarray(oracle.db[l])
    return pairs


def _check_exact(model: MLP, loss: Loss, data: _Data, run: Execution) -> None:
    """Refuse integers that could round.

    With every number replaced by its size, each partial sum of the step, in any order, is at most
    the result: the reference of that says how large sums can get.
    """
    sizes = [(np.abs(W), None if b is None else np.abs(b)) for W, b in data.arrays]
    largest = reference.trace(
        sizes, np.abs(data.x), weight=data.weight, activation="relu", loss=loss
    )
    arrays = [*largest.z.values(), *largest.g.values(), *largest.dW.values()]
    most = max(largest.loss, *(array.max() for array in arrays))
    check_exact(most, run, f"widths={model.widths}, batch_size={len(data.x)}")


def _operations(
    model: MLP, placement: Placement, run: Trace, data: _Data, loss: Loss, types: Execution
) -> Iterator[Operation]:
    return bounds.operations(
        data.arrays,
        run,
        data.y,
        activation=model.activation,
        loss=loss.reference,
        weight=data.weight.astype(np.float64),
        roundoff=roundoff_of(placement, types),
    )
