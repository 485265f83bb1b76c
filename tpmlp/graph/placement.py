"""A graph on a mesh: the program of operations that it becomes.

The features of every r_v are split over both tensor axes. On a mesh where both are larger than 1
they are split in one of two orders, the *orientation* of r_v: over y and each piece over x, or the
other way round. A dense vertex gives the orientation that it does not read; most others give the
one they read, and read all inputs in one. Where an input comes in the other one, the program has a
`Turn`; where dense vertices gather what they read, one `Gather` for all of them; and where vertices
look at all features, one `Whole`. These are operations like those of vertices, with a backward pass
of their own.

On a mesh with one tensor axis there is one orientation, and every dense vertex is free to gather
over the axis or to scatter over it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jax.sharding import Mesh, NamedSharding

from tpmlp.graph.kinds import Attention, Concatenate, Dense, Embedding, Function, Slice, Source
from tpmlp.graph.shape import Parameter, Shape
from tpmlp.graph.structure import Structure
from tpmlp.graph.vertex import Vertex
from tpmlp.layout import padded, partition_spec
from tpmlp.placement import (
    OTHER,
    OnMesh,
    OutputSpec,
    SampleSpec,
    check_strategy,
    tensor_axes,
)
from tpmlp.strategy import Strategy

Orientation = tuple[str, str]  # (major, minor): mesh axes that split the features


class Gather:
    """What dense vertices read, made whole over the axis that they gather over."""

    label = "gather"


class Turn:
    """An array in the other orientation."""

    label = "turn"


class Whole:
    """All features of what vertices read that look at all of them."""

    label = "whole"


GATHER, TURN, WHOLE = Gather(), Turn(), Whole()


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One operation of a program: a vertex's, or a change of layout.

    Attributes:
        name: the vertex's; of a change of layout, of the array and the change.
        kind: the vertex's, GATHER or TURN.
        inputs: names of the nodes that it reads.
        owner: the vertex whose parameters it uses.
        axes: mesh axis of the roles g, s and d. What it reads is "F/s/g B/d"; what a dense vertex
            gives is "F/g/s B/d".
        input_shapes: logical shapes of what it reads.
        shape: logical shape of what it gives.
        num_blocks: what padded widths are multiples of.
        num_tensor_devices: M, over which features are split.
        segment: what is computed again together, under keep="recompute"; None is kept.
    """

    name: str
    kind: Any  # a Kind, GATHER or TURN: rules know which one they are for
    inputs: tuple[str, ...]
    owner: str
    axes: Mapping[str, str]
    input_shapes: tuple[Shape, ...]
    shape: Shape
    num_blocks: int
    num_tensor_devices: int
    segment: tuple[str, int] | None

    @property
    def width(self) -> int:
        """Logical width of what it gives."""
        return self.shape.features

    @property
    def padded_width(self) -> int:
        """Width of what it gives, padded."""
        return padded(self.width, self.num_blocks)


@dataclass(frozen=True, kw_only=True)
class GraphPlacement(OnMesh):
    """A graph on a mesh under a strategy.

    Attributes:
        graph: the graph.
        words: "column" or "row" for each vertex with a matrix.
        start: the orientation of the inputs.
        bound: (owner, mesh axes of its roles g and s) of parameters that lie as others say.
    """

    graph: Structure
    words: tuple[tuple[str, str], ...]
    start: Orientation
    bound: tuple[tuple[str, tuple[str, str]], ...] = ()

    @cached_property
    def program(self) -> tuple[Node, ...]:
        """The operations, in the order of the forward pass."""
        return tuple(_Lowering(self).nodes.values())

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """The operations by name."""
        return {node.name: node for node in self.program}

    @property
    def output(self) -> Node:
        """The node of the output vertex."""
        return self.nodes[self.graph.output]

    def oriented(self, name: str) -> Orientation:
        """Return the orientation of what a node gives."""
        axes, flips = self.nodes[name].axes, self.result_layout(name).startswith("F/g/s")
        return (axes["g"], axes["s"]) if flips else (axes["s"], axes["g"])

    @cached_property
    def roles(self) -> dict[str, str]:
        """The words by vertex."""
        return dict(self.words)

    @cached_property
    def head_axes(self) -> dict[str, str]:
        """Mesh axis of the roles of the outputs, "C/g/s B/d" as a dense vertex gives them."""
        axes = dict(self.output.axes)
        if isinstance(self.output.kind, Dense):
            return axes
        return {"g": axes["s"], "s": axes["g"], "d": axes["d"]}

    @cached_property
    def samples(self) -> Any:
        """What the sources are: a SampleSpec, or {source: SampleSpec} where there are several."""
        specs = {vertex.name: self._sample_spec(vertex) for vertex in self.graph.sources}
        return specs if len(specs) > 1 else next(iter(specs.values()))

    def named_inputs(self, x: Any) -> dict[str, Any]:
        """Return what is given for each source, by name."""
        names = [vertex.name for vertex in self.graph.sources]
        return dict(x) if len(names) > 1 else {names[0]: x}

    @cached_property
    def outputs(self) -> OutputSpec:
        """What the output vertex gives."""
        output = self.output
        tokens = output.shape.tokens
        layout = "B/d C/g/s" if tokens is None else "B/d T C/g/s"
        values = NamedSharding(self.mesh, partition_spec(layout, self.mesh, self.head_axes))
        return OutputSpec(
            width=output.width,
            padded_width=output.padded_width,
            tokens=tokens,
            values=values,
            samples=self.sharding("B/d", output.name),
        )

    def _sample_spec(self, vertex: Vertex) -> SampleSpec:
        shape = self.graph.shapes[vertex.name]
        name = "x" if len(self.graph.sources) == 1 else f'x["{vertex.name}"]'
        tokens = () if shape.tokens is None else (shape.tokens,)
        features = () if shape.width is None else (shape.width,)
        layout = " ".join(["B/d", *("T" for _ in tokens), *("F/s/g" for _ in features)])
        return SampleSpec(
            name,
            (*tokens, *features),
            (*tokens, *(padded(width, self.num_blocks) for width in features)),
            shape.vocabulary,
            self.sharding("B/d" if shape.width is None else layout, vertex.name),
        )

    def layout(self, owner: str, name: str, *, held: bool = True) -> str:
        """Return the layout of a parameter: as it is held, or as its vertex uses it."""
        parameter = self.graph.arrays[owner][name]
        features = "F/g/s" if isinstance(self.nodes[owner].kind, Dense) else "F/s/g"
        written = {"outputs": "O/g", "inputs": "I/s", "features": features, "whole": "T"}
        first, *others = (written[dim] for dim in parameter.dims)
        return " ".join([f"{first}/d" if held and self.splits_data else first, *others])

    def padded_shape(self, array: Parameter) -> tuple[int, ...]:
        """Return the shape that a parameter has on the mesh."""
        return tuple(
            size if dim == "whole" else padded(size, self.num_blocks)
            for dim, size in zip(array.dims, array.shape, strict=True)
        )

    def result_layout(self, name: str) -> str:
        """Return the layout of what a node gives, inside the kernel."""
        kind = self.nodes[name].kind
        if kind in (GATHER, WHOLE):
            return "F/s B/d" if kind is GATHER else "F B/d"
        return "F/g/s B/d" if kind is TURN or isinstance(kind, Dense) else "F/s/g B/d"

    def sharding(self, layout: str, node: str) -> NamedSharding:
        """Return the NamedSharding of a layout under the roles of a node."""
        return NamedSharding(self.mesh, partition_spec(layout, self.mesh, self.nodes[node].axes))


def place_graph(graph: Structure, mesh: Mesh, strategy: Strategy | None = None) -> GraphPlacement:
    """Return where a graph lives on a mesh under a strategy.

    Raises:
        ValueError: a strategy that graphs cannot have, or that the mesh cannot; heads that the
            mesh does not divide.
    """
    return place_part(graph, mesh, check_graph_strategy(strategy, mesh))


def check_graph_strategy(strategy: Strategy | None, mesh: Mesh) -> Strategy:
    """Return the strategy, Strategy() for None, or refuse what graphs cannot have on the mesh."""
    strategy = check_strategy(strategy, mesh)
    for name, needed in (("overlap", "none"), ("reduction", "fast")):
        if (value := getattr(strategy, name)) != needed:
            raise ValueError(
                f"{name} must be {needed!r} for a Graph: got {name}={value!r}. Only an MLP can "
                f"have another; leave {name} out."
            )
    return strategy


@lru_cache(maxsize=64)
def place_part(
    graph: Structure, mesh: Mesh, strategy: Strategy, *, reads_message: bool = False
) -> GraphPlacement:
    """Return where a graph lives that is all that a device runs, or a part of it.

    Args:
        graph: the graph.
        mesh: the mesh; stages of it only pad.
        strategy: checked.
        reads_message: whether its source is another part's output, whose gradient is wanted.
    """
    main, other = tensor_axes(mesh)
    _check_heads(graph, mesh)
    free = mesh.shape[other] == 1
    words = _words(graph, strategy, reads_message)
    # One axis: what a "column" reads is split "over other, then main", and other is of size 1.
    start = (other, main)
    if not free and strategy.layout != "auto" and words:
        start = (other, main) if words[0][1] == "column" else (main, other)
    placed = GraphPlacement(graph=graph, mesh=mesh, strategy=strategy, words=words, start=start)
    _check_head_padding(placed)
    return placed


def _check_head_padding(placement: GraphPlacement) -> None:
    """Refuse padding behind the heads, which would move all of them but the first."""
    graph, blocks = placement.graph, placement.num_blocks
    for vertex in graph.order:
        if not isinstance(vertex.kind, Attention):
            continue
        splits_kv = vertex.kind.splits_kv(placement.sizes["x"] * placement.sizes["y"])
        for name in vertex.inputs if splits_kv else vertex.inputs[:1]:
            if (width := graph.shapes[name].features) % blocks:
                sizes = ", ".join(f"{axis}={size}" for axis, size in placement.sizes.items())
                raise ValueError(
                    f'vertex "{vertex.name}" must read heads of a width that the {blocks} blocks '
                    f'of parameters divide: got width={width} of "{name}", {sizes}. Use a multiple '
                    f"of {blocks}, or fewer devices on stage, or on data with shard_weights."
                )


def _check_heads(graph: Structure, mesh: Mesh) -> None:
    num_devices = mesh.shape["x"] * mesh.shape["y"]
    for vertex in graph.order:
        kind = vertex.kind
        if isinstance(kind, Attention) and kind.num_heads % num_devices:
            raise ValueError(
                f'vertex "{vertex.name}" must have heads that x * y divides, as each device '
                f"computes whole ones: got num_heads={kind.num_heads}, x={mesh.shape['x']}, "
                f"y={mesh.shape['y']}. Use a multiple of {num_devices} heads, or fewer devices on "
                "x and y and more on data."
            )


def matrices(graph: Structure) -> list[Vertex]:
    """Return the vertices that have a matrix of their own, in order."""
    return [
        vertex
        for vertex in graph.order
        if isinstance(vertex.kind, Dense | Embedding) and vertex.share is None
    ]


def _words(
    graph: Structure, strategy: Strategy, reads_message: bool
) -> tuple[tuple[str, str], ...]:
    names = [vertex.name for vertex in matrices(graph)]
    layout = strategy.layout
    if isinstance(layout, tuple):
        if len(layout) != len(names):
            raise ValueError(
                f"layout must have one word for each vertex with a matrix: got {len(layout)} "
                f"words {layout} for {', '.join(names)}. Use 'auto' or {len(names)} words."
            )
        return tuple(zip(names, layout, strict=True))
    if layout in OTHER:
        return tuple((name, layout) for name in names)
    if layout == "alternate":
        return tuple((name, ("column", "row")[i % 2]) for i, name in enumerate(names))
    return tuple((name, _fewest_words(graph, name, reads_message)) for name in names)


def _fewest_words(graph: Structure, owner: str, reads_message: bool) -> str:
    """Choose the word that moves fewer words over one axis; column where it makes no difference.

    As in tpmlp.kernels.cost.layer_words; what several dense vertices read is gathered once for all.
    """
    column = row = 0.0
    for vertex in graph.order:
        if owner not in (vertex.name, vertex.share):
            continue
        source, made = graph.shapes[vertex.inputs[0]], graph.shapes[vertex.name]
        if isinstance(vertex.kind, Embedding):
            # The vocabulary is gathered over: a sum over it forward, a gather backward.
            wanted = vertex.kind.split
            column += 2 * made.features * made.positions
            row += 0 if wanted != "vocabulary" else float("inf")
            column += 0 if wanted != "features" else float("inf")
            continue
        sharing = sum(isinstance(v.kind, Dense) for v in graph.readers(vertex.inputs[0]))
        first = isinstance(graph[vertex.inputs[0]].kind, Source) and not reads_message
        column += (2 if first else 3) * source.features * made.positions / sharing
        row += 2 * made.features * made.positions
    return "column" if column <= row else "row"


def _read_whole(vertex: Vertex, num_devices: int) -> tuple[int, ...]:
    """Return which inputs a vertex needs all features of."""
    kind = vertex.kind
    if isinstance(kind, Attention):
        return () if kind.splits_kv(num_devices) else (1, 2)
    if isinstance(kind, Concatenate | Slice) or (
        isinstance(kind, Function) and kind.of == "gathered"
    ):
        return tuple(range(len(vertex.inputs)))
    return ()


class _Lowering:
    """Makes the nodes of a placement."""

    def __init__(self, placement: GraphPlacement) -> None:
        self.placement, self.graph = placement, placement.graph
        main, other = tensor_axes(placement.mesh)
        self.free = placement.sizes[other] == 1
        self.num_tensor_devices = placement.sizes["x"] * placement.sizes["y"]
        self.bind = {
            "column": {"g": main, "s": other, "d": "data"},
            "row": {"g": other, "s": main, "d": "data"},
        }
        self.nodes: dict[str, Node] = {}
        self.oriented: dict[str, Orientation] = {}
        self.owned = {owner: {"g": g, "s": s, "d": "data"} for owner, (g, s) in placement.bound}
        for vertex in self.graph.order:
            self.lower(vertex)

    def lower(self, vertex: Vertex) -> None:
        """Add the node of a vertex, after the changes of layout that it needs."""
        owner = vertex.share or vertex.name
        axes = self.axes(vertex, owner)
        wanted = (axes["s"], axes["g"])
        inputs = [self.turned(name, wanted, vertex) for name in vertex.inputs]
        if isinstance(vertex.kind, Dense):
            inputs = [self.gathered(name, axes, vertex) for name in inputs]
        for i in _read_whole(vertex, self.num_tensor_devices):
            inputs[i] = self.whole(inputs[i], axes, vertex)
        self.add(vertex.name, vertex.kind, inputs, owner, axes, vertex)
        flips = isinstance(vertex.kind, Dense) and not self.free
        self.oriented[vertex.name] = (axes["g"], axes["s"]) if flips else wanted
        self.owned.setdefault(owner, axes)

    def axes(self, vertex: Vertex, owner: str) -> dict[str, str]:
        """Return the roles of a vertex: what it reads is split over s, then over g."""
        if owner in self.owned:
            return self.owned[owner]
        has_matrix = isinstance(vertex.kind, Dense | Embedding)
        fixed = self.free or self.placement.strategy.layout != "auto"
        if has_matrix and fixed:
            return self.bind[self.placement.roles[owner]]
        major, minor = self.orientation(vertex)
        return {"g": minor, "s": major, "d": "data"}

    def orientation(self, vertex: Vertex) -> Orientation:
        """Return the orientation in which most of the inputs are, by features."""
        weights: dict[Orientation, int] = {}
        for name in vertex.inputs:
            if (shape := self.graph.shapes[name]).width is not None:
                at = self.oriented[name]
                weights[at] = weights.get(at, 0) + shape.width
        return max(weights, key=lambda at: weights[at], default=self.placement.start)

    def turned(self, name: str, wanted: Orientation, vertex: Vertex) -> str:
        """Return the node with an array in an orientation."""
        shape = self.graph.shapes[name]
        if self.free or shape.width is None or self.oriented[name] == wanted:
            return name
        major, minor = self.oriented[name]
        axes = {"s": major, "g": minor, "d": "data"}
        return self.change(f"{name} turned", TURN, name, axes, shape, vertex)

    def gathered(self, name: str, axes: dict[str, str], vertex: Vertex) -> str:
        """Return the node with an array gathered over g; it is whole where s splits nothing."""
        if self.placement.sizes[axes["g"]] == 1:
            return name
        if self.placement.sizes[axes["s"]] == 1:
            return self.whole(name, axes, vertex)
        shape = self.nodes[name].shape
        return self.change(f"{name} gathered", GATHER, name, axes, shape, vertex)

    def whole(self, name: str, axes: dict[str, str], vertex: Vertex) -> str:
        """Return the node with all features of an array."""
        if self.num_tensor_devices == 1:
            return name
        return self.change(f"{name} whole", WHOLE, name, axes, self.nodes[name].shape, vertex)

    def change(
        self,
        changed: str,
        kind: Gather | Turn | Whole,
        name: str,
        axes: dict[str, str],
        shape: Shape,
        reader: Vertex,
    ) -> str:
        if changed not in self.nodes:
            self.add(changed, kind, [name], changed, axes, reader, shape)
        return changed

    def add(
        self,
        name: str,
        kind: Any,
        inputs: list[str],
        owner: str,
        axes: dict[str, str],
        vertex: Vertex,
        shape: Shape | None = None,
    ) -> None:
        self.nodes[name] = Node(
            name=name,
            kind=kind,
            inputs=tuple(inputs),
            owner=owner,
            axes=axes,
            input_shapes=tuple(self.nodes[i].shape for i in inputs),
            shape=self.graph.shapes[vertex.name] if shape is None else shape,
            num_blocks=self.placement.num_blocks,
            num_tensor_devices=self.num_tensor_devices,
            segment=self.segment(vertex.name),
        )

    def segment(self, name: str) -> tuple[str, int] | None:
        strategy = self.placement.strategy
        if strategy.keep != "recompute" or name not in self.graph.blocks:
            return None
        repeat, number = self.graph.blocks[name]
        times = 1 + max(i for of, i in self.graph.blocks.values() if of == repeat)
        period = strategy.keep_every or max(1, round(times**0.5))
        return repeat, number // period
