"""A picture of a graph: vertices by depth, edges between them."""

from typing import Any

from tpmlp.extras import require
from tpmlp.graph.kinds import Source
from tpmlp.graph.structure import Structure

# Colours of what is given, of what has parameters, and of the rest.
GIVEN, TRAINED, OTHER = "#d9e8f5", "#f8dcc0", "#f2f2f2"
# Of one column, in the units of a vertex's height.
ROW, COLUMN = 1.3, 2.6
# How far an edge that goes round others leaves the straight line, in parts of its length.
BEND = 0.2


def draw_graph(graph: Structure) -> Any:
    """Return a matplotlib Figure; a vertex stands right of all that it reads."""
    make = require("matplotlib.figure", extra="plot", user="Graph.plot").Figure
    places = _places(graph)
    columns = 1 + max(column for column, _ in places.values())
    rows = 1 + max(row for _, row in places.values())
    # An edge that skips columns goes round the vertices between, above the first row.
    edges = [(n, v.name) for v in graph.order for n in dict.fromkeys(v.inputs)]
    skips = [places[end][0] - places[start][0] for start, end in edges]
    above = BEND * COLUMN * max([1, *skips]) / 2
    size = (1.35 * columns + 0.4, 0.58 * (ROW * rows + above) + 0.3)
    figure = make(figsize=size, layout="constrained")
    panel = figure.subplots()
    for (start, end), skip in zip(edges, skips, strict=True):
        bends = skip > 1 and places[start][1] == places[end][1]
        _edge(panel, _point(places[start]), _point(places[end]), -BEND if bends else 0)
    for vertex in graph.order:
        x, y = _point(places[vertex.name])
        given = isinstance(vertex.kind, Source)
        trained = vertex.name in graph.arrays or vertex.share
        color = GIVEN if given else TRAINED if trained else OTHER
        text = f"{vertex.name}\n{vertex.kind.label}\n{graph.shapes[vertex.name]}"
        box = {"boxstyle": "round", "facecolor": color, "edgecolor": "#606060"}
        panel.text(x, y, text, ha="center", va="center", fontsize=7, bbox=box)
    panel.set_xlim(-COLUMN / 2, columns * COLUMN - COLUMN / 2)
    panel.set_ylim(-rows * ROW + ROW / 2, ROW / 2 + above)
    panel.axis("off")
    return figure


def _places(graph: Structure) -> dict[str, tuple[int, int]]:
    """Return the column of each vertex, how far it is from the inputs, and its row there."""
    column: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}
    taken: dict[int, int] = {}
    for vertex in graph.order:
        at = 1 + max((column[name] for name in vertex.inputs), default=-1)
        column[vertex.name] = at
        places[vertex.name] = at, taken.get(at, 0)
        taken[at] = taken.get(at, 0) + 1
    return places


def _point(place: tuple[int, int]) -> tuple[float, float]:
    column, row = place
    return column * COLUMN, -row * ROW


def _edge(panel: Any, start: tuple[float, float], end: tuple[float, float], bend: float) -> None:
    arrow = {
        "arrowstyle": "-|>",
        "color": "#808080",
        "shrinkA": 22,
        "shrinkB": 22,
        "connectionstyle": f"arc3,rad={bend}",
    }
    panel.annotate("", xy=end, xytext=start, arrowprops=arrow)
