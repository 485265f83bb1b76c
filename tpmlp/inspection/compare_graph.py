"""A step of a Graph beside the plain functions that its rules are checked against.

The reference is jax.grad of the unsharded graph in float64 (tpmlp.graph.plain), its loss and
gradient by the outputs those of the NumPy reference. Each operation is one vertex's pass: r_v from
the run's own inputs, and the gradients of what v reads and of its parameters from the run's own
inputs and g_v; how far rounding may have put them is a running error (inspection.running_error).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tpmlp.graph import kinds, plain
from tpmlp.graph.graph import Graph
from tpmlp.graph.structure import Repeat, Structure
from tpmlp.graph.vertex import Vertex
from tpmlp.inspection.bounds import Operation, Phase, Roundoff, loss_operations, stored
from tpmlp.inspection.compared import Compared, Numbers, check_at_once, check_exact, roundoff_of
from tpmlp.inspection.graph_trace import GraphTrace
from tpmlp.inspection.report import Kind
from tpmlp.inspection.running_error import Bounded, with_errors
from tpmlp.inspection.trace import trace
from tpmlp.kernels.execution import execution
from tpmlp.losses import Loss, get_loss
from tpmlp.parameters import from_numpy, to_numpy
from tpmlp.randomness import random_words
from tpmlp.strategy import Strategy

# Their sums and products of integers are integers.
EXACT = (
    kinds.Source,
    kinds.Dense,
    kinds.Activation,
    kinds.Sum,
    kinds.Product,
    kinds.Concatenate,
    kinds.Slice,
    kinds.Scale,
    kinds.Shift,
    kinds.Positions,
    kinds.Embedding,
    kinds.Dropout,
)

# Of a sum over a row of a matrix of integers, about.
TERMS = 4


def compare_graph(
    graph: Graph,
    mesh: Mesh,
    strategy: Strategy | None,
    *,
    loss: Any,
    numbers: Numbers,
    batch_size: int,
) -> Compared:
    """Run a step of a graph and its reference on made-up numbers.

    Raises:
        ValueError: a loss without a reference; a vertex that is not exact, or integers that could
            round; a user's function whose rounding is not known, for "float32".
    """
    if numbers.kind == "integers":
        graph, loss = _exact(graph), "output"
    placement, meant = graph.place(mesh, strategy), get_loss(loss)
    check_at_once(placement)
    data = _Data.draw(graph, meant, numbers, batch_size)
    types = execution(placement, numbers.dtype)
    with jax.enable_x64(True):
        if numbers.kind == "integers":
            check_exact(data.most(), types, f"{len(graph.order)} vertices, batch_size={batch_size}")
        oracle = data.reference()
    params = from_numpy(graph, data.params, mesh, strategy=strategy)
    with jax.default_matmul_precision("highest"):
        run = trace(
            graph,
            params,
            data.x if len(data.x) > 1 else next(iter(data.x.values())),
            data.y,
            weight=data.weight,
            loss=meant,
            mesh=mesh,
            strategy=strategy,
            key=data.key if graph.dropouts else None,
        )
    with jax.enable_x64(True):
        steps = _Steps(graph, data, run, roundoff_of(placement, types), numbers.kind)
        operations = [*steps.forward(), *steps.loss(), *steps.backward()]
    return Compared(tuple(placement.roles.values()), _pairs(graph, run, oracle), operations)


def _exact(graph: Graph) -> Graph:
    """Return a graph with relu for activations, whose sums of integers are exact."""
    for vertex in graph.order:
        if not isinstance(vertex.kind, EXACT):
            raise ValueError(
                "kind='integers' must have vertices whose sums of integers are exact: got vertex "
                f"\"{vertex.name}\" ({vertex.kind.label}). Use kind='float64' or 'float32'."
            )

    def made_exact(item: Vertex | Repeat) -> Vertex | Repeat:
        if isinstance(item, Repeat):
            return replace(item, block=Structure(list(map(made_exact, item.block.vertices))))
        kind = item.kind
        if isinstance(kind, kinds.Activation):
            kind = kinds.Activation("relu")
        if isinstance(kind, kinds.Dropout):
            kind = kinds.Dropout(0.0)
        return Vertex(item.name, kind, *item.inputs, share=item.share)

    return Graph(list(map(made_exact, graph.vertices)), output=graph.output)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Oracle:
    """What the reference computes, by vertex; gradients as the parameters."""

    r: dict[str, Any]
    g: dict[str, Any]
    grads: dict[str, dict[str, Any]]
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Data:
    """Made-up parameters and samples, at logical widths."""

    graph: Graph
    loss: Loss
    params: dict[str, dict[str, np.ndarray]]
    x: dict[str, np.ndarray]
    y: Any
    weight: np.ndarray
    key: jax.Array

    @classmethod
    def draw(cls, graph: Graph, loss: Loss, numbers: Numbers, batch_size: int) -> "_Data":
        def parameter(shape: tuple[int, ...], start: Any) -> np.ndarray:
            is_matrix = start == "glorot"
            if numbers.kind == "integers":
                # A few of -1 and 1 a row: sums of products of vertices would outgrow the type.
                share = TERMS / shape[-1] if is_matrix else 1.0
                return np.sign(numbers.draw(*shape)) * (numbers.rng.random(shape) < share)
            if start == 1.0:
                return 1 + numbers.draw(*shape, scale=0.25)
            return numbers.draw(*shape, scale=shape[-1] ** -0.5 if is_matrix else 1.0)

        def samples(name: str) -> np.ndarray:
            shape = graph.shapes[name]
            sizes = tuple(n for n in (batch_size, shape.tokens, shape.width) if n is not None)
            if shape.vocabulary is not None:
                return numbers.rng.integers(0, shape.vocabulary, sizes)
            return numbers.draw(*sizes)

        made = graph.shapes[graph.output]
        predictions = (batch_size,) if made.tokens is None else (batch_size, made.tokens)
        return cls(
            graph=graph,
            loss=loss,
            params={
                owner: {name: parameter(p.shape, p.start) for name, p in mine.items()}
                for owner, mine in graph.arrays.items()
            },
            x={vertex.name: samples(vertex.name) for vertex in graph.sources},
            y=numbers.targets(loss, predictions, made.features),
            weight=numbers.weights(batch_size),
            key=jax.random.key(int(numbers.rng.integers(2**31))),
        )

    @property
    def words(self) -> jax.Array | None:
        """The random bits of dropout."""
        return random_words(self.key) if self.graph.dropouts else None

    @property
    def share(self) -> np.ndarray:
        """What each sample counts in the objective."""
        weight = self.weight.astype(np.float64)
        return weight / weight.sum() if self.loss.reduction == "mean" else weight

    @property
    def prediction_weight(self) -> np.ndarray:
        """The weight of each prediction."""
        weight = self.weight.astype(np.float64)
        return np.repeat(weight, self.graph.shapes[self.graph.output].positions)

    @property
    def prediction_targets(self) -> Any:
        """The target of each prediction."""
        y, tokens = self.y, self.graph.shapes[self.graph.output].tokens
        return y if y is None or tokens is None else y.reshape(-1, *y.shape[2:])

    def loss_and_gradient(self, outputs: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the data loss and its gradient by the outputs."""
        z, weight = outputs.reshape(-1, outputs.shape[-1]), self.prediction_weight
        per_sample, gradient = self.loss.reference(z.T, self.prediction_targets)
        scale = weight / weight.sum() if self.loss.reduction == "mean" else weight
        return float((scale * per_sample).sum()), (gradient * scale).T.reshape(outputs.shape)

    def reference(self) -> _Oracle:
        """Return what the unsharded graph computes in float64."""
        return self._reference(_wide(self.params), _wide(self.x))

    def most(self) -> float:
        """Return how large sums of the step can get: those of the sizes of all numbers."""
        sizes = _Data._reference(self, _sizes(self.params), _sizes(self.x))
        arrays = jax.tree.leaves((sizes.r, sizes.g, sizes.grads))
        return max(abs(sizes.loss), *(float(np.abs(array).max()) for array in arrays))

    def _reference(self, params: Any, x: Any) -> _Oracle:
        graph, share = self.graph, jnp.asarray(self.share)
        zeros = {
            name: jnp.zeros((len(self.weight), *_sizes_after_batch(graph, name)))
            for name in _with_gradients(graph)
        }

        def run(params: Any, added: Any) -> tuple[Any, Any]:
            r = plain.outputs(graph, params, x, words=self.words, added=added)
            return (r[graph.output], plain.activity(graph, r, share)), r

        r = jax.jit(lambda: run(params, zeros)[1])()
        loss, g = self.loss_and_gradient(np.asarray(r[graph.output]))

        def back(g: jax.Array) -> Any:
            _, pull, _ = jax.vjp(run, params, zeros, has_aux=True)
            return pull((g, jnp.ones(())))

        grads, by_vertex = jax.jit(back)(g)
        return _Oracle(r=r, g=by_vertex, grads=grads, loss=loss)


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """The operations of a run, each on the run's own inputs."""

    graph: Graph
    data: _Data
    run: GraphTrace
    roundoff: Roundoff
    kind: Kind

    @property
    def of_inputs(self) -> float:
        """How far an input of an operation may be from what is shown, relatively.

        A compiler may join what makes it with what reads it, and round a product once less before
        it is added, or divide where it else multiplies with the inverse.
        """
        return 2 * self.roundoff.total + self.roundoff.of_input

    def forward(self) -> Iterator[Operation]:
        """Yield r of every vertex."""
        for vertex in self.graph.order:
            if isinstance(vertex.kind, kinds.Source):
                continue
            found = self.bounded(_forward, vertex)
            if found is not None:
                computed = self.run.r[vertex.name]
                yield self.operation(f"r[{vertex.name}]", vertex.name, "forward", computed, found)

    def loss(self) -> Iterator[Operation]:
        """Yield the loss and g of the outputs."""
        output = self.graph.output
        z = self.run.logical("r", output).astype(np.float64)
        return loss_operations(
            (f"g[{output}]", output),
            z.reshape(-1, z.shape[-1]),
            self.data.prediction_targets,
            self.data.prediction_weight,
            loss=self.data.loss.reference,
            computed=(self.run.loss, self.run.g[output]),
            u=max(self.roundoff.total, float(jnp.finfo(self.run.r[output].dtype).eps) / 2),
        )

    def backward(self) -> Iterator[Operation]:
        """Yield g of what each vertex reads and of its parameters, when all of it is there."""
        parts: dict[str, list[tuple[str, Bounded | None]]] = {}
        users = Counter(vertex.share or vertex.name for vertex in self.graph.order)
        for vertex in reversed(self.graph.order):
            if (mine := parts.pop(f"g[{vertex.name}]", None)) is not None:
                yield from self.total(f"g[{vertex.name}]", mine, self.run.g[vertex.name])
            owner = vertex.share or vertex.name
            users[owner] -= 1
            if isinstance(vertex.kind, kinds.Source):
                continue
            for tensor, part in self.back_through(vertex):
                parts.setdefault(tensor, []).append((vertex.name, part))
            if not users[owner]:
                for name, computed in self.run.grads.get(owner, {}).items():
                    tensor = f"d[{owner}.{name}]"
                    yield from self.total(tensor, parts.pop(tensor), computed, has_samples=False)

    def back_through(self, vertex: Vertex) -> Iterator[tuple[str, Bounded | None]]:
        """Yield what a vertex passes back, by tensor; None where its rounding is not known."""
        owner = vertex.share or vertex.name
        floats = [i for i, name in enumerate(vertex.inputs) if name in self.run.g]
        found = self.bounded(_backward, vertex, _wide(self.run.logical("g", vertex.name)))
        by_params, by_inputs = ({}, {}) if found is None else found
        for name in self.data.params.get(owner, {}):
            yield f"d[{owner}.{name}]", by_params.get(name)
        for i in floats:
            yield f"g[{vertex.inputs[i]}]", by_inputs.get(i)

    def bounded(self, run: Callable[..., Any], vertex: Vertex, *args: Any) -> Any:
        """Return what a pass of a vertex gives with its errors; None where they are not known."""
        data = self.data
        params = _wide(data.params.get(vertex.share or vertex.name, {}))
        inputs = [_wide(self.run.logical("r", name)) for name in vertex.inputs]
        static = _alike(vertex), self.roundoff, self.of_inputs
        try:
            return run(*static, params, inputs, data.words, data.share, *args)
        except NotImplementedError as unknown:
            if self.kind != "float32":
                return None
            raise ValueError(
                f'vertex "{vertex.name}" must be made of operations whose rounding is known for '
                f"kind='float32': got {unknown}. Use kind='float64'."
            ) from None

    def total(
        self,
        tensor: str,
        parts: list[tuple[str, Bounded | None]],
        computed: jax.Array,
        *,
        has_samples: bool = True,
    ) -> Iterator[Operation]:
        """Yield the sum of what vertices pass back to one tensor, where all of it is known."""
        known = [part for _, part in parts if part is not None]
        if len(known) < len(parts):
            return
        value = sum(part.value for part in known)
        size = sum(jnp.abs(part.value) for part in known)
        adding = self.roundoff.total * (len(known) - 1)
        found = Bounded(value, sum(part.error for part in known) + adding * size)
        names = '" or "'.join(dict.fromkeys(name for name, _ in parts))
        yield self.operation(tensor, names, "backward", computed, found, has_samples=has_samples)

    def operation(
        self,
        tensor: str,
        vertex: str,
        phase: Phase,
        computed: jax.Array,
        found: Bounded,
        *,
        has_samples: bool = True,
    ) -> Operation:
        exact = np.asarray(found.value)
        return Operation(
            tensor=tensor,
            layer=vertex,
            phase=phase,
            computed=computed,
            exact=exact,
            bound=np.asarray(found.error) + stored(computed, self.roundoff, exact),
            has_samples=has_samples,
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    vertex: Vertex,
    roundoff: Roundoff,
    of_inputs: float,
    params: Any,
    inputs: list[jax.Array],
    words: jax.Array | None,
    share: jax.Array,
) -> Bounded:
    """Return r of a vertex."""
    run, floats = _function_of(vertex, inputs, words, share)
    args = params, floats
    return with_errors(lambda *args: run(*args)[0], args, roundoff, of_inputs=of_inputs)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(
    vertex: Vertex,
    roundoff: Roundoff,
    of_inputs: float,
    params: Any,
    inputs: list[jax.Array],
    words: jax.Array | None,
    share: jax.Array,
    g: jax.Array,
) -> tuple[dict[str, Bounded], dict[int, Bounded]]:
    """Return what a vertex passes back to its parameters, and to its inputs by position."""
    run, floats = _function_of(vertex, inputs, words, share)

    def back(params: Any, floats: Any, g: jax.Array) -> Any:
        _, pull = jax.vjp(run, params, floats)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return pull((g, jnp.ones(())))

    return with_errors(back, (params, floats, g), roundoff, of_inputs=of_inputs)


def _function_of(
    vertex: Vertex, inputs: list[jax.Array], words: jax.Array | None, share: jax.Array
) -> tuple[Callable[..., Any], dict[int, jax.Array]]:
    """Return r of a vertex and what it adds as a function of (params, floats), and the floats.

    These are inputs by position; ids are part of the function.
    """
    floats = {i: a for i, a in enumerate(inputs) if jnp.issubdtype(a.dtype, jnp.floating)}

    def run(params: Any, floats: dict[int, Any]) -> tuple[jax.Array, jax.Array]:
        read = [floats.get(i, a) for i, a in enumerate(inputs)]
        r = plain.compute(vertex, params, read, words)
        return r, plain.activity_of(vertex, read[0], share)

    return run, floats


def _alike(vertex: Vertex) -> Vertex:
    """Return a vertex that is equal for all that compute the same: they share a program."""
    name = vertex.name if isinstance(vertex.kind, kinds.Dropout) else "alike"
    return Vertex(name, vertex.kind, *map(str, range(len(vertex.inputs))))


def _pairs(
    graph: Graph, run: GraphTrace, oracle: _Oracle
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return every tensor of the run beside the reference's, in the order they are computed."""
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    names, grads = _with_gradients(graph), to_numpy(graph, run.grads)
    for name in names:
        pairs[f"r[{name}]"] = run.logical("r", name), np.asarray(oracle.r[name])
    pairs["loss"] = np.asarray(run.loss), np.asarray(oracle.loss)
    for name in reversed(names):
        pairs[f"g[{name}]"] = run.logical("g", name), np.asarray(oracle.g[name])
        for parameter, dw in grads.get(name, {}).items():
            pairs[f"d[{name}.{parameter}]"] = dw, np.asarray(oracle.grads[name][parameter])
    return pairs


def _with_gradients(graph: Structure) -> list[str]:
    """Return the vertices that do not give ids."""
    return [v.name for v in graph.order if graph.shapes[v.name].width is not None]


def _sizes_after_batch(graph: Structure, name: str) -> tuple[int, ...]:
    shape = graph.shapes[name]
    return tuple(n for n in (shape.tokens, shape.width) if n is not None)


def _wide(tree: Any) -> Any:
    """Return floating arrays in float64; ids as they are."""

    def wide(array: np.ndarray) -> np.ndarray:
        is_floating = jnp.issubdtype(array.dtype, jnp.floating)
        return array.astype(np.float64) if is_floating else array

    return jax.tree.map(wide, tree)


def _sizes(tree: Any) -> Any:
    return jax.tree.map(np.abs, _wide(tree))
