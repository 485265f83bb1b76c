"""Summary: what one device holds of every array of a model, and what a step moves."""

from dataclasses import dataclass
from math import prod

import jax.numpy as jnp

from tpmlp.kernels.cost import Collective, total_bytes
from tpmlp.kernels.execution import execution
from tpmlp.layout import padded, parse_layout
from tpmlp.losses import Loss
from tpmlp.placement import Placement
from tpmlp.predict import step_collectives, step_temp_bytes
from tpmlp.table import format_bytes, memory_line, text_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One device's part of one array.

    Attributes:
        tensor: for example "W_1".
        role: "column" or "row", the layer's.
        layout: in the notation, features first inside the kernel.
        logical: shape as users see it, samples as rows.
        local: shape of the part, in the same order, padding included.
        bytes: size of the part.
    """

    tensor: str
    role: str
    layout: str
    logical: tuple[int, ...]
    local: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Summary:
    """What one device holds and receives in a training step; print it.

    Attributes:
        mesh: devices on each axis.
        roles: "column" or "row" for each layer.
        bindings: mesh axes of g and s, for each role that occurs.
        padding: padded width of each logical width that the mesh does not divide.
        parts: of every W_l, b_l, h_l, z_l, g_l, in the order of the layers.
        collectives: of one step, in order.
        param_bytes: of the parameters, and so of the gradients.
        temp_bytes: of what lives within a step; None where it is not predicted.
    """

    mesh: dict[str, int]
    roles: tuple[str, ...]
    bindings: dict[str, dict[str, str]]
    padding: dict[int, int]
    parts: tuple[Part, ...]
    collectives: tuple[Collective, ...]
    param_bytes: int
    temp_bytes: int | None

    @property
    def bytes_moved(self) -> float:
        """Bytes that a device receives in one step."""
        return total_bytes(self.collectives)

    def __str__(self) -> str:
        tables = self.arrays_table(), self.notes(), "", self.collectives_table(), "", self.memory()
        return "\n".join(tables)

    __repr__ = __str__

    def arrays_table(self) -> str:
        """Return the table of what one device holds."""
        rows = [
            (p.tensor, p.role, p.layout, _shape(p.logical), _shape(p.local), format_bytes(p.bytes))
            for p in self.parts
        ]
        return text_table(
            ["tensor", "role", "layout", "whole", "on one device", "size there"], rows
        )

    def notes(self) -> str:
        """Return how to read the table: what g and s are, and which widths are padded."""
        bound = [f"{role}: g={axes['g']}, s={axes['s']}" for role, axes in self.bindings.items()]
        lines = [f"layouts are features first, sizes samples first; {'; '.join(bound)}"]
        if self.padding:
            padded_widths = ", ".join(f"{d} to {whole}" for d, whole in self.padding.items())
            lines.append(f"widths padded with zeros to what the mesh divides: {padded_widths}")
        return "\n".join(lines)

    def memory(self) -> str:
        """Return what a device holds at the height of a step, optimiser not counted."""
        return memory_line(self.param_bytes, self.temp_bytes)

    def collectives_table(self) -> str:
        """Return the table of the collectives of one step, in order."""
        if not self.collectives:
            return "no collectives: one device"
        rows = [
            (
                c.phase,
                f"{c.tensor}_{c.layer}" if c.layer else c.tensor,
                c.kind,
                "*".join(c.axes),
                str(c.num_devices),
                str(c.times),
                format_bytes(c.bytes),
            )
            for c in self.collectives
        ]
        rows.append(("step", "all", "", "", "", "", format_bytes(self.bytes_moved)))
        headers = ["phase", "tensor", "collective", "over", "devices", "times", "a device receives"]
        return text_table(headers, rows)


def summarize(
    placement: Placement,
    *,
    bias: bool,
    batch_size: int,
    dtype: str,
    loss: Loss | None = None,
    penalty: bool = False,
) -> Summary:
    """Return what one device holds and what a training step moves.

    Args:
        placement: the layers on their mesh.
        bias: whether the layers have biases.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss; None leaves its collectives out.
        penalty: whether there is an elementwise R(W).
    """
    moved = step_collectives(
        placement, bias=bias, batch_size=batch_size, dtype=dtype, loss=loss, penalty=penalty
    )
    parts = _parts(placement, bias, batch_size, dtype)
    return Summary(
        mesh=placement.sizes,
        roles=placement.words,
        bindings=dict(zip(placement.words, placement.axes, strict=True)),
        padding={
            width: whole
            for width, whole in zip(placement.widths, placement.padded_widths, strict=True)
            if width != whole
        },
        parts=tuple(parts),
        collectives=tuple(moved),
        param_bytes=sum(part.bytes for part in parts if part.tensor[0] in "Wb"),
        temp_bytes=step_temp_bytes(placement, bias=bias, batch_size=batch_size, dtype=dtype),
    )


def _parts(placement: Placement, bias: bool, batch_size: int, dtype: str) -> list[Part]:
    parts = []
    run = execution(placement, jnp.dtype(dtype))
    item_bytes = {"W": jnp.dtype(dtype).itemsize, "b": jnp.dtype(dtype).itemsize}
    item_bytes |= {"h": run.compute.itemsize, "z": run.compute.itemsize, "g": run.total.itemsize}
    rows = padded(batch_size, placement.row_blocks)
    W_layout, b_layout = placement.param_layouts
    for l, role in enumerate(placement.words, 1):
        d_in, d_out = placement.widths[l - 1 : l + 1]
        W, b = placement.layer_shapes(l)
        whole = {
            f"W_{l}": (W_layout, (d_out, d_in), W),
            f"b_{l}": (b_layout, (d_out,), b),
            f"h_{l}": ("I/s/g B/d", (batch_size, d_in), (rows, W[1])),
            f"z_{l}": ("O/g/s B/d", (batch_size, d_out), (rows, W[0])),
            f"g_{l}": ("O/g/s B/d", (batch_size, d_out), (rows, W[0])),
        }
        for tensor, (layout, logical, shape) in whole.items():
            if tensor.startswith("b") and not bias:
                continue
            dims = parse_layout(layout).dims
            # The kernel has features first, users have samples first.
            order = dims[::-1] if tensor[0] in "hzg" else dims
            axes = placement.axes[l - 1]
            local = tuple(
                size // prod([placement.sizes[axes[a]] for a in dim.axes])
                for size, dim in zip(shape, order, strict=True)
            )
            size = prod(local) * item_bytes[tensor[0]]
            parts.append(
                Part(
                    tensor=tensor,
                    role=role,
                    layout=layout,
                    logical=logical,
                    local=local,
                    bytes=size,
                )
            )
    return parts


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
