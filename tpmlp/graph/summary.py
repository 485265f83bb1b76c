"""Summary: what one device holds of every vertex, and what a training step moves."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import jax.numpy as jnp

from tpmlp.graph.cost import step_collectives
from tpmlp.graph.memory import step_temp_bytes
from tpmlp.graph.placement import GATHER, TURN, WHOLE, GraphPlacement, Node
from tpmlp.kernels.cost import Collective, total_bytes
from tpmlp.layout import padded
from tpmlp.losses import Loss
from tpmlp.regularizers import ElementwisePenalty
from tpmlp.table import format_bytes, memory_line, text_table

ADDED = (GATHER, TURN, WHOLE)


@dataclass(frozen=True, kw_only=True, slots=True)
class VertexSummary:
    """One vertex on one device.

    Attributes:
        name: the vertex's.
        kind: what it computes.
        inputs: what it reads; where the mesh needs it, gathered, whole or turned.
        logical: shape of its output as users have it.
        local: shape of one device's part, padding included.
        num_parameters: its own numbers, padding not counted.
        collectives: kinds of collective of its passes, and how often each runs in a step.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    logical: str
    local: tuple[int, ...]
    num_parameters: int
    collectives: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class GraphSummary:
    """What one device holds and receives in a training step of a graph; print it.

    Attributes:
        mesh: devices on each axis.
        vertices: in the order of the forward pass, with what the mesh adds between them.
        collectives: of one step, in order.
        param_bytes: of the parameters on one device, and so of the gradients.
        num_parameters: of the graph, padding not counted.
        temp_bytes: of what lives within a step; None where it is not predicted.
    """

    mesh: dict[str, int]
    vertices: tuple[VertexSummary, ...]
    collectives: tuple[Collective, ...]
    param_bytes: int
    num_parameters: int
    temp_bytes: int | None

    @property
    def bytes_moved(self) -> float:
        """Bytes that a device receives in one step."""
        return total_bytes(self.collectives)

    def __str__(self) -> str:
        rows = [
            (
                v.name,
                v.kind,
                ", ".join(v.inputs),
                v.logical,
                "[" + ", ".join(map(str, v.local)) + "]",
                v.num_parameters or "",
                ", ".join(f"{count} {kind}" for kind, count in v.collectives.items()),
            )
            for v in self.vertices
        ]
        headers = [
            "vertex",
            "kind",
            "reads",
            "output",
            "on one device",
            "parameters",
            "collectives",
        ]
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items())
        return (
            f"{text_table(headers, rows)}\n"
            f"on {axes}: {self.num_parameters:,} parameters; a device receives "
            f"{format_bytes(self.bytes_moved)} in a step\n"
            f"{memory_line(self.param_bytes, self.temp_bytes)}"
        )

    __repr__ = __str__


def summarize_graph(
    placement: GraphPlacement,
    *,
    batch_size: int,
    dtype: str,
    loss: Loss | None = None,
    penalty: ElementwisePenalty | None = None,
) -> GraphSummary:
    """Return what one device holds and what a training step moves.

    Args:
        placement: the graph on its mesh.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss; None leaves its collectives out, and takes it to write one array.
        penalty: an elementwise R(W), or None.
    """
    moved = step_collectives(
        placement, batch_size=batch_size, dtype=dtype, loss=loss, penalty=penalty
    )
    counts: dict[str, dict[str, int]] = {}
    for row in moved:
        mine = counts.setdefault(row.tensor.rpartition(": ")[0], {})
        mine[row.kind] = mine.get(row.kind, 0) + row.times
    params = sum(
        prod(placement.padded_shape(array)) // placement.num_blocks
        for mine in placement.graph.arrays.values()
        for array in mine.values()
    )
    return GraphSummary(
        mesh=placement.sizes,
        vertices=tuple(
            VertexSummary(
                name=node.name,
                kind=node.kind.label,
                inputs=node.inputs,
                logical=str(node.shape),
                local=_local(node, placement, batch_size),
                num_parameters=placement.graph.count_parameters(node.name),
                collectives=counts.get(node.name, {}),
            )
            for node in placement.program
        ),
        collectives=tuple(moved),
        param_bytes=params * jnp.dtype(dtype).itemsize,
        num_parameters=placement.graph.num_parameters,
        temp_bytes=step_temp_bytes(placement, batch_size=batch_size, dtype=dtype, loss=loss),
    )


def _local(node: Node, placement: GraphPlacement, batch_size: int) -> tuple[int, ...]:
    """Return the shape of one device's part, samples first."""
    rows = padded(batch_size, placement.row_blocks) // placement.sizes["data"]
    tokens = () if node.shape.tokens is None else (node.shape.tokens,)
    if node.shape.width is None:
        return (rows, *tokens)
    split = {GATHER: "s", WHOLE: ""}.get(node.kind, "sg") if node.kind in ADDED else "sg"
    devices = prod(placement.sizes[node.axes[role]] for role in split)
    return (rows, *tokens, node.padded_width // devices)
