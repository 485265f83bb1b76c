"""A picture of a graph: vertices by depth, edges between them."""

from collections.abc import Callable
from typing import Any

from tpmlp.extras import require
from tpmlp.graph.kinds import Source
from tpmlp.graph.structure import Structure
from tpmlp.graph.vertex import Vertex

# Colours of what is given, of what has parameters, and of the rest.
GIVEN, TRAINED, OTHER = "#d9e8f5", "#f8dcc0", "#f2f2f2"
# Of one column, in the units of a vertex's height.
ROW, COLUMN = 1.3, 2.6
# How far an edge that goes round others leaves the straight line, in parts of its length.
BEND = 0.2
# That a column has room for.
CHARACTERS = 20


def draw_graph(graph: Structure) -> Any:
    """Return a matplotlib Figure; a vertex stands right of all that it reads."""
    make = require("matplotlib.figure", extra="plot", user="Graph.plot").Figure
    drawn, stands_for = _drawn(graph)
    places = _places(drawn, stands_for)
    columns = 1 + max(column for column, _ in places.values())
    rows = 1 + max(row for _, row in places.values())
    # An edge that skips columns goes round the vertices between, above the first row.
    edges = [(stands_for(n), v.name) for v in drawn for n in dict.fromkeys(v.inputs)]
    skips = [places[end][0] - places[start][0] for start, end in edges]
    above = BEND * COLUMN * max([1, *skips]) / 2
    texts = {vertex.name: _text(graph, vertex) for vertex in drawn}
    longest = max(len(line) for text in texts.values() for line in text.split("\n"))
    size = (1.35 * max(1, longest / CHARACTERS) * columns + 0.4, 0.58 * (ROW * rows + above) + 0.3)
    figure = make(figsize=size, layout="constrained")
    panel = figure.subplots()
    boxes = {}
    for vertex in drawn:
        x, y = _point(places[vertex.name])
        given = isinstance(vertex.kind, Source)
        trained = vertex.name in graph.arrays or vertex.share
        color = GIVEN if given else TRAINED if trained else OTHER
        box = {"boxstyle": "round", "facecolor": color, "edgecolor": "#606060"}
        drawn_text = panel.text(
            x, y, texts[vertex.name], ha="center", va="center", fontsize=7, bbox=box
        )
        boxes[vertex.name] = drawn_text.get_bbox_patch()
    for (start, end), skip in zip(edges, skips, strict=True):
        bends = skip > 1 and places[start][1] == places[end][1]
        ends = _point(places[start]), _point(places[end])
        _edge(panel, ends, (boxes[start], boxes[end]), -BEND if bends else 0)
    panel.set_xlim(-COLUMN / 2, columns * COLUMN - COLUMN / 2)
    panel.set_ylim(-rows * ROW + ROW / 2, ROW / 2 + above)
    panel.axis("off")
    return figure


def _drawn(graph: Structure) -> tuple[list[Vertex], Callable[[str], str]]:
    """Return the vertices that are drawn, the first block of each Repeat, and for whom they stand.

    Whoever reads a later block reads the first one in the picture.
    """
    blocks = graph.blocks

    def stands_for(name: str) -> str:
        if name not in blocks:
            return name
        repeat, number = blocks[name]
        return f"{repeat}.0{name.removeprefix(f'{repeat}.{number}')}"

    return [v for v in graph.order if stands_for(v.name) == v.name], stands_for


def _text(graph: Structure, vertex: Vertex) -> str:
    times = _times(graph, vertex.name)
    lines = [vertex.name, vertex.kind.label, str(graph.shapes[vertex.name])]
    return "\n".join([*lines, *([f"{times} times"] if times > 1 else [])])


def _times(graph: Structure, name: str) -> int:
    """Return how many blocks a vertex of the first one stands for."""
    if name not in graph.blocks:
        return 1
    repeat, _ = graph.blocks[name]
    return 1 + max(number for of, number in graph.blocks.values() if of == repeat)


def _places(drawn: list[Vertex], stands_for: Callable[[str], str]) -> dict[str, tuple[int, int]]:
    """Return the column of each vertex, how far it is from the inputs, and its row there."""
    column: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}
    taken: dict[int, int] = {}
    for vertex in drawn:
        at = 1 + max((column[stands_for(name)] for name in vertex.inputs), default=-1)
        column[vertex.name] = at
        places[vertex.name] = at, taken.get(at, 0)
        taken[at] = taken.get(at, 0) + 1
    return places


def _point(place: tuple[int, int]) -> tuple[float, float]:
    column, row = place
    return column * COLUMN, -row * ROW


def _edge(panel: Any, ends: tuple[Any, Any], boxes: tuple[Any, Any], bend: float) -> None:
    arrow = {
        "arrowstyle": "-|>",
        "color": "#808080",
        "patchA": boxes[0],
        "patchB": boxes[1],
        "shrinkA": 1,
        "shrinkB": 1,
        "connectionstyle": f"arc3,rad={bend}",
    }
    panel.annotate("", xy=ends[1], xytext=ends[0], arrowprops=arrow)
