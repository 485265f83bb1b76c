"""A step of an MLP beside the NumPy reference.

On a mesh with stages the trace is a pass without the schedule (tpmlp.trace), so the step itself is
run besides, and its loss, dW and db are compared too. Then "dW_3" is the step's, and "traced dW_3"
that of the trace, whose h_3 and g_3 are seen. A layer's fault is named as the trace's; a fault of
the step's "dW_3" is one of the schedule, the buffers, the messages or the sums.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tpmlp import reference
from tpmlp.inspection import bounds
from tpmlp.inspection.bounds import Operation
from tpmlp.inspection.compared import Compared, Numbers, check_at_once, check_exact, roundoff_of
from tpmlp.inspection.conditioning import Results, step_operations
from tpmlp.inspection.own_stage import gradients_on_own_stages, trace_on_own_stages
from tpmlp.inspection.trace import Name, Trace, trace
from tpmlp.kernels.execution import Execution, execution
from tpmlp.losses import Loss, get_loss
from tpmlp.model import MLP
from tpmlp.objective import Objective, make_objective
from tpmlp.parameters import from_numpy, to_numpy
from tpmlp.step import Step
from tpmlp.strategy import Strategy

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Problem:
    """A model on a mesh, a loss and made-up data; the run and its reference are functions of it."""

    model: MLP
    mesh: Mesh
    strategy: Strategy | None
    loss: Loss
    data: _Data
    types: Execution

    @property
    def bounded(self) -> dict[str, Any]:
        """What bounds of operations depend on."""
        placement = self.model.place(self.mesh, self.strategy)
        return {
            "loss": self.loss.reference,
            "weight": self.data.weight.astype(np.float64),
            "roundoff": roundoff_of(placement, self.types),
        }

    def params(self) -> Any:
        """Return the parameters on the mesh."""
        return from_numpy(self.model, self.data.arrays, self.mesh, strategy=self.strategy)

    def reference(self, arrays: Any) -> reference.Trace:
        """Return the reference at any parameters."""
        data, given = self.data, {"weight": self.data.weight, "loss": self.loss}
        return reference.trace(arrays, data.x, data.y, activation=self.model.activation, **given)

    def trace(self) -> Trace:
        """Return the trace."""
        given: dict[str, Any] = {"mesh": self.mesh, "strategy": self.strategy, "loss": self.loss}
        with jax.default_matmul_precision("highest"):
            return trace(
                self.model,
                self.params(),
                self.data.x,
                self.data.y,
                weight=self.data.weight,
                **given,
            )

    def step(self) -> tuple[jax.Array, Any]:
        """Return the loss and the gradients of a step."""
        objective = make_objective(
            self.model, loss=self.loss, mesh=self.mesh, strategy=self.strategy
        )
        with jax.default_matmul_precision("highest"):
            return _step(objective)(self.params(), self.data.x, self.data.y, self.data.weight)

    def operations(self, run: Trace) -> Iterator[Operation]:
        """Yield the operations of a trace."""
        data, activation = self.data, self.model.activation
        return bounds.operations(data.arrays, run, data.y, activation=activation, **self.bounded)


@lru_cache(maxsize=16)
def _step(objective: Objective) -> Step:
    """Return the step of an objective, compiled once."""
    return Step(objective)


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
        ValueError: a loss without a reference; integers that could round; microbatches on a mesh
            without stages.
    """
    placement = model.place(mesh, strategy)
    check_at_once(placement)
    if numbers.kind == "integers":
        model, loss = replace(model, activation="relu"), "output"
    meant = get_loss(loss)
    data = _Data.draw(model, meant, numbers, batch_size)
    types = execution(placement, data.x.dtype)
    if numbers.kind == "integers":
        _check_exact(model, meant, data, types)
    problem = _Problem(
        model=model, mesh=mesh, strategy=strategy, loss=meant, data=data, types=types
    )
    run, oracle = problem.trace(), problem.reference(data.arrays)
    pairs = _pairs(model, run, oracle)
    if placement.sizes["stage"] == 1:
        return Compared(placement.words, pairs, list(problem.operations(run)))
    of_trace = problem.operations(trace_on_own_stages(run))
    traced = [replace(op, tensor=_traced(op.tensor)) for op in of_trace]
    pairs = {_traced(name): pair for name, pair in pairs.items()}
    more, operations = _compare_step(problem, run, oracle, numbers)
    return Compared(placement.words, {**pairs, **more}, [*traced, *operations])


def _pairs(model: MLP, run: Trace, oracle: reference.Trace) -> Pairs:
    """Return every tensor of the run beside the reference's, in the order they are computed."""
    pairs: Pairs = {}

    def add(name: Name, l: int) -> None:
        pairs[f"{name}_{l}"] = run.logical(name, l), getattr(oracle, name)[l]

    num_layers, grads = model.num_layers, to_numpy(model, run.grads)
    for l in range(1, num_layers + 1):
        add("h", l)
        add("z", l)
        if l < num_layers:
            add("sigma_prime", l)
    pairs["loss"] = np.asarray(run.loss), np.asarray(oracle.loss)
    for l in range(num_layers, 0, -1):
        add("g", l)
        pairs |= _gradient_pairs(l, grads[l - 1], oracle)
    return pairs


def _gradient_pairs(l: int, grads: tuple[Any, Any], oracle: reference.Trace) -> Pairs:
    """Return dW_l and db_l, if there is one, beside the reference's."""
    dW, db = grads
    pairs = {f"dW_{l}": (dW, oracle.dW[l])}
    return pairs if db is None else {**pairs, f"db_{l}": (db, np.asarray(oracle.db[l]))}


def _traced(tensor: str) -> str:
    """Return what a tensor of the trace is called where the step has one of that name."""
    return f"traced {tensor}" if tensor.partition("_")[0] in ("loss", "dW", "db") else tensor


def _compare_step(
    problem: _Problem, run: Trace, oracle: reference.Trace, numbers: Numbers
) -> tuple[Pairs, Iterable[Operation]]:
    """Run a step, which shows its loss and its gradients, beside the reference and the trace."""
    loss, grads = problem.step()
    pairs: Pairs = {"loss": (np.asarray(loss), np.asarray(oracle.loss))}
    by_layer = list(enumerate(to_numpy(problem.model, grads), 1))
    for l, of_layer in reversed(by_layer):
        pairs |= _gradient_pairs(l, of_layer, oracle)
    operations = step_operations(
        Results(loss, gradients_on_own_stages(grads)),
        Results(run.loss, to_numpy(problem.model, run.grads)),
        problem.data.arrays,
        problem.reference,
        problem.data.y,
        rng=None if numbers.kind == "integers" else numbers.rng,
        **problem.bounded,
    )
    return pairs, operations


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
