"""The model: a graph of vertices, and its parameters as plain pytrees.

    r_v = F_{W_v}(r of the in-neighbours of v),   h(W, x) = r of the output vertex

Parameters are a dictionary {vertex: {parameter: array}}: JAX arrays split over the mesh and padded
with zeros to widths that the mesh divides (tpmlp.parameters). On a mesh with stages the blocks of a
Repeat are stacked, those of all stages in one array (tpmlp.graph.pipeline.staged).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tpmlp.checks import check_count, check_dtype, check_key
from tpmlp.graph.draw import draw_graph
from tpmlp.graph.kinds import Activation
from tpmlp.graph.network import GraphNetwork
from tpmlp.graph.pipeline.cut import cut_graph
from tpmlp.graph.pipeline.network import GraphPipeline
from tpmlp.graph.pipeline.placement import GraphOnStages, place_graph_stages
from tpmlp.graph.pipeline.staged import StagedGraph, staged_graph_specs, to_blocks
from tpmlp.graph.pipeline.summary import summarize_graph_pipeline
from tpmlp.graph.placement import place_graph
from tpmlp.graph.shape import Parameter, seed_of
from tpmlp.graph.structure import Structure
from tpmlp.graph.summary import summarize_graph
from tpmlp.losses import get_loss
from tpmlp.mesh import check_mesh
from tpmlp.model import HE
from tpmlp.placement import ParameterSpec
from tpmlp.regularizers import ElementwisePenalty, get_regularizer
from tpmlp.strategy import Strategy

Params = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Graph(Structure):
    """A model of vertices with one output; it holds no arrays.

    Args:
        vertices: Vertex and Repeat, in any order.
        output: name of the output vertex; by default the one that no other reads.

    Raises:
        ValueError: a name that is doubled or missing, a cycle, a vertex that the output does not
            need, several outputs, or inputs that do not fit; with the names of the vertices.

    Examples:
        >>> from tpmlp.graph import Activation, Dense, Input, Sum, Vertex
        >>> graph = Graph([
        ...     Vertex("x", Input(8)),
        ...     Vertex("up", Dense(32), "x"),
        ...     Vertex("hidden", Activation("gelu"), "up"),
        ...     Vertex("down", Dense(8), "hidden"),
        ...     Vertex("out", Sum(), "x", "down"),
        ... ])
        >>> print(graph)
        vertex  kind       inputs   output   parameters
        x       Input               [B, 8]            0
        up      Dense(32)  x        [B, 32]         288
        hidden  gelu       up       [B, 32]           0
        down    Dense(8)   hidden   [B, 8]          264
        out     Sum        x, down  [B, 8]            0
    """

    @property
    def largest_sample(self) -> int:
        """The most numbers that one sample has at any vertex."""
        return max((s.width or 1) * s.positions for s in self.shapes.values())

    @property
    def parameters(self) -> dict[str, dict[str, ParameterSpec]]:
        """What each array is, in the structure of the parameters."""
        return {
            owner: {
                name: ParameterSpec(
                    f"{owner}.{name}", array.shape, tuple(dim != "whole" for dim in array.dims)
                )
                for name, array in arrays.items()
            }
            for owner, arrays in self.arrays.items()
        }

    def specs(self, of: Any) -> Any:
        """Return what each array is, in the structure that parameters have on their mesh.

        Args:
            of: parameters, or where they are.
        """
        if isinstance(of, StagedGraph | GraphOnStages):
            return staged_graph_specs(self, cut_graph(self), self.parameters, of.stages)
        return self.parameters

    def place(self, mesh: Mesh, strategy: Strategy | None = None) -> Any:
        """Return where the vertices live on a mesh under a strategy."""
        check_mesh(mesh)
        place = place_graph_stages if mesh.shape["stage"] > 1 else place_graph
        return place(self, mesh, strategy)

    def network(self, placement: Any) -> Any:
        """Return what the engine runs."""
        of_stages = isinstance(placement, GraphOnStages)
        return GraphPipeline(placement) if of_stages else GraphNetwork(placement)

    def shardings(self, placement: Any) -> Any:
        """Return the sharding of every parameter, in their structure."""
        if isinstance(placement, GraphOnStages):
            return placement.shardings
        return {
            owner: {
                name: placement.sharding(placement.layout(owner, name), owner) for name in arrays
            }
            for owner, arrays in self.arrays.items()
        }

    def staged(self, arrays: Any, placement: Any) -> Any:
        """Return {vertex: {parameter: array}} in the structure that parameters have on a mesh."""
        return placement.staged(arrays) if isinstance(placement, GraphOnStages) else arrays

    def unstaged(self, params: Any) -> Any:
        """Return parameters in any such structure as {vertex: {parameter: array}}."""
        is_staged = isinstance(params, StagedGraph)
        return to_blocks(self, cut_graph(self), params) if is_staged else params

    def structured(self, params: Any) -> Any:
        """Return parameters as dictionaries, or refuse what is not one array for each.

        Raises:
            ValueError: vertices or parameters that are missing or too many.
        """
        if isinstance(params, StagedGraph):
            return self._check_staged(params)
        wanted = {owner: set(arrays) for owner, arrays in self.arrays.items()}
        is_nested = isinstance(params, Mapping) and all(
            isinstance(mine, Mapping) for mine in params.values()
        )
        got = {owner: set(mine) for owner, mine in params.items()} if is_nested else None
        if got != wanted:
            way_out = "They belong to another model; make them with graph.init or tpmlp.from_numpy."
            if got is None:
                raise ValueError(
                    "params must be a dictionary {vertex: {parameter: array}}: got "
                    f"{type(params).__name__}. {way_out}"
                )
            wrong = next(n for n in [*wanted, *got] if wanted.get(n) != got.get(n))
            raise ValueError(
                f'params of vertex "{wrong}" must be {sorted(wanted.get(wrong, ()))}: got '
                f"{sorted(got.get(wrong, ()))}. {way_out}"
            )
        return {owner: dict(params[owner]) for owner in wanted}

    def _check_staged(self, params: StagedGraph) -> StagedGraph:
        """Return parameters of a pipeline, or refuse those of another model."""
        stages, times = params.stages, cut_graph(self).repeat.times
        same = jax.tree.structure(self.specs(params)) == jax.tree.structure(params)
        if stages.num_blocks != times or not same:
            raise ValueError(
                f"params must be those of {times} blocks and what is around them, as the model "
                f"has: got {stages.num_blocks} blocks, on {stages.route.num_stages} stages, with "
                f"{', '.join(params.slots[0]) or 'nothing'} in each. They belong to another model."
            )
        return params

    def init(
        self, key: jax.Array, mesh: Mesh, *, strategy: Strategy | None = None, dtype: Any = None
    ) -> Params:
        """Draw parameters; the same numbers, bit for bit, on every mesh.

        Matrices are uniform as those of tpmlp.MLP: after He where every reader of the vertex is
        relu, gelu, silu or softplus, after Glorot elsewhere. Tables of embeddings and positions
        are uniform with deviation 0.02; scales are 1, shifts and biases 0.

        Args:
            key: from jax.random.key.
            mesh: the mesh.
            strategy: Strategy() by default.
            dtype: float32 by default.

        Returns:
            {vertex: {parameter: array}}, placed for this mesh and strategy; a StagedGraph where it
            has stages.

        Raises:
            ValueError: key is no key, or the mesh cannot have the strategy.
        """
        check_key(key)
        dtype = jnp.dtype(check_dtype("dtype", jnp.float32 if dtype is None else dtype))
        return _drawing(self, self.place(mesh, strategy), dtype)(key)

    def summary(
        self,
        mesh: Mesh,
        *,
        batch_size: int,
        strategy: Strategy | None = None,
        loss: Any = None,
        regularizer: Any = None,
        dtype: Any = None,
    ) -> Any:
        """Return what one device holds of every vertex, and what it receives in a step.

        Args:
            mesh: the mesh.
            batch_size: samples of one step.
            strategy: Strategy() by default.
            loss: the loss, whose own collectives and arrays are counted when it is given.
            regularizer: R, whose own collective is counted when it is given.
            dtype: float32 by default.

        Returns:
            A GraphSummary, on a mesh with stages a PipelineSummary; print it.
        """
        penalty, placement = get_regularizer(regularizer), self.place(mesh, strategy)
        batch_size = check_count("batch_size", batch_size, "Give the samples of one step.")
        dtype = check_dtype("dtype", jnp.float32 if dtype is None else dtype)
        if isinstance(placement, GraphOnStages):
            specs = self.specs(placement)
            return summarize_graph_pipeline(placement, specs, batch_size=batch_size, dtype=dtype)
        return summarize_graph(
            placement,
            batch_size=batch_size,
            dtype=dtype,
            loss=None if loss is None else get_loss(loss),
            penalty=penalty if isinstance(penalty, ElementwisePenalty) else None,
        )

    def plot(self) -> Any:
        """Return a matplotlib Figure of the vertices, inputs on the left, output on the right.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return draw_graph(self)

    def is_rectified(self, name: str) -> bool:
        """Return whether all that read a vertex are activations that vanish on half of the line."""
        kinds = [vertex.kind for vertex in self.readers(name)]
        return bool(kinds) and all(
            isinstance(kind, Activation) and kind.sigma.name in HE for kind in kinds
        )


@lru_cache(maxsize=16)
def _drawing(graph: Graph, placement: Any, dtype: Any) -> Callable[[jax.Array], Params]:
    def draw(key: jax.Array) -> Params:
        arrays = {
            owner: {
                name: _draw(
                    jax.random.fold_in(key, seed_of(f"{owner}.{name}")),
                    array,
                    graph.is_rectified(owner),
                    graph.parameters[owner][name].padded(placement.num_blocks),
                    dtype,
                )
                for name, array in arrays.items()
            }
            for owner, arrays in graph.arrays.items()
        }
        return graph.staged(arrays, placement)

    return jax.jit(draw, out_shardings=graph.shardings(placement))


def _draw(
    key: jax.Array, array: Parameter, he: bool, whole: tuple[int, ...], dtype: Any
) -> jax.Array:
    if isinstance(array.start, float):
        drawn = jnp.full(array.shape, array.start, dtype)
    else:
        d_out, d_in = array.shape
        glorot = (6 / d_in if he else 6 / (d_in + d_out)) ** 0.5
        limit = glorot if array.start == "glorot" else 0.02 * 3**0.5
        # Exact operations and one product, as in tpmlp.model.
        drawn = (2 * jax.random.uniform(key, array.shape, dtype) - 1) * limit
    return jnp.pad(drawn, [(0, n - m) for m, n in zip(array.shape, whole, strict=True)])
