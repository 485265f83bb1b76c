"""Summary: what one device holds of every array of a model, and what a step moves."""

from dataclasses import dataclass
from math import prod

from tpmlp.kernels.cost import Collective, layer_collectives, loss_collectives
from tpmlp.layout import padded, parse_layout
from tpmlp.losses import Loss
from tpmlp.placement import Placement
from tpmlp.table import format_bytes, text_table


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
        item_bytes: bytes of an element.
    """

    mesh: dict[str, int]
    roles: tuple[str, ...]
    bindings: dict[str, dict[str, str]]
    padding: dict[int, int]
    parts: tuple[Part, ...]
    collectives: tuple[Collective, ...]
    item_bytes: int

    @property
    def bytes_moved(self) -> float:
        """Bytes that a device receives in one step."""
        return sum(c.words for c in self.collectives) * self.item_bytes

    def __str__(self) -> str:
        return "\n".join([self.arrays_table(), self.notes(), "", self.collectives_table()])

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
                format_bytes(c.words * self.item_bytes),
            )
            for c in self.collectives
        ]
        rows.append(("step", "all", "", "", "", format_bytes(self.bytes_moved)))
        headers = ["phase", "tensor", "collective", "over", "devices", "a device receives"]
        return text_table(headers, rows)


def summarize(
    placement: Placement,
    *,
    bias: bool,
    batch_size: int,
    item_bytes: int,
    loss: Loss | None = None,
    penalty: bool = False,
) -> Summary:
    """Return what one device holds and what a training step moves.

    Args:
        placement: the layers on their mesh.
        bias: whether the layers have biases.
        batch_size: samples of one step.
        item_bytes: bytes of an element.
        loss: the loss; None leaves its collectives out.
        penalty: whether there is an elementwise R(W).
    """
    moved = step_collectives(
        placement, bias=bias, batch_size=batch_size, loss=loss, penalty=penalty
    )
    return Summary(
        mesh=placement.sizes,
        roles=placement.words,
        bindings=dict(zip(placement.words, placement.axes, strict=True)),
        padding={
            width: whole
            for width, whole in zip(placement.widths, placement.padded_widths, strict=True)
            if width != whole
        },
        parts=tuple(_parts(placement, bias, batch_size, item_bytes)),
        collectives=tuple(moved),
        item_bytes=item_bytes,
    )


def step_collectives(
    placement: Placement,
    *,
    bias: bool,
    batch_size: int,
    loss: Loss | None = None,
    penalty: bool = False,
) -> list[Collective]:
    """Return the collectives of one training step, in order; arguments as in `summarize`."""
    batch = padded(batch_size, placement.sizes["data"]) // placement.sizes["data"]
    widths = placement.padded_widths
    layers = [
        layer_collectives(
            l,
            d_in=widths[l - 1],
            d_out=widths[l],
            batch=batch,
            bias=bias,
            input_gradient=l > 1,
            axes=axes,
            sizes=placement.sizes,
        )
        for l, axes in enumerate(placement.axes, 1)
    ]
    objective = loss_collectives(
        num_outputs=widths[-1] if loss is not None and loss.targets == "any" else 0,
        num_reduced=0 if loss is None else loss.num_reduced,
        num_scalars=0 if loss is None else 3,
        batch=batch,
        penalty=penalty,
        sizes=placement.sizes,
    )
    forward = [c for layer in layers for c in layer if c.phase == "forward"]
    backward = [c for layer in reversed(layers) for c in layer if c.phase == "backward"]
    return [*forward, *objective, *backward]


def _parts(placement: Placement, bias: bool, batch_size: int, item_bytes: int) -> list[Part]:
    parts = []
    rows = padded(batch_size, placement.sizes["data"])
    for l, role in enumerate(placement.words, 1):
        d_in, d_out = placement.widths[l - 1 : l + 1]
        W, b = placement.layer_shapes(l)
        whole = {
            f"W_{l}": ("O/g I/s", (d_out, d_in), W),
            f"b_{l}": ("O/g/s", (d_out,), b),
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
            size = prod(local) * item_bytes
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
