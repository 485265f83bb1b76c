"""What the kernel costs, as the docstrings of tpmlp.kernels.dense say, as numbers.

Pure arithmetic: no arrays, no JAX. The suite compares these rows with the collectives counted in
the compiled program, on every mesh.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """One collective of one step.

    Attributes:
        phase: "forward", "loss" or "backward".
        layer: l, 1-based; 0 for what belongs to no layer.
        tensor: what it moves, in the notation of the mathematics.
        kind: "all_gather", "reduce_scatter" or "all_reduce".
        axes: the mesh axes it runs over, none of size 1.
        num_devices: devices in one group, p.
        elements: elements of the whole: of the gathered array, of the array that is summed.
    """

    phase: Literal["forward", "loss", "backward"]
    layer: int
    tensor: str
    kind: Kind
    axes: tuple[str, ...]
    num_devices: int
    elements: int

    @property
    def words(self) -> int | float:
        """Elements a device receives: (p-1)/p of the whole, twice that for an all-reduce.

        These are the volumes of ring algorithms, which are also lower bounds. An int where whole.
        """
        rounds = 2 if self.kind == "all_reduce" else 1
        words = Fraction(rounds * self.elements * (self.num_devices - 1), self.num_devices)
        return int(words) if words.denominator == 1 else float(words)


def layer_collectives(
    layer: int,
    *,
    d_in: int,
    d_out: int,
    batch: int,
    bias: bool,
    input_gradient: bool,
    axes: dict[str, str],
    sizes: dict[str, int],
) -> list[Collective]:
    """Return the collectives of one dense layer in one training step, in order.

    Args:
        layer: l, 1-based.
        d_in: padded width of the input.
        d_out: padded width of the output.
        batch: samples on one device.
        bias: whether the layer has one.
        input_gradient: whether dh is needed: for every layer but the first.
        axes: mesh axis of the roles g, s, d.
        sizes: number of devices of each mesh axis.
    """
    g, s = sizes[axes["g"]], sizes[axes["s"]]
    h, z = d_in // s * batch, d_out // g * batch
    rows: list[tuple[Literal["forward", "backward"], str, Kind, str, int]] = [
        ("forward", "h", "all_gather", "g", h),
        ("forward", "z", "reduce_scatter", "s", z),
        ("backward", "g", "all_gather", "s", z),
        ("backward", "h", "all_gather", "g", h),
        ("backward", "dW", "all_reduce", "d", d_out // g * (d_in // s)),
    ]
    if bias:
        rows.append(("backward", "db", "all_reduce", "d", d_out // g // s))
    if input_gradient:
        rows.append(("backward", "dh", "reduce_scatter", "g", h))
    return [
        Collective(
            phase=phase,
            layer=layer,
            tensor=tensor,
            kind=kind,
            axes=(axes[role],),
            num_devices=sizes[axes[role]],
            elements=elements,
        )
        for phase, tensor, kind, role, elements in rows
        if sizes[axes[role]] > 1
    ]


def loss_collectives(
    *,
    num_outputs: int,
    num_reduced: int,
    num_scalars: int,
    batch: int,
    penalty: bool,
    sizes: dict[str, int],
) -> list[Collective]:
    """Return the collectives of the objective: losses, their mean, and R(W).

    Args:
        num_outputs: padded width of the outputs that a user's loss gathers; 0 for the others.
        num_reduced: elements all-reduced over the tensor axes for each sample.
        num_scalars: of the batch, all-reduced over the data axis: loss, weight, correct.
        batch: samples on one device.
        penalty: whether there is an R(W) that each device sums on its own block.
        sizes: number of devices of each mesh axis.
    """
    tensor_axes = tuple(a for a in ("x", "y") if sizes[a] > 1)
    data_axes = ("data",) if sizes["data"] > 1 else ()
    rows: list[tuple[str, Kind, tuple[str, ...], int]] = [
        ("outputs", "all_gather", tensor_axes, num_outputs * batch),
        ("loss of each sample", "all_reduce", tensor_axes, num_reduced * batch),
        (
            "loss, weight, correct",
            "all_reduce",
            data_axes,
            num_scalars,
        ),
        ("R(W)", "all_reduce", tensor_axes, int(penalty)),
    ]
    return [
        Collective(
            phase="loss",
            layer=0,
            tensor=tensor,
            kind=kind,
            axes=names,
            num_devices=math.prod(sizes[name] for name in names),
            elements=elements,
        )
        for tensor, kind, names, elements in rows
        if names and elements
    ]


def layer_words(*, d_in: int, d_out: int, g: int, s: int, input_gradient: bool) -> float:
    """Return the words a layer moves over the tensor axes for each sample of a device.

    (I/s) (g-1)/g for each gather or scatter of the input, (O/g) (s-1)/s for each of the output:
    the number by which the layout "auto" chooses.

    Examples:
        >>> layer_words(d_in=64, d_out=16, g=4, s=1, input_gradient=True)  # column: 3 * d_in
        144.0
        >>> layer_words(d_in=64, d_out=16, g=1, s=4, input_gradient=True)  # row: 2 * d_out
        24.0
    """
    gathers = 3 if input_gradient else 2
    return gathers * d_in / s * (g - 1) / g + 2 * d_out / g * (s - 1) / s
