"""Random graphs: 5 to 30 vertices, fan-out up to 4, skips over any distance, shared weights."""

import numpy as np

import tpmlp
from tpmlp.graph import (
    Activation,
    Concatenate,
    Dense,
    Input,
    LayerNorm,
    Product,
    RMSNorm,
    Scale,
    Shift,
    Slice,
    Softmax,
    Sum,
)
from tpmlp.graph.shape import Shape
from tpmlp.graph.vertex import Vertex

WIDTHS = (3, 5, 8, 11)
ACTIVATIONS = ("tanh", "sigmoid", "silu")
FAN_OUT = 4
MOST_VERTICES = 30


class _Growing:
    """A graph while it grows."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.vertices: list[Vertex] = []
        self.shapes: dict[str, Shape] = {}
        self.readers: dict[str, int] = {}
        self.dense: dict[tuple[Shape, int, bool], str] = {}
        self.tokens = (None, 3)[self.rng.integers(2)]

    def add(self, kind, *inputs: str, share: str | None = None) -> str:
        name = f"v{len(self.vertices)}"
        self.vertices.append(Vertex(name, kind, *inputs, share=share))
        self.shapes[name] = kind.shape(*(self.shapes[i] for i in inputs))
        self.readers[name] = 0
        for i in inputs:
            self.readers[i] += 1
        return name

    def pick(self, width: int | None = None) -> str | None:
        """Return a vertex that may have another reader, recent ones more often."""
        open_ = [
            name
            for name, count in self.readers.items()
            if count < FAN_OUT and width in (None, self.shapes[name].features)
        ]
        if not open_:
            return None
        weights = np.arange(1, len(open_) + 1, dtype=float)
        return str(self.rng.choice(open_, p=weights / weights.sum()))

    def ends(self) -> list[str]:
        """Return the vertices that nobody reads."""
        return [name for name, count in self.readers.items() if not count]

    def num_joining(self) -> int:
        """Return how many vertices it takes to join all ends, one more after the next step."""
        ends, count = len(self.ends()) + 1, 0
        while ends > 1:
            joined = min(ends, FAN_OUT)
            count, ends = count + joined + 1, ends - joined + 1
        return count

    def grow(self) -> None:
        source = self.pick()
        assert source is not None
        width = self.shapes[source].features
        choice = self.rng.integers(9)
        if choice < 3:
            self.add_dense(source)
        elif choice == 3:
            self.add(Activation(str(self.rng.choice(ACTIVATIONS))), source)
        elif choice == 4:
            kinds = (Scale(), Shift(), RMSNorm(), LayerNorm(), Softmax())
            self.add(kinds[self.rng.integers(len(kinds))], source)
        elif choice == 5:
            first = int(self.rng.integers(width - 1))
            self.add(Slice(first, int(self.rng.integers(first + 1, width)) + 1), source)
        else:
            self.add_joined(source)

    def add_dense(self, source: str) -> None:
        width, bias = int(self.rng.choice(WIDTHS)), bool(self.rng.integers(2))
        key = (self.shapes[source], width, bias)
        owner = self.dense.get(key) if self.rng.integers(2) else None
        name = self.add(Dense(width, bias), source, share=owner)
        self.dense.setdefault(key, name if owner is None else owner)

    def add_joined(self, source: str) -> None:
        """Add a sum, a product or a concatenation of up to four vertices, one maybe twice."""
        inputs = [source]
        concatenates = self.rng.integers(3) == 0
        for _ in range(self.rng.integers(1, 4)):
            other = self.pick(None if concatenates else self.shapes[source].features)
            if other is not None and self.readers[other] + inputs.count(other) < FAN_OUT:
                inputs.append(other)
        kind = Concatenate() if concatenates else (Sum(), Product())[self.rng.integers(2)]
        self.add(kind, *inputs)


def random_graph(seed: int) -> tpmlp.Graph:
    """Return the random graph of a seed."""
    growing = _Growing(seed)
    for _ in range(growing.rng.integers(1, 4)):
        growing.add(Input(int(growing.rng.choice(WIDTHS)), growing.tokens))
    size = growing.rng.integers(5, MOST_VERTICES + 1)
    while len(growing.vertices) + growing.num_joining() < size:
        growing.grow()
    ends = growing.ends()
    while len(ends) > 1:
        joined, ends = ends[:FAN_OUT], ends[FAN_OUT:]
        parts = [growing.add(Dense(4, bias=False), end) for end in joined]
        ends.append(growing.add(Sum(), *parts))
    return tpmlp.Graph(growing.vertices)
