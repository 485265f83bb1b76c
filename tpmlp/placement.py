"""Placement: which device holds which part of every array of a model.

A strategy's words become roles here: each layer gathers over one tensor axis and scatters over
the other. On a mesh with one tensor axis that is larger than 1, "column" gathers over it and "row"
scatters over it, and every layer is free. With two, the output of a layer is split "O/g/s" and the
next layer reads it as "I/s/g": the roles must alternate.

Widths are logical (what the user gave) or padded (a multiple of M = X * Y, what arrays have).
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpmlp.checks import check_dtype
from tpmlp.kernels.cost import NUM_BLOCKS, NUM_PIECES, layer_words
from tpmlp.layout import padded, partition_spec
from tpmlp.mesh import check_mesh, mesh_platform
from tpmlp.strategy import Strategy

OTHER = {"column": "row", "row": "column"}


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One array of a model's parameters, whatever the mesh: a leaf of a tree like the parameters.

    Attributes:
        name: what errors call it, for example "W_1".
        shape: logical.
        split: for each dim, whether devices may split it, so that it is padded.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[bool, ...]

    def padded(self, num_blocks: int) -> tuple[int, ...]:
        """Return the shape of the array where split dims are multiples of num_blocks."""
        return tuple(
            padded(size, num_blocks) if is_split else size
            for size, is_split in zip(self.shape, self.split, strict=True)
        )

    def logical(self, array: Any) -> Any:
        """Return an array without its padding."""
        return array[tuple(map(slice, self.shape))]


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What a model is given of each sample, on a mesh.

    Attributes:
        name: what errors call it, for example "x".
        shape: logical shape of one sample: (width,), (tokens, width), or (tokens,) of ids.
        padded_shape: the shape that it has on the mesh.
        vocabulary: how many ids there are; None for features.
        sharding: of all samples, a dim of their own that comes first.
    """

    name: str
    shape: tuple[int, ...]
    padded_shape: tuple[int, ...]
    vocabulary: int | None
    sharding: NamedSharding


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What a model gives for each sample, on a mesh.

    Attributes:
        width: logical number of outputs.
        padded_width: the number that arrays have.
        tokens: T, where there are outputs for every token of a sample.
        values: sharding of arrays like the outputs.
        samples: sharding of one number a sample.
    """

    width: int
    padded_width: int
    tokens: int | None
    values: NamedSharding
    samples: NamedSharding

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of one sample's outputs."""
        return (self.width,) if self.tokens is None else (self.tokens, self.width)

    @property
    def positions(self) -> int:
        """How many predictions a sample has: T, or 1."""
        return self.tokens or 1


@dataclass(frozen=True, kw_only=True)
class OnMesh:
    """A mesh and a strategy, and what follows from them for the placement of any model.

    Attributes:
        mesh: the mesh.
        strategy: the strategy.
    """

    mesh: Mesh
    strategy: Strategy

    @property
    def num_blocks(self) -> int:
        """What padded widths are multiples of: M = X * Y, times the axes that split W besides.

        Stages split the first and the last layer; data every layer if shard_weights says so. Under
        reduction="invariant" it is the pieces that features are cut into, on every mesh.
        """
        if self.is_invariant:
            return NUM_PIECES
        whole_axes = ("x", "y", "stage", "data") if self.splits_data else ("x", "y", "stage")
        return prod(self.sizes[axis] for axis in whole_axes)

    @property
    def row_blocks(self) -> int:
        """What the padded number of samples is a multiple of."""
        if self.is_invariant:
            return NUM_BLOCKS
        return self.sizes["data"] * self.strategy.microbatches

    @property
    def is_invariant(self) -> bool:
        """Whether results have the same bits on every mesh."""
        return self.strategy.reduction == "invariant"

    @property
    def splits_data(self) -> bool:
        """Whether parameters are split over the data axis."""
        return self.strategy.shard_weights and self.sizes["data"] > 1

    @property
    def platform(self) -> str:
        """The kind of device: "cpu", "tpu", "gpu"."""
        return mesh_platform(self.mesh)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Devices on each mesh axis."""
        return dict(self.mesh.shape)


@dataclass(frozen=True, kw_only=True)
class Placement(OnMesh):
    """The roles of every layer of a chain of dense layers on a mesh, and what follows from them.

    Layers are counted from 1 as in the mathematics; tuples hold layer l at index l - 1.

    Attributes:
        widths: logical widths d_0 .. d_{L+1}.
        words: "column" or "row" for each layer, as the strategy says.
    """

    widths: tuple[int, ...]
    words: tuple[str, ...]

    @property
    def param_layouts(self) -> tuple[str, str]:
        """Layouts of (W_l, b_l): as the layer multiplies them, or split over data besides."""
        return ("O/g/d I/s", "O/g/s/d") if self.splits_data else ("O/g I/s", "O/g/s")

    @cached_property
    def samples(self) -> SampleSpec:
        """What the first layer is given."""
        width, whole = self.widths[0], self.padded_widths[0]
        return SampleSpec("x", (width,), (whole,), None, self.sharding("B/d I/s/g", 1))

    @cached_property
    def outputs(self) -> OutputSpec:
        """What the last layer gives."""
        last = len(self.words)
        return OutputSpec(
            width=self.widths[-1],
            padded_width=self.padded_widths[-1],
            tokens=None,
            values=self.sharding("B/d O/g/s", last),
            samples=self.sharding("B/d", last),
        )

    @cached_property
    def padded_widths(self) -> tuple[int, ...]:
        """Widths that arrays have: the least multiples of M."""
        return tuple(padded(width, self.num_blocks) for width in self.widths)

    @property
    def is_padded(self) -> bool:
        """Whether any width is."""
        return self.widths != self.padded_widths

    @cached_property
    def axes(self) -> tuple[dict[str, str], ...]:
        """Mesh axis of the roles g, s and d, for each layer."""
        main, other = tensor_axes(self.mesh)
        bind = {
            "column": {"g": main, "s": other, "d": "data"},
            "row": {"g": other, "s": main, "d": "data"},
        }
        return tuple(bind[word] for word in self.words)

    def spec(self, layout: str, layer: int) -> PartitionSpec:
        """Return the PartitionSpec of a layout under the roles of a layer (1-based)."""
        return partition_spec(layout, self.mesh, self.axes[layer - 1])

    def sharding(self, layout: str, layer: int) -> NamedSharding:
        """Return the NamedSharding of a layout under the roles of a layer (1-based)."""
        return NamedSharding(self.mesh, self.spec(layout, layer))

    def layer_shapes(self, layer: int) -> tuple[tuple[int, int], tuple[int]]:
        """Return the padded shapes of (W_l, b_l)."""
        d_in, d_out = self.padded_widths[layer - 1 : layer + 1]
        return (d_out, d_in), (d_out,)


def place(widths: tuple[int, ...], mesh: Mesh, strategy: Strategy | None = None) -> Placement:
    """Return where a chain of dense layers lives on a mesh under a strategy.

    Args:
        widths: logical widths d_0 .. d_{L+1}.
        mesh: made by tpmlp.make_mesh.
        strategy: Strategy() by default.

    Raises:
        ValueError: the mesh has other axes; the layout names another number of layers; x and y
            are both larger than 1 and the layers do not alternate.

    Examples:
        >>> from tpmlp.mesh import make_mesh
        >>> place((64, 16, 256), make_mesh(x=4, y=1), Strategy()).words
        ('row', 'column')
    """
    return place_chain(widths, mesh, check_strategy(strategy, mesh))


def check_strategy(strategy: Strategy | None, mesh: Mesh) -> Strategy:
    """Return the strategy, Strategy() for None, or refuse what the mesh cannot do."""
    return check_described(strategy, check_mesh(mesh))


def check_described(strategy: Strategy | None, mesh: Mesh) -> Strategy:
    """Return what check_strategy does, for a mesh that may be only described."""
    if not isinstance(strategy, Strategy | None):
        raise ValueError(
            f"strategy must be a tpmlp.Strategy: got strategy={strategy!r}. Use for example "
            "Strategy(layout='column')."
        )
    return _checked(strategy or Strategy(), mesh)


def check_no_stages(placement: OnMesh, name: str) -> None:
    """Refuse a mesh with stages where something has no pipeline.

    Args:
        placement: on the mesh.
        name: what has none.
    """
    if (stage := placement.sizes["stage"]) > 1:
        raise ValueError(
            f"mesh must be one without stages for {name}: got stage={stage}. Use a mesh with "
            "stage=1, and tpmlp.reshard to bring parameters there."
        )


def _checked(strategy: Strategy, mesh: Mesh) -> Strategy:
    """Return the strategy, or refuse what the mesh's platform cannot do."""
    platform = mesh_platform(mesh)
    for name in ("compute_dtype", "reduce_dtype"):
        # Again: 64-bit types may have been switched off since the strategy was made.
        if (dtype := getattr(strategy, name)) is not None:
            check_dtype(name, dtype)
    if platform == "tpu" and "float64" in (strategy.compute_dtype, strategy.reduce_dtype):
        raise ValueError(
            "compute_dtype and reduce_dtype must be types that the devices have: got "
            f"compute_dtype={strategy.compute_dtype!r}, reduce_dtype={strategy.reduce_dtype!r} on "
            "a mesh of tpu devices, which have no float64. Use 'float32'."
        )
    if strategy.reduction == "invariant":
        _check_invariant(mesh, platform)
    return strategy


def _check_invariant(mesh: Mesh, platform: str) -> None:
    """Refuse a mesh that has no share of whole blocks for each device, or where none was tried."""
    sizes = {axis: size for axis, size in mesh.shape.items() if NUM_BLOCKS % size}
    if sizes:
        raise ValueError(
            f"mesh axes must divide {NUM_BLOCKS} with reduction='invariant', which cuts samples, "
            f"inputs and outputs into {NUM_BLOCKS} blocks on every mesh: got {sizes}. Use 1, 2, 4 "
            "or 8 devices on each axis, or reduction='fast'."
        )
    if platform != "cpu":
        raise ValueError(
            "reduction='invariant' must run on CPU devices, because elsewhere the compiler may "
            f"choose another product for the same block: got platform={platform!r}. Use "
            "reduction='fast'."
        )


@lru_cache(maxsize=256)
def place_chain(widths: tuple[int, ...], mesh: Mesh, strategy: Strategy) -> Placement:
    """Return where layers live that every device has a part of; the strategy is checked."""
    layout = strategy.layout
    words = _words(layout, widths, mesh)
    x, y = mesh.shape["x"], mesh.shape["y"]
    if len(words) != len(widths) - 1:
        raise ValueError(
            f"layout must have one word a layer: got {len(words)} words {words}, "
            f"num_layers={len(widths) - 1}. Use 'auto' or {len(widths) - 1} words."
        )
    clash = next((l for l, (a, b) in enumerate(pairwise(words), 1) if a == b), None)
    if x > 1 and y > 1 and clash:
        raise ValueError(
            f"layout must alternate column and row when x and y are both larger than 1, because a "
            f"layer leaves its output split in the order that only the other role reads: got "
            f"layout={layout!r}, x={x}, y={y}, layers {clash} and {clash + 1} both "
            f"{words[clash]!r}. Use layout='alternate' or 'auto', or a mesh with x=1 or y=1."
        )
    return Placement(widths=widths, mesh=mesh, words=words, strategy=strategy)


def _words(layout: str | tuple[str, ...], widths: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    num_layers = len(widths) - 1
    if isinstance(layout, tuple):
        return layout
    if layout in OTHER:
        return (layout,) * num_layers
    if layout == "alternate":
        return _alternate("column", num_layers)
    return _fewest_words(widths, mesh)


def _alternate(first: str, num_layers: int) -> tuple[str, ...]:
    return tuple((first, OTHER[first])[i % 2] for i in range(num_layers))


def _fewest_words(widths: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """Choose the layout that moves the fewest words; column where it makes no difference."""
    main, other = (mesh.shape[axis] for axis in tensor_axes(mesh))
    wide = [padded(width, main * other) for width in widths]

    def words(layer: int, word: str) -> float:
        g, s = (main, other) if word == "column" else (other, main)
        return layer_words(
            d_in=wide[layer], d_out=wide[layer + 1], g=g, s=s, input_gradient=layer > 0
        )

    num_layers = len(widths) - 1
    if other == 1:
        return tuple(min(OTHER, key=lambda word: words(i, word)) for i in range(num_layers))
    candidates = [_alternate(first, num_layers) for first in OTHER]
    totals = [np.sum([words(i, word) for i, word in enumerate(c)]) for c in candidates]
    return candidates[int(np.argmin(totals))]


def tensor_axes(mesh: Mesh) -> tuple[str, str]:
    """Return the axis that "column" gathers over, and the other one."""
    return ("y", "x") if mesh.shape["x"] == 1 else ("x", "y")
