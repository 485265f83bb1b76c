"""Vertices: a name, what is computed, and the names of the in-neighbours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tpmlp.graph.kinds import Function, Kind


@dataclass(frozen=True, slots=True, init=False)
class Vertex:
    """A vertex of a graph.

    Attributes:
        name: unique in its graph.
        kind: what it computes.
        inputs: names of the in-neighbours, in the order in which the kind takes them.
        share: name of another vertex whose parameters it uses, or None.

    Examples:
        >>> from tpmlp.graph import Dense
        >>> Vertex("up", Dense(256), "x").inputs
        ('x',)
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    share: str | None

    def __init__(self, name: str, kind: Kind, *inputs: str, share: str | None = None) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a word: got name={name!r}. Use for example 'up'.")
        if not isinstance(kind, Kind):
            raise ValueError(
                f'vertex "{name}" must have a kind of tpmlp.graph: got kind={kind!r}. Use for '
                "example Dense(256)."
            )
        for given in inputs:
            if not isinstance(given, str):
                raise ValueError(
                    f'vertex "{name}" must be given its inputs by name: got {given!r}.'
                )
        if share is not None and not isinstance(share, str):
            raise ValueError(
                f'vertex "{name}" must share the parameters of a vertex by its name: got '
                f"share={share!r}."
            )
        if kind.num_inputs is None and not inputs:
            raise ValueError(f'vertex "{name}" must have inputs: got none. Name one or more.')
        if kind.num_inputs is not None and len(inputs) != kind.num_inputs:
            raise ValueError(
                f'vertex "{name}" must have {kind.num_inputs} inputs, as it is {kind.label}: got '
                f"{len(inputs)}: {inputs}."
            )
        for field, value in zip(self.__slots__, (name, kind, inputs, share), strict=True):
            object.__setattr__(self, field, value)

    @staticmethod
    def from_function(
        name: str,
        function: Callable[..., Any],
        *inputs: str,
        of: Literal["gathered", "local"] = "gathered",
    ) -> "Vertex":
        """Return a vertex that computes a function of yours, differentiated by jax.vjp.

        Args:
            name: of the vertex.
            function: of arrays [B, width] or [B, T, width], one for each input, to one array with
                as many samples; each sample of it depends on that sample alone.
            *inputs: names of the in-neighbours.
            of: "gathered": the function sees all features, and every device computes all of it.
                "local": it sees those of one device, and must be elementwise.
        """
        try:
            return Vertex(name, Function(function, of), *inputs)
        except ValueError as error:
            named = str(error).startswith("vertex")
            raise ValueError(str(error) if named else f'vertex "{name}": {error}') from error

    def inside(self, block: str, named: dict[str, str]) -> "Vertex":
        """Return the vertex under the name of a block, its inputs renamed."""

        def rename(name: str) -> str:
            return named.get(name, f"{block}.{name}")

        share = None if self.share is None else rename(self.share)
        return Vertex(rename(self.name), self.kind, *map(rename, self.inputs), share=share)
