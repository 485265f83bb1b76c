"""What the kernel moves, as the docstrings of tpmlp.kernels.dense say, as numbers.

Pure arithmetic: no arrays, no JAX. The suite compares these rows with the collectives counted in
the compiled program, on every mesh and under every strategy.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

# Under reduction="invariant": blocks of outputs, of inputs and of samples; pieces of features that
# both tensor axes split, and of a parameter. tpmlp.kernels.blocks says why.
NUM_BLOCKS = 8
NUM_PIECES = NUM_BLOCKS * NUM_BLOCKS

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ppermute"]
Phase = Literal["forward", "loss", "backward"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """One collective of one step.

    Attributes:
        phase: "forward", "loss" or "backward".
        layer: l, 1-based; 0 for what belongs to no layer.
        tensor: what it moves, in the notation of the mathematics.
        kind: "all_gather", "reduce_scatter", "all_to_all" or "all_reduce"; "ppermute" for all hops
            of a ring.
        axes: the mesh axes it runs over, none of size 1.
        num_devices: devices in one group, p.
        elements: elements of the whole: of the gathered array, of the array that is summed.
        item_bytes: bytes of an element as it moves.
        times: how often it runs in a step: once for each microbatch, or once.
    """

    phase: Phase
    layer: int
    tensor: str
    kind: Kind
    axes: tuple[str, ...]
    num_devices: int
    elements: int
    item_bytes: int = 4
    times: int = 1

    @property
    def words(self) -> int | float:
        """Elements a device receives each time: (p-1)/p of the whole, twice for an all-reduce.

        These are the volumes of ring algorithms, which are also lower bounds. An int where whole.
        """
        return _number(self.exact_words)

    @property
    def bytes(self) -> int | float:
        """Bytes a device receives in a step, exact before the last rounding."""
        return total_bytes([self])

    @property
    def exact_words(self) -> Fraction:
        """`words` before it is rounded."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return Fraction(rounds * self.elements * (self.num_devices - 1), self.num_devices)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """What one layer is on one device, in numbers.

    Attributes:
        layer: l, 1-based.
        d_in: padded width of the input.
        d_out: padded width of the output.
        batch: samples of one microbatch on one device.
        bias: whether the layer has one.
        axes: mesh axis of the roles g, s, d.
        sizes: devices on each mesh axis.
    """

    layer: int
    d_in: int
    d_out: int
    batch: int
    bias: bool
    axes: dict[str, str]
    sizes: dict[str, int]

    def size(self, role: str) -> int:
        """Return the devices on the axis of a role."""
        return self.sizes[self.axes[role]]

    @property
    def h(self) -> int:
        """Elements of the gathered input."""
        return self.d_in // self.size("s") * self.batch

    @property
    def z(self) -> int:
        """Elements of the output before it is scattered; of the gathered g."""
        return self.d_out // self.size("g") * self.batch

    @property
    def W(self) -> int:
        """Elements of this device's block of W, as it is multiplied."""
        return self.d_out // self.size("g") * (self.d_in // self.size("s"))

    @property
    def b(self) -> int:
        """Elements of this device's block of b, as it is added."""
        return self.d_out // self.size("g") // self.size("s")

    @property
    def output(self) -> int:
        """Elements of this device's share of z."""
        return self.b * self.batch

    @property
    def input(self) -> int:
        """Elements of this device's share of h."""
        return self.d_in // self.size("g") // self.size("s") * self.batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Types:
    """Bytes of an element by what it is, and what else a strategy says of collectives.

    Attributes:
        param: of parameters, biases and losses.
        compute: of what is gathered.
        total: of sums.
        reduce: of what is summed over devices.
        hop: of what is summed on its way round a ring.
        ring: whether gathers and scatters of activations are rings of hops.
        invariant: whether sums over devices are trees, of what an all-to-all or a gather brought.
        splits_data: whether parameters are split over the data axis.
        microbatches: parts of the batch.
    """

    param: int
    compute: int
    total: int
    reduce: int
    hop: int
    ring: bool
    invariant: bool
    splits_data: bool
    microbatches: int

    @property
    def accumulate(self) -> int:
        """Bytes of an element of what microbatches are added up in."""
        return max(self.total, 4)

    @property
    def scatter(self) -> int:
        """Bytes of an element of an activation that is summed and scattered."""
        return self.hop if self.ring else self.reduce


def forward_collectives(
    shape: LayerShape, types: Types, phase: Phase = "forward"
) -> list[Collective]:
    """Return the collectives of a layer's forward pass; phase "backward" where it is repeated."""
    gather, scatter = _kinds(types)
    return _rows(
        shape,
        types,
        *_weight_gathers(shape, types, phase, bias=shape.bias),
        (phase, "h", gather, "g", shape.h, types.compute),
        (phase, "z", scatter, "s", shape.z, types.scatter),
    )


def backward_collectives(
    shape: LayerShape, types: Types, *, input_gradient: bool, gathers_input: bool
) -> list[Collective]:
    """Return the collectives of a layer's backward pass, gradients summed over data left out.

    Args:
        shape: the layer.
        types: bytes of an element.
        input_gradient: whether dh is needed: for every layer but the first.
        gathers_input: whether h is gathered again.
    """
    gather, scatter = _kinds(types)
    rows: list[_Row] = [("backward", "g", gather, "s", shape.z, types.compute)]
    if input_gradient:
        rows.append(("backward", "dh", scatter, "g", shape.h, types.scatter))
    if gathers_input:
        rows.append(("backward", "h", gather, "g", shape.h, types.compute))
    # The only use of W in the backward pass is dh.
    weights = _weight_gathers(shape, types, "backward", bias=False) if input_gradient else []
    return _rows(shape, types, *weights, *rows)


def gradient_collectives(shape: LayerShape, types: Types) -> list[Collective]:
    """Return the collectives that sum a layer's gradients over the data axis."""
    if types.invariant:
        rows: list[_Row] = [
            ("backward", "dW", "all_to_all", "d", shape.W, types.reduce),
            ("backward", "dW summed", "all_gather", "d", shape.W, types.total),
            ("backward", "db", "all_gather", "d", shape.b * shape.size("d"), types.reduce),
        ]
        return _rows(shape, types, *rows[: 3 if shape.bias else 2])
    kind: Kind = "reduce_scatter" if types.splits_data else "all_reduce"
    rows = [("backward", "dW", kind, "d", shape.W, types.reduce)]
    if shape.bias:
        rows.append(("backward", "db", kind, "d", shape.b, types.reduce))
    return _rows(shape, types, *rows, times=types.microbatches if types.splits_data else 1)


def loss_collectives(
    *,
    num_outputs: int,
    gathers_outputs: bool,
    gathers_targets: bool,
    num_reduced: int,
    num_sums: int,
    mean: bool,
    batch: int,
    penalty: bool,
    num_arrays: int,
    types: Types,
    sizes: dict[str, int],
) -> list[Collective]:
    """Return the collectives of the objective: losses, their mean, and R(W).

    Args:
        num_outputs: padded width of the outputs.
        gathers_outputs: whether they are gathered.
        gathers_targets: whether targets, as many values, are.
        num_reduced: elements all-reduced over the tensor axes for each sample.
        num_sums: sums over samples: of losses, of right predictions, of what a model adds.
        mean: whether the total weight is divided by, and so needed.
        batch: samples of one microbatch on one device.
        penalty: whether there is an R(W) that each device sums on its own block.
        num_arrays: arrays of parameters.
        types: bytes of an element.
        sizes: devices on each mesh axis.
    """
    tensor_axes = tuple(a for a in ("x", "y") if sizes[a] > 1)
    data_axes = ("data",) if sizes["data"] > 1 else ()
    split_axes = (*data_axes, *tensor_axes) if types.splits_data else tensor_axes
    parts, param, widest = types.microbatches, types.param, max(types.param, 4)
    outputs = num_outputs * batch
    rows: list[tuple[str, Kind, tuple[str, ...], int, int, int]] = [
        ("outputs", "all_gather", tensor_axes, outputs * gathers_outputs, param, parts),
        ("targets", "all_gather", tensor_axes, outputs * gathers_targets, param, parts),
    ]
    if types.invariant:
        # Summed by everyone: each number of each device, and of R(W) one for each block.
        data = sizes["data"]
        rows += [
            ("total weight", "all_gather", data_axes, int(mean) * data, types.total, 1),
            ("loss, correct", "all_gather", data_axes, num_sums * data, types.total, 1),
            ("R(W)", "all_gather", tensor_axes, penalty * num_arrays * NUM_PIECES, widest, 1),
        ]
    else:
        rows += [
            ("total weight", "all_reduce", data_axes, int(mean), param, 1),
            ("loss of each sample", "all_reduce", tensor_axes, num_reduced * batch, param, parts),
            ("loss, correct", "all_reduce", data_axes, num_sums, param, 1),
            ("R(W)", "all_reduce", split_axes, int(penalty), param, 1),
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
            item_bytes=item_bytes,
            times=times,
        )
        for tensor, kind, names, elements, item_bytes, times in rows
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


_Row = tuple[Phase, str, Kind, str, int, int]


def _kinds(types: Types) -> tuple[Kind, Kind]:
    if types.ring:
        return "ppermute", "ppermute"
    return "all_gather", "all_to_all" if types.invariant else "reduce_scatter"


def _weight_gathers(shape: LayerShape, types: Types, phase: Phase, *, bias: bool) -> list[_Row]:
    if not types.splits_data:
        return []
    rows: list[_Row] = [(phase, "W", "all_gather", "d", shape.W, types.compute)]
    return [*rows, (phase, "b", "all_gather", "d", shape.b, types.param)] if bias else rows


def _rows(
    shape: LayerShape, types: Types, *rows: _Row, times: int | None = None
) -> list[Collective]:
    return [
        Collective(
            phase=phase,
            layer=shape.layer,
            tensor=tensor,
            kind=kind,
            axes=(shape.axes[role],),
            num_devices=shape.size(role),
            elements=elements,
            item_bytes=item_bytes,
            times=types.microbatches if times is None else times,
        )
        for phase, tensor, kind, role, elements, item_bytes in rows
        if shape.size(role) > 1
    ]


def total_bytes(rows: Iterable[Collective]) -> int | float:
    """Return the bytes a device receives in all collectives, exact before the last rounding."""
    return _number(sum((row.exact_words * row.item_bytes * row.times for row in rows), Fraction()))


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)
