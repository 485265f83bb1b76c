"""What the tests of the core share: meshes with layouts, data, and both sides of a comparison.

A Problem says what is computed; `sharded` computes every tensor of it with the kernel, on a mesh
under a layout, and `expected` with the NumPy reference. Tensors go by the names of the mathematics:
loss, z_1, g_1, dW_1, db_1, ... Arrays are features first, as in the kernel; the sharded ones still
have their padding. Results are cached, so that each tensor can have a test of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import tpmlp
from conftest import MESHES
from tpmlp import reference
from tpmlp.activations import get_activation
from tpmlp.batch import Batch
from tpmlp.kernels.backprop import Arrays
from tpmlp.kernels.objective import Pass, Value
from tpmlp.losses import Logistic, get_loss
from tpmlp.objective import Objective, make_objective

Sizes = tuple[int, int, int]
Tensors = dict[str, np.ndarray]

# The words of the layers, repeated. For three layers these four have every word at both ends of
# the network and every pair of neighbours.
LAYOUTS = {
    "column": ("column",),
    "row": ("row",),
    "column-row": ("column", "row"),
    "row-column": ("row", "column"),
}


def layouts(sizes: Sizes) -> tuple[str, ...]:
    """Return the names in LAYOUTS that a mesh can have, without those that mean the same."""
    _, x, y = sizes
    if x * y == 1:
        return ("column",)
    return tuple(LAYOUTS) if 1 in (x, y) else ("column-row", "row-column")


PLACEMENTS = [(sizes, layout) for sizes in MESHES for layout in layouts(sizes)]
# One layout a mesh, all of them in turn, for claims that need every mesh but not every layout.
ONE_LAYOUT = [(sizes, layouts(sizes)[i % len(layouts(sizes))]) for i, sizes in enumerate(MESHES)]
# Widths that these do not divide, both kinds of roles, data parallelism, two tensor axes.
FEW_PLACEMENTS = [((1, 3, 1), "row"), ((4, 2, 1), "column"), ((2, 2, 2), "row-column")]


def name_of(value: Any) -> str | None:
    """Name a placement or mesh in a test's id."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple):
        return f"{name_of(value[0])}-{value[1]}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def mesh_of(sizes: Sizes) -> Mesh:
    """Make the mesh of sizes (data, x, y)."""
    data, x, y = sizes
    return tpmlp.make_mesh(data=data, x=x, y=y)


def strategy_of(layout: str, num_layers: int) -> tpmlp.Strategy:
    """Return the strategy with a name of LAYOUTS."""
    words = LAYOUTS[layout]
    return tpmlp.Strategy(layout=tuple(words[i % len(words)] for i in range(num_layers)))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, its data and an objective; hashable, so that results can be cached.

    Attributes:
        integers: whether weights, biases, samples and targets are small integers in float32,
            so that every sum is exact and its order cannot matter.
    """

    widths: tuple[int, ...] = (17, 12, 20, 10)
    activation: Any = "sigmoid"
    bias: bool = True
    loss: Any = "cross_entropy"
    regularizer: Any = None
    num_samples: int = 30
    weighted: bool = False
    integers: bool = False
    seed: int = 0

    @property
    def model(self) -> tpmlp.MLP:
        """The MLP."""
        return tpmlp.MLP(self.widths, activation=self.activation, bias=self.bias)

    @property
    def num_layers(self) -> int:
        """The number of W_l."""
        return len(self.widths) - 1

    @property
    def tensors(self) -> list[str]:
        """Names of all tensors of the problem."""
        kinds = ("z", "g", "dW", "db") if self.bias else ("z", "g", "dW")
        return ["loss", *(f"{k}_{l}" for k in kinds for l in range(1, self.num_layers + 1))]


@cache
def arrays(problem: Problem) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Return weights and biases at logical widths."""
    rng = np.random.default_rng(problem.seed)

    def draw(*shape: int) -> np.ndarray:
        if problem.integers:
            return rng.integers(-1, 2, shape).astype(np.float32)
        return rng.normal(size=shape) / shape[-1] ** 0.5

    pairs = pairwise(problem.widths)
    return [(draw(o, i), draw(o) if problem.bias else None) for i, o in pairs]


@cache
def samples(problem: Problem) -> tuple[np.ndarray, Any, np.ndarray | None]:
    """Return x [B, d_0], y as the loss wants it, and weights [B], two of them 0, or None."""
    rng = np.random.default_rng(problem.seed + 1)
    B, C = problem.num_samples, problem.widths[-1]
    x = rng.normal(size=(B, problem.widths[0]))
    if problem.integers:
        x = rng.integers(-2, 3, x.shape).astype(np.float32)
    loss = get_loss(problem.loss)
    if isinstance(loss, Logistic):
        y: Any = rng.integers(0, 2, (B, C))
    else:
        y = rng.integers(0, C, B) if loss.targets == "labels" else rng.normal(size=(B, C))
    weight = rng.uniform(0.1, 3, B)
    weight[1 :: max(2, B // 2)] = 0
    return x, None if loss.targets is None else y, weight if problem.weighted else None


def everything(objective: Objective) -> Callable[[Any, Batch], Pass]:
    """Return the kernel's whole pass on placed arrays, with z and g, compiled."""
    placement = objective.placement
    layers = range(1, objective.model.num_layers + 1)
    z = [placement.spec("O/g/s B/d", l) for l in layers]
    scalar = PartitionSpec()
    # The results' own tuples, with a PartitionSpec in the place of each array.
    value = Value._make([scalar, scalar, scalar, None])
    arrays = Arrays(h=None, z=z, sigma_prime=None, g=z)
    specs = Pass._make([value, objective.param_specs, arrays])

    def body(*blocks: Any) -> Pass:
        result = objective.run(*blocks)
        return result._replace(arrays=result.arrays._replace(h=None, sigma_prime=None))

    return jax.jit(objective.map(body, specs))


@cache
def _compiled(problem: Problem, placement: tuple[Sizes, str]) -> Callable[..., Pass]:
    """Compile once for a problem with and without weights: the program is the same."""
    mesh, strategy = mesh_of(placement[0]), strategy_of(placement[1], problem.num_layers)
    objective = make_objective(
        problem.model,
        loss=problem.loss,
        mesh=mesh,
        strategy=strategy,
        regularizer=problem.regularizer,
    )
    run = everything(objective)
    params = tpmlp.from_numpy(problem.model, arrays(problem), mesh, strategy=strategy)

    def call(x: Any, y: Any, weight: Any) -> Pass:
        batch = tpmlp.shard_batch(
            problem.model,
            x,
            y,
            mesh=mesh,
            strategy=strategy,
            weight=weight,
            loss=objective.loss,
        )
        return run(params, batch)

    return call


@cache
def sharded(problem: Problem, placement: tuple[Sizes, str]) -> Tensors:
    """Return every tensor of a problem from the kernel, padding included."""
    bare = replace(problem, weighted=False)
    result = _compiled(bare, placement)(*samples(problem))
    tensors = {"loss": result.value.loss, "correct": result.value.correct}
    seen = result.arrays
    for l, ((dW, db), z, g) in enumerate(zip(result.grads, seen.z, seen.g, strict=True), 1):
        tensors |= {f"dW_{l}": dW, f"z_{l}": z, f"g_{l}": g}
        tensors |= {} if db is None else {f"db_{l}": db}
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


@cache
def expected(problem: Problem) -> Tensors:
    """Return every tensor of a problem from the reference; R is not in it."""
    x, y, weight = samples(problem)
    loss = get_loss(problem.loss)
    t = reference.trace(
        arrays(problem),
        x,
        y,
        activation=reference_activation(problem.activation),
        loss=loss.reference,
        weight=weight,
    )
    tensors = {"loss": np.asarray(t.loss)}
    for l in t.dW:
        tensors |= {f"dW_{l}": t.dW[l], f"z_{l}": t.z[l].T, f"g_{l}": t.g[l].T}
        db = t.db[l]
        tensors |= {} if db is None else {f"db_{l}": db}
    return tensors


def reference_activation(activation: Any) -> Any:
    """Return an activation as the reference takes it: a name, or two functions of NumPy arrays."""
    if isinstance(activation, str):
        return activation
    meant = get_activation(activation)
    return tuple(lambda z, f=f: np.asarray(f(z)) for f in (meant.sigma, meant.sigma_prime))


def logical(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cut the padding off."""
    return tensor[tuple(slice(n) for n in shape)]


def padding(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the entries that `logical` cuts off."""
    outside = np.ones(tensor.shape, bool)
    outside[tuple(slice(n) for n in shape)] = False
    return tensor[outside]


def relative_error(actual: Any, wanted: Any) -> float:
    """Return max|a - b| / max|b|; NaN where anything is NaN, so that no comparison passes."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape, f"{actual.shape} != {wanted.shape}"
    difference = float(np.abs(actual - wanted).max())
    scale = float(np.abs(wanted).max())
    return difference / scale if scale else difference


def error_of(problem: Problem, placement: tuple[Sizes, str], tensor: str) -> float:
    """Return the relative error of one tensor of the kernel against the reference."""
    wanted = expected(problem)[tensor]
    return relative_error(logical(sharded(problem, placement)[tensor], wanted.shape), wanted)
