"""The trace of a Graph: r_v and g_v of every vertex, still split over the devices.

r_v = F_{W_v}(r of the in-neighbours of v),   g_v = grad_{r_v} of the objective without R
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from tpmlp.batch import Batch
from tpmlp.graph.graph import Params
from tpmlp.graph.network import GraphNetwork
from tpmlp.graph.placement import GraphPlacement
from tpmlp.graph.structure import Structure
from tpmlp.inspection.depth import Block, norms_of, plot_depth
from tpmlp.objective import Objective
from tpmlp.table import text_table

Name = Literal["r", "g"]
NAMES: tuple[Name, ...] = get_args(Name)


@jax.tree_util.register_pytree_node_class
class ByVertex(dict[str, jax.Array]):
    """The arrays of one name by vertex; one that is not there is refused by name.

    Attributes:
        name: what the arrays are.
    """

    def __init__(self, name: Name, arrays: dict[str, jax.Array]) -> None:
        super().__init__(arrays)
        self.name: Name = name

    def __missing__(self, vertex: object) -> jax.Array:
        among = "those that do not give ids" if self.name == "g" else "the graph's"
        raise ValueError(
            f"vertex must be one of {among}, which print(graph) lists: got name={self.name!r}, "
            f"vertex={vertex!r}. Vertices in a Repeat are called repeat.0.vertex."
        )

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], tuple[Name, tuple[str, ...]]]:
        """Return the arrays, and what they are."""
        return tuple(self.values()), (self.name, tuple(self))

    @classmethod
    def tree_unflatten(cls, of: tuple[Name, tuple[str, ...]], arrays: Any) -> "ByVertex":
        """Return what `tree_flatten` took apart."""
        name, vertices = of
        return cls(name, dict(zip(vertices, arrays, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class VertexStatistics:
    """Numbers of one vertex; norms are Frobenius norms over samples, tokens and features.

    Attributes:
        vertex: its name.
        kind: what it computes.
        r_norm: |r_v|; None of ids.
        g_norm: |g_v|; None of ids.
        dW_norm: of the gradient of all its own parameters, R included where it is elementwise;
            None where it has none.
    """

    vertex: str
    kind: str
    r_norm: float | None
    g_norm: float | None
    dW_norm: float | None


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class VertexSummary:
    """Statistics of all vertices, in the order of the forward pass; prints as a table.

    Attributes:
        vertices: one for each vertex.
    """

    vertices: tuple[VertexStatistics, ...]

    def __str__(self) -> str:
        def cell(norm: float | None) -> str:
            return "-" if norm is None else f"{norm:.3g}"

        return text_table(
            ["vertex", "kind", "|r|", "|g|", "|dW|"],
            [
                (v.vertex, v.kind, *map(cell, (v.r_norm, v.g_norm, v.dW_norm)))
                for v in self.vertices
            ],
        )

    __repr__ = __str__


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GraphTrace:
    """The arrays of one step of a Graph, by vertex.

    Arrays are padded, samples first: [B, width] or [B, T, width], the samples split over data and
    the features over both tensor axes, so that a device holds d/M of each; ids are [B, T].

    Attributes:
        r: what each vertex gives.
        g: the gradient by r_v of the data loss and of what later vertices add to it; not of ids.
        grads: {vertex: {parameter: gradient}}, R included where it is elementwise.
        loss: the data loss, a scalar.
        graph: the model.
        num_samples: logical number of samples.
    """

    r: ByVertex
    g: ByVertex
    grads: Params
    loss: jax.Array
    graph: Structure
    num_samples: int

    def __repr__(self) -> str:
        return (
            f"<trace of {self.num_samples} samples, {len(self.r)} vertices, loss {self.loss:.4g}>"
        )

    def logical(self, name: Name, vertex: str) -> np.ndarray:
        """Return an array without its padding, on the host.

        Args:
            name: "r" or "g".
            vertex: the vertex's name.

        Returns:
            [B, width] or [B, T, width]; ids [B, T].

        Raises:
            ValueError: no such array.
        """
        if name not in NAMES:
            raise ValueError(
                f"name must be one of {NAMES}: got name={name!r}, vertex={vertex!r}. Gradients by "
                "the parameters are in trace.grads."
            )
        array = np.asarray(getattr(self, name)[vertex])[: self.num_samples]
        width = self.graph.shapes[vertex].width
        return array if width is None else array[..., :width]

    def summary(self) -> VertexSummary:
        """Return each vertex's norms; computed where the arrays are, prints as a table.

        Examples:
            >>> import jax, numpy as np, tpmlp
            >>> from tpmlp.graph import Dense, Input, Sum, Vertex
            >>> z, out = Vertex("z", Dense(2), "x"), Vertex("out", Sum(), "x", "z")
            >>> graph = tpmlp.Graph([Vertex("x", Input(2)), z, out])
            >>> mesh, ones = tpmlp.make_mesh(x=2), np.ones((2, 2), np.float32)
            >>> params = tpmlp.from_numpy(graph, {"z": {"W": ones, "b": ones[0]}}, mesh)
            >>> print(tpmlp.trace(graph, params, np.eye(2), loss="output", mesh=mesh).summary())
            vertex  kind       |r|  |g|  |dW|
            x       Input     1.41    6     -
            z       Dense(2)     4    2  3.46
            out     Sum        5.1    2     -
        """
        blocks = {name: {v: self._block(name, v) for v in self._features(name)} for name in NAMES}
        found = jax.device_get({**norms_of(blocks), "dW": _norms_of_weights(self.grads)})

        def of(quantity: str, name: str) -> float | None:
            return float(found[quantity][name]) if name in found[quantity] else None

        return VertexSummary(
            vertices=tuple(
                VertexStatistics(
                    vertex=v.name,
                    kind=v.kind.label,
                    r_norm=of("r", v.name),
                    g_norm=of("g", v.name),
                    dW_norm=of("dW", v.name),
                )
                for v in self.graph.order
            )
        )

    def plot(self) -> Any:
        """Return a matplotlib Figure: how large r_v and g_v are, a column for each vertex.

        Raises:
            ModuleNotFoundError: matplotlib is missing.
        """
        names = self._features("g")
        blocks: dict[str, Sequence[Block]] = {
            f"${name}_v$": [self._block(name, v) for v in names] for name in NAMES
        }
        return plot_depth(blocks, columns=names)

    def _features(self, name: Name) -> list[str]:
        shapes = self.graph.shapes
        return [v for v in getattr(self, name) if shapes[v].width is not None]

    def _block(self, name: Name, vertex: str) -> Block:
        return Block(
            getattr(self, name)[vertex], self.num_samples, self.graph.shapes[vertex].features
        )


class _Rows(NamedTuple):
    """What leaves the kernel, samples first; or the PartitionSpecs of it."""

    r: dict[str, Any]
    g: dict[str, Any]
    grads: Any
    loss: Any


def trace_graph(
    objective: Objective, params: Params, batch: Batch, words: jax.Array | None, num_samples: int
) -> GraphTrace:
    """Run one forward and backward pass of a graph and return what every vertex held.

    Args:
        objective: with a Graph for a model.
        params: placed.
        batch: placed.
        words: two words of random bits, for what is dropped; None drops nothing.
        num_samples: logical number of samples.
    """
    rows = _traced(objective)(params, batch, words=words)
    names = [vertex.name for vertex in objective.model.order]
    return GraphTrace(
        r=ByVertex("r", {name: rows.r[name] for name in names}),
        g=ByVertex("g", {name: rows.g[name] for name in names if name in rows.g}),
        grads=rows.grads,
        loss=rows.loss,
        graph=objective.model,
        num_samples=num_samples,
    )


@lru_cache(maxsize=16)
def _traced(objective: Objective) -> Any:
    placement: GraphPlacement = objective.placement
    names = [vertex.name for vertex in placement.graph.order]
    with_gradient = [name for name in names if placement.nodes[name].shape.width is not None]

    def body(network: GraphNetwork, params: Any, *samples: Any) -> _Rows:
        result = objective.run(network, params, *samples)
        r, g = result.arrays
        return _Rows(
            r={name: _samples_first(r[name], name, placement) for name in names},
            g={name: _samples_first(g[name], name, placement) for name in with_gradient},
            grads=result.grads,
            loss=result.value.loss,
        )

    specs = {name: placement.sharding(_layout(name, placement), name).spec for name in names}
    g_specs = {name: specs[name] for name in with_gradient}
    no_spec = jax.sharding.PartitionSpec()
    out_specs = _Rows(specs, g_specs, objective.param_specs, no_spec)
    return jax.jit(objective.map(body, out_specs))


def _layout(name: str, placement: GraphPlacement) -> str:
    """Return the layout of r of a vertex, samples first."""
    shape = placement.nodes[name].shape
    tokens = "" if shape.tokens is None else " T"
    if shape.width is None:
        return f"B/d{tokens}"
    features, _ = placement.result_layout(name).split()
    return f"B/d{tokens} {features}"


def _samples_first(array: jax.Array, name: str, placement: GraphPlacement) -> jax.Array:
    """Return r or g of a vertex, "F/s/g B/d" of its tokens or ids "B/d", with samples first."""
    shape = placement.nodes[name].shape
    tokens = () if shape.tokens is None else (shape.tokens,)
    features = () if shape.width is None else (array.shape[0],)
    return array.T.reshape(-1, *tokens, *features)


@jax.jit
def _norms_of_weights(grads: Params) -> dict[str, jax.Array]:
    """Return the norm of all gradients of each vertex together; padding is 0."""
    return {
        owner: jnp.linalg.norm(jnp.stack([jnp.linalg.norm(dw) for dw in mine.values()]))
        for owner, mine in grads.items()
    }
