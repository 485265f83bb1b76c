"""Shapes of what flows along the edges of a graph, and of what its vertices are made of.

A vertex gives one array: features [B, width], features of tokens [B, T, width], or the ids of
tokens [B, T]. Shapes are logical; padding is a matter of the mesh (tpmlp.graph.placement).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple
from zlib import crc32


@dataclass(frozen=True, slots=True)
class Shape:
    """The logical shape of a vertex's output.

    Attributes:
        width: features; None for ids, which have none.
        tokens: T; None where a sample is one vector.
        vocabulary: how many ids there are; None for features.

    Examples:
        >>> str(Shape(64)), str(Shape(64, 16)), str(Shape(None, 16, 99))
        ('[B, 64]', '[B, 16, 64]', '[B, 16] ids')
    """

    width: int | None
    tokens: int | None = None
    vocabulary: int | None = None

    def __str__(self) -> str:
        sizes = ", ".join(str(n) for n in ("B", self.tokens, self.width) if n is not None)
        return f"[{sizes}]" if self.width is not None else f"[{sizes}] ids"

    @property
    def features(self) -> int:
        """The width of what is no array of ids."""
        assert self.width is not None
        return self.width

    @property
    def positions(self) -> int:
        """Columns that a sample has inside the kernel: T, or 1."""
        return self.tokens or 1


class Parameter(NamedTuple):
    """One array of a vertex's parameters.

    Attributes:
        dims: what each dim is: "outputs" and "inputs" are split over the axes that the vertex
            gathers and scatters over, "features" over both tensor axes, "whole" is not split.
        shape: logical.
        start: how it is drawn: "glorot", or with deviation 0.02: "small"; or a number that all
            elements have.
    """

    dims: tuple[Literal["outputs", "inputs", "features", "whole"], ...]
    shape: tuple[int, ...]
    start: Literal["glorot", "small"] | float


def seed_of(name: str) -> int:
    """Return the number that stands for a name in random draws, whatever else is in the graph."""
    return crc32(name.encode())
