"""A graph cut for a pipeline: what comes before the blocks that repeat, a block, what comes after.

    sources .. first part .. -> block 0 -> block 1 -> .. -> block n-1 -> .. last part .. output

Each is a graph of its own, and what goes from one to the next is one array, the *message*: the last
part reads what the last block gives, and nothing else that came before. Parameters of the first and
of the last part, the *ends*, may be shared between them, as a table of an embedding and of logits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from tpmlp.graph.kinds import ActivityL1, Input
from tpmlp.graph.shape import Shape
from tpmlp.graph.structure import Repeat, Structure
from tpmlp.graph.vertex import Vertex

WAY_OUT = "or use a mesh with stage=1"


@dataclass(frozen=True, slots=True)
class End:
    """The first or the last part.

    Attributes:
        graph: it as a graph of its own.
        owners: (vertex whose parameters are used here, their owner in the whole graph), the same
            but where that one is in the other part.
    """

    graph: Structure
    owners: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """The parts of a graph.

    Attributes:
        repeat: the blocks.
        first: from the sources to what the first block reads.
        last: from what the last block gives, an Input of the Repeat's name, to the output.
    """

    repeat: Repeat
    first: End
    last: End

    @property
    def block(self) -> Structure:
        """One block."""
        return self.repeat.block

    @property
    def source(self) -> str:
        """The name in a block of what it reads."""
        return self.block.sources[0].name

    def owner_in(self, number: int, vertex: str) -> str:
        """Return the name in the whole graph of a block's vertex."""
        return f"{self.repeat.name}.{number}.{vertex}"


@lru_cache(maxsize=64)
def cut_graph(graph: Structure) -> Cut:
    """Return the parts of a graph.

    Raises:
        ValueError: no Repeat, or several; a vertex after it that reads one before it or inside, or
            that uses parameters of a block; a vertex that pipelines cannot have.
    """
    _check_kinds(graph)
    repeat = _sole_repeat(graph)
    first, last = _sides(graph)
    _check_skips(graph, repeat, {vertex.name for vertex in first}, last)
    owner_of = {v.name: v.share or v.name for v in (*first, *last)}
    source = Vertex(repeat.name, _as_source(graph.shapes[repeat.last]))
    renamed = [
        Vertex(v.name, v.kind, *(_renamed(n, repeat) for n in v.inputs), share=v.share)
        for v in last
    ]
    output = _renamed(graph.output, repeat)
    return Cut(
        repeat,
        _end(first, owner_of, repeat.input),
        _end([source, *renamed], owner_of, output),
    )


def _end(vertices: list[Vertex], owner_of: dict[str, str], output: str) -> End:
    """Return a part; of what shares with the other part, the first one owns the parameters here."""
    names = {vertex.name for vertex in vertices}
    here: dict[str, str] = {}
    for vertex in vertices:
        owner = owner_of.get(vertex.name, vertex.name)
        here.setdefault(owner, owner if owner in names else vertex.name)
    own = []
    for vertex in vertices:
        owner = here[owner_of.get(vertex.name, vertex.name)]
        share = None if owner == vertex.name else owner
        own.append(Vertex(vertex.name, vertex.kind, *vertex.inputs, share=share))
    graph = Structure(own, output)
    owners = tuple((mine, owner) for owner, mine in here.items() if mine in graph.arrays)
    return End(graph, owners)


def _sole_repeat(graph: Structure) -> Repeat:
    repeats = [item for item in graph.vertices if isinstance(item, Repeat)]
    if len(repeats) != 1:
        names = ", ".join(repeat.name for repeat in repeats) or "none"
        raise ValueError(
            f"a Graph must have one Repeat on a mesh with stages, whose blocks they share: got "
            f"{names}. Write what repeats as Repeat(name, block, input, times), {WAY_OUT}."
        )
    return repeats[0]


def _sides(graph: Structure) -> tuple[list[Vertex], list[Vertex]]:
    """Return the vertices outside the blocks: those that depend on no block, and those that do."""
    later = set(graph.blocks)
    for vertex in graph.order:
        if later.intersection(vertex.inputs):
            later.add(vertex.name)
    outside = [vertex for vertex in graph.order if vertex.name not in graph.blocks]
    sides = ([v for v in outside if (v.name in later) is after] for after in (False, True))
    first, last = sides
    return first, last


def _check_skips(graph: Structure, repeat: Repeat, before: set[str], last: Iterable[Vertex]):
    for vertex in last:
        for name in vertex.inputs:
            if name in before or (name in graph.blocks and name != repeat.last):
                raise ValueError(
                    f'vertex "{vertex.name}" must read "{repeat.name}" or what comes after it on a '
                    f'mesh with stages: got "{name}", a skip over stages. Let the blocks carry it '
                    f"along, {WAY_OUT}."
                )
    for vertex in graph.order:
        if vertex.name not in graph.blocks and vertex.share in graph.blocks:
            raise ValueError(
                f'vertex "{vertex.name}" must not share parameters of a block on a mesh with '
                f'stages: got share="{vertex.share}". Give it its own, {WAY_OUT}.'
            )


def _check_kinds(graph: Structure) -> None:
    """Refuse what adds to the objective on its way."""
    for vertex in graph.order:
        if isinstance(vertex.kind, ActivityL1):
            raise ValueError(
                f'vertex "{vertex.name}" must be of a kind that a pipeline runs: got '
                f"{vertex.kind.label}. Leave it out, {WAY_OUT}."
            )


def _as_source(shape: Shape) -> Input:
    return Input(shape.features, shape.tokens)


def _renamed(name: str, repeat: Repeat) -> str:
    return repeat.name if name == repeat.last else name
