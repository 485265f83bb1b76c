"""The structure of a graph: vertices by name, checked and put in order.

r_v = F_{W_v}(r of the in-neighbours of v),   G a loss of the output vertex
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

from tpmlp.checks import check_count
from tpmlp.graph.kinds import Dropout, Input, Source
from tpmlp.graph.shape import Parameter, Shape
from tpmlp.graph.vertex import Vertex
from tpmlp.table import text_table


@dataclass(frozen=True, slots=True)
class Structure:
    """A directed acyclic graph of vertices with one output; it holds no arrays.

    Attributes:
        vertices: in any order; a Repeat stands for the vertices of its blocks.
        output: name of the output vertex; by default the one that no other reads.
        order: all vertices, in-neighbours first.
        shapes: logical shape of every vertex's output.
        arrays: every vertex's own parameters, {vertex: {parameter: Parameter}}.
        blocks: for each vertex of a Repeat (its name, the number of its block).

    Raises:
        ValueError: a name that is doubled or missing, a cycle, a vertex that the output does not
            need, several outputs, or inputs that do not fit; with the names of the vertices.
    """

    vertices: tuple["Vertex | Repeat", ...]
    output: str = ""
    order: tuple[Vertex, ...] = field(init=False, repr=False, compare=False)
    shapes: Mapping[str, Shape] = field(init=False, repr=False, compare=False)
    arrays: Mapping[str, Mapping[str, Parameter]] = field(init=False, repr=False, compare=False)
    blocks: Mapping[str, tuple[str, int]] = field(init=False, repr=False, compare=False)

    def __init__(self, vertices: Sequence["Vertex | Repeat"], output: str | None = None) -> None:
        if not isinstance(vertices, Iterable):
            raise ValueError(f"vertices must be a list of Vertex and Repeat: got {vertices!r}.")
        vertices = tuple(vertices)
        flat, blocks = _flattened(vertices)
        _check_names(flat)
        order = _ordered(flat)
        derived = {
            "vertices": vertices,
            "output": _find_output(order, _ends(vertices).get(output or "", output)),
            "order": order,
            "shapes": MappingProxyType(_infer_shapes(order, _given_to_repeats(vertices))),
            "blocks": MappingProxyType(blocks),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "arrays", MappingProxyType(self._own_parameters()))

    def __str__(self) -> str:
        rows = [
            (
                vertex.name,
                vertex.kind.label,
                ", ".join(vertex.inputs),
                self.shapes[vertex.name],
                f"those of {vertex.share}" if vertex.share else self.count_parameters(vertex.name),
            )
            for vertex in self.order
        ]
        return text_table(["vertex", "kind", "inputs", "output", "parameters"], rows)

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({len(self.order)} vertices, {self.num_parameters:,} parameters)"

    def __reduce__(self) -> Any:
        return type(self), (self.vertices, self.output)

    def __getitem__(self, name: str) -> Vertex:
        """Return the vertex of a name.

        Raises:
            ValueError: there is none.
        """
        for vertex in self.order:
            if vertex.name == name:
                return vertex
        names = ", ".join(vertex.name for vertex in self.order)
        raise ValueError(f"name must be one of {names}: got name={name!r}.")

    @property
    def sources(self) -> tuple[Vertex, ...]:
        """The vertices that users give, in the order in which they were listed."""
        return tuple(v for v in _flattened(self.vertices)[0] if isinstance(v.kind, Source))

    @property
    def dropouts(self) -> tuple[str, ...]:
        """The vertices that drop at random while training."""
        return tuple(v.name for v in self.order if isinstance(v.kind, Dropout) and v.kind.rate)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained, padding not counted."""
        return sum(map(self.count_parameters, self.arrays))

    def count_parameters(self, name: str) -> int:
        """Return how many numbers of its own a vertex has."""
        return sum(prod(p.shape) for p in self.arrays.get(name, {}).values())

    def readers(self, name: str) -> list[Vertex]:
        """Return the out-neighbours of a vertex."""
        return [vertex for vertex in self.order if name in vertex.inputs]

    def _own_parameters(self) -> dict[str, Mapping[str, Parameter]]:
        by_name = {vertex.name: vertex for vertex in self.order}
        needed = {
            v.name: v.kind.parameters(*(self.shapes[i] for i in v.inputs)) for v in self.order
        }
        for vertex in self.order:
            if vertex.share is not None:
                _check_share(vertex, by_name, needed)
        return {v.name: needed[v.name] for v in self.order if v.share is None and needed[v.name]}


@dataclass(frozen=True, slots=True)
class Repeat:
    """A block that is there several times, each reading the one before.

    The vertices of block i are called name.i.vertex; whoever reads `name` reads the last block.

    Attributes:
        name: of the whole.
        block: a graph with one Input, whose output has the shape of the input.
        input: name of the vertex that the first block reads.
        times: how many blocks there are.
    """

    name: str
    block: "Structure"
    input: str
    times: int

    def __post_init__(self) -> None:
        for field_, value in (("name", self.name), ("input", self.input)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{field_} of a Repeat must be a word: got {field_}={value!r}.")
        if not isinstance(self.block, Structure):
            raise ValueError(
                f'repeated block "{self.name}" must be a Graph: got {self.block!r}. Use '
                "Graph([...])."
            )
        check_count("times", self.times)
        sources = self.block.sources
        if len(sources) != 1 or not isinstance(sources[0].kind, Input):
            raise ValueError(
                f'repeated block "{self.name}" must have one Input: got '
                f"{[vertex.name for vertex in sources]}."
            )
        given, made = (self.block.shapes[n] for n in (sources[0].name, self.block.output))
        if given != made:
            raise ValueError(
                f'repeated block "{self.name}" must give the shape that it reads: got {given} in '
                f"and {made} out."
            )

    @property
    def last(self) -> str:
        """Name of the vertex that the last block ends with."""
        return f"{self.name}.{self.times - 1}.{self.block.output}"

    def unrolled(self) -> Iterator[tuple[int, Vertex]]:
        """Yield the number of a block and a vertex of it, for all blocks."""
        (source,) = self.block.sources
        before = self.input
        for i in range(self.times):
            for vertex in self.block.order:
                if vertex != source:
                    yield i, vertex.inside(f"{self.name}.{i}", {source.name: before})
            before = f"{self.name}.{i}.{self.block.output}"


def _flattened(
    vertices: tuple[Vertex | Repeat, ...],
) -> tuple[list[Vertex], dict[str, tuple[str, int]]]:
    """Return all vertices, and the blocks of those of a Repeat."""
    flat: list[Vertex] = []
    blocks: dict[str, tuple[str, int]] = {}
    for item in vertices:
        if isinstance(item, Vertex):
            flat.append(item)
        elif isinstance(item, Repeat):
            for i, vertex in item.unrolled():
                flat.append(vertex)
                blocks[vertex.name] = (item.name, i)
        else:
            raise ValueError(
                f"vertices must be of type Vertex or Repeat: got {item!r}. Use for example "
                "Vertex('up', Dense(256), 'x')."
            )
    _check_repeats(vertices, flat)
    ends = _ends(vertices)
    resolved = [
        Vertex(v.name, v.kind, *(ends.get(i, i) for i in v.inputs), share=v.share) for v in flat
    ]
    return resolved, blocks


def _ends(vertices: tuple["Vertex | Repeat", ...]) -> dict[str, str]:
    """Return what the name of a Repeat stands for: the vertex that its last block ends with."""
    return {item.name: item.last for item in vertices if isinstance(item, Repeat)}


def _given_to_repeats(
    vertices: tuple["Vertex | Repeat", ...],
) -> dict[str, list[tuple[str, Shape]]]:
    """Return, by the vertex that a Repeat reads, its name and the shape that its blocks read."""
    ends, given = _ends(vertices), {}
    for item in vertices:
        if isinstance(item, Repeat):
            (source,) = item.block.sources
            wanted = item.name, item.block.shapes[source.name]
            given.setdefault(ends.get(item.input, item.input), []).append(wanted)
    return given


def _check_repeats(vertices: tuple[Vertex | Repeat, ...], flat: list[Vertex]) -> None:
    repeats = [item for item in vertices if isinstance(item, Repeat)]
    names = Counter([vertex.name for vertex in flat] + [item.name for item in repeats])
    known = {vertex.name for vertex in flat} | {item.name for item in repeats}
    for item in repeats:
        if names[item.name] > 1:
            raise ValueError(f'vertex "{item.name}" must have a name of its own: got it twice.')
        if item.input not in known:
            raise ValueError(
                f'repeated block "{item.name}" must read a vertex that is there: got '
                f'"{item.input}".'
            )


def _check_names(vertices: list[Vertex]) -> None:
    counts = Counter(vertex.name for vertex in vertices)
    doubled = [name for name, count in counts.items() if count > 1]
    if doubled:
        raise ValueError(
            f'vertex "{doubled[0]}" must have a name of its own: got it {counts[doubled[0]]} '
            "times. Rename all but one."
        )
    for vertex in vertices:
        for name in vertex.inputs:
            if name not in counts:
                raise ValueError(
                    f'vertex "{vertex.name}" must read vertices that are there: got "{name}", '
                    f"there are {', '.join(counts)}."
                )


def _ordered(vertices: list[Vertex]) -> tuple[Vertex, ...]:
    """Return the vertices, in-neighbours first, otherwise as listed."""
    placed: dict[str, Vertex] = {}
    left = list(vertices)
    while left:
        waiting = []
        for vertex in left:
            if all(name in placed for name in vertex.inputs):
                placed[vertex.name] = vertex
            else:
                waiting.append(vertex)
        if len(waiting) == len(left):
            raise ValueError(
                f"vertices must have no cycle: got {' <- '.join(_cycle(waiting))}. Take one of "
                "these inputs away."
            )
        left = waiting
    return tuple(placed.values())


def _cycle(vertices: list[Vertex]) -> list[str]:
    """Return the names along a cycle, each a vertex that the one before reads."""
    reads = {v.name: v.inputs for v in vertices}
    path = [vertices[0].name]
    while True:
        following = next(name for name in reads[path[-1]] if name in reads)
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)


def _find_output(order: tuple[Vertex, ...], wanted: str | None) -> str:
    read = {name for vertex in order for name in vertex.inputs}
    ends = [vertex.name for vertex in order if vertex.name not in read]
    if wanted is None:
        if not order:
            raise ValueError("vertices must have at least one vertex: got none.")
        if len(ends) != 1:
            raise ValueError(
                f"a graph must have one output: got {len(ends)} vertices that nobody reads: "
                f"{', '.join(ends)}. Join them, or give output=."
            )
        return ends[0]
    if all(vertex.name != wanted for vertex in order):
        names = ", ".join(ends)
        raise ValueError(f'output must be a vertex, such as {names}: got output="{wanted}".')
    needed = {wanted}
    for vertex in reversed(order):
        needed |= set(vertex.inputs) if vertex.name in needed else set()
    unneeded = [vertex.name for vertex in order if vertex.name not in needed]
    if unneeded:
        raise ValueError(
            f'vertex "{unneeded[0]}" must be needed by output="{wanted}": got '
            f"{', '.join(unneeded)}, which it does not depend on. Leave them out."
        )
    return wanted


def _infer_shapes(
    order: tuple[Vertex, ...], given: Mapping[str, list[tuple[str, Shape]]]
) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for vertex in order:
        try:
            shapes[vertex.name] = vertex.kind.shape(*(shapes[name] for name in vertex.inputs))
        except ValueError as error:
            named = ", ".join(f"{name} {shapes[name]}" for name in vertex.inputs)
            raise ValueError(f'vertex "{vertex.name}" {error} Its inputs: {named}.') from error
        for name, wanted in given.get(vertex.name, ()):
            if shapes[vertex.name] != wanted:
                raise ValueError(
                    f'repeated block "{name}" must be given the shape that its Input has: got '
                    f'{shapes[vertex.name]} of vertex "{vertex.name}", and {wanted}. Use Dense '
                    "before it, or another Input."
                )
    return shapes


def _check_share(
    vertex: Vertex, by_name: dict[str, Vertex], needed: dict[str, dict[str, Parameter]]
) -> None:
    owner = by_name.get(vertex.share or "")
    if owner is None or owner.share is not None:
        raise ValueError(
            f'vertex "{vertex.name}" must share the parameters of a vertex that has its own: got '
            f'share="{vertex.share}".'
        )
    mine, theirs = (
        {name: (p.shape, p.dims) for name, p in needed[n].items()}
        for n in (vertex.name, owner.name)
    )
    if mine != theirs or not mine:
        shapes = [{name: shape for name, (shape, _) in p.items()} for p in (mine, theirs)]
        raise ValueError(
            f'vertex "{vertex.name}" must have parameters like those of "{owner.name}" to share '
            f"them: got {shapes[0]} and {shapes[1]}."
        )
